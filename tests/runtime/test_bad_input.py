"""Every bad argument is an error that names the value and the remedy, before a weight is read or a process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import load
from distrifusion.errors import ConfigError, PlanError
from distrifusion.plan import Plan
from distrifusion.runtime import devices as device_specs
from distrifusion.runtime.in_process import TorchrunPlace
from distrifusion.runtime.spawned import SpawnedPipeline

NO_CUDA = not torch.cuda.is_available()


@pytest.fixture
def weightless(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of which only the descriptions are there: reading weights would fail otherwise."""
    for path in sdxl_folder.rglob("*.json"):
        target = tmp_path / "pipeline" / path.relative_to(sdxl_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    return tmp_path / "pipeline"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"plan": "patsh2"}, PlanError, "did you mean 'patch2'"),
        ({"plan": "patch3", "devices": 2}, PlanError, "nearest plan for 2 is 'patch2'"),
        ({"plan": 3}, PlanError, "not int"),
        ({"devices": 0}, ConfigError, "devices=0: at least one"),
        ({"devices": -2}, ConfigError, "devices=-2: at least one"),
        ({"devices": []}, ConfigError, "at least one"),
        ({"devices": True}, ConfigError, "devices=True is none of"),
        ({"devices": "gpu"}, ConfigError, "devices='gpu' is none of"),
        ({"devices": ["cpu", 1.5]}, ConfigError, "devices=1.5 is none of"),
        ({"devices": {"cpu": 2}}, ConfigError, "is none of"),
        ({"devices": 2, "backend": "mpi"}, ConfigError, "one of gloo, nccl"),
        ({"devices": ["cpu", "cpu"], "backend": "nccl"}, ConfigError, "serves cuda ranks"),
        ({"devices": 2, "threads": 0}, ConfigError, "threads=0"),
        ({"devices": 2, "threads": True}, ConfigError, "threads=True"),
        ({"devices": 2, "step_timeout": 0}, ConfigError, "step_timeout=0"),
        ({"devices": 2, "step_timeout": float("inf")}, ConfigError, "finite"),
        ({"devices": 2, "start_timeout": "soon"}, ConfigError, "start_timeout='soon'"),
        ({"device": 2}, ConfigError, "did you mean devices="),
        ({"tourch_dtype": 2}, ConfigError, "did you mean torch_dtype="),
        ({"device_map": "auto"}, ConfigError, "say where by devices="),
        ({"zzz": 1}, ConfigError, "its components are"),
    ],
)
def test_arguments_of_load(weightless: Path, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load(weightless, **arguments)


@pytest.mark.skipif(not NO_CUDA, reason="there is CUDA here")
@pytest.mark.parametrize("devices", ["cuda", "cuda:1", ["cuda:0", "cuda:1"], [0, 1], torch.device("cuda")])
def test_cuda_where_none_is(weightless: Path, devices: device_specs.DeviceSpec) -> None:
    with pytest.raises(ConfigError, match=r"'cuda.*there is no CUDA here; use 'cpu'"):
        load(weightless, devices)


def single_file(folder: Path) -> object:
    (folder / "model.safetensors").write_bytes(b"")
    return folder / "model.safetensors"


def broken_index(folder: Path) -> object:
    (folder / "model_index.json").write_text("{")
    return folder


def unknown_class(folder: Path) -> object:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDifusion"}))
    return folder


def component(folder: Path) -> object:
    (folder / "config.json").write_text("{}")
    return folder


def other_files(folder: Path) -> object:
    (folder / "weights.bin").write_text("")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nowhere", "there is no folder"),
        (lambda folder: str(folder / "nowhere"), "there is no folder"),
        (lambda folder: "dmeo", "did you mean 'demo'"),
        (lambda folder: "demo-dti", "did you mean 'demo-dit'"),
        (lambda folder: folder, "it is empty"),
        (other_files, "it holds weights.bin"),
        (component, "single component; load the folder above"),
        (single_file, "is a file.*from_single_file"),
        (broken_index, "not readable as JSON"),
        (unknown_class, "'StableDifusion', which diffusers"),
        (lambda folder: diffusers.StableDiffusionXLPipeline, "is a class"),
        (lambda folder: 7, "a int cannot be loaded"),
    ],
)
def test_sources(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(make(tmp_path), devices=2)  # type: ignore[arg-type]


def test_a_hub_id_is_looked_up_before_weights(sdxl_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--tiny--lake" / "snapshots" / ("0" * 40)
    shutil.copytree(sdxl_folder, snapshot)
    (tmp_path / "models--tiny--lake" / "refs").mkdir()
    (tmp_path / "models--tiny--lake" / "refs" / "main").write_text("0" * 40)
    cache = {"cache_dir": tmp_path, "local_files_only": True}
    with load("tiny/lake", devices=1, **cache) as pipe:
        assert pipe.vae_scale_factor == 8
    with pytest.raises(ConfigError, match="did you mean torch_dtype="):
        load("tiny/lake", devices=1, torch_dtipe=1, **cache)
    with pytest.raises(ConfigError, match="'tiny/laek' is neither a folder here nor a pipeline the hub gives"):
        load("tiny/laek", devices=1, **cache)


def test_a_pipeline_object_is_sent_to_parallelize(one: Any) -> None:
    with pytest.raises(ConfigError, match=r"distrifusion\.parallelize"):
        load(one, devices=2)


def test_a_factory_takes_no_keywords_and_returns_a_pipeline(sdxl_folder: Path) -> None:
    with pytest.raises(ConfigError, match="put them into the factory"):
        load(lambda: None, devices=1, torch_dtype=torch.float16)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="returned a NoneType"):
        load(lambda: None, devices=1)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"promt": "a"}, "did you mean prompt="),
        ({"callback": print}, "use callback_on_step_end="),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"height": 100}, "height=100 must be a multiple of 8; the nearest is 96 or 104"),
        ({"width": 3}, "width=3 must be a multiple of 8; the nearest is at least 8"),
        ({"width": -64}, "at least 8"),
        ({"height": 64.0}, "whole number of pixels"),
        ({"guidance_scale": float("nan")}, "finite"),
    ],
)
def test_arguments_of_a_call(two: SpawnedPipeline, arguments: dict[str, Any], says: str) -> None:
    pids = two.pids
    with pytest.raises(ConfigError, match=says):
        two(**{"prompt": "a", **arguments})
    assert two.pids == pids


def test_arguments_by_position(two: SpawnedPipeline) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        two("a", prompt="b")
    with pytest.raises(ConfigError, match="arguments and 99 are given"):
        two(*["a"] * 99)


@pytest.mark.parametrize(
    ("text", "spec"),
    [("2", 2), ("-1", -1), ("cpu", "cpu"), ("cpu, cpu", ["cpu", "cpu"]), ("0,1", [0, 1]), ("cuda:1", "cuda:1")],
)
def test_devices_as_text(text: str, spec: device_specs.DeviceSpec) -> None:
    assert device_specs.parse(text) == spec


def test_devices_and_plans_fit() -> None:
    cpu = torch.device("cpu")
    if NO_CUDA:
        assert device_specs.resolve(None, None) == ((cpu,), Plan())
        assert device_specs.resolve(3, None)[0] == (cpu,) * 3
    assert device_specs.resolve("cpu", Plan.parse("cfg2.patch2"))[0] == (cpu,) * 4
    assert device_specs.resolve(["cpu", "cpu"], None)[1] == Plan.default(2)


def test_torchrun_ranks_and_plans_fit() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert TorchrunPlace.of(environment) == TorchrunPlace(1, 1, 2)
    assert TorchrunPlace.of({"RANK": "1"}) is None
    assert device_specs.check_world("cpu", None, 2) == Plan.default(2)
    with pytest.raises(ConfigError, match="torchrun started 2 ranks"):
        device_specs.check_world(3, None, 2)
    with pytest.raises(ConfigError, match="every rank takes its own"):
        device_specs.check_world(["cpu", "cpu"], None, 2)
    with pytest.raises(PlanError, match="nearest plan for 2"):
        device_specs.check_world(None, Plan.parse("patch4"), 2)
