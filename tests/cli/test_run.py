"""`distrifusion run` as a person types it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shell import finish, run

import distrifusion
import distrifusion.loading


def test_two_devices_compared_with_one(folder: Path, tmp_path: Path) -> None:
    words = ["run", folder, "--prompt=a lake", "--devices=2", "--steps=3", "--size=72x64", "--seed=7", "--compare"]
    outputs = ["-o", tmp_path / "a.png", "--trace", tmp_path / "t.json.gz"]
    done = finish(*words, "--guidance=3", "--scheduler=euler", *outputs)
    assert done.returncode == 0, done.stderr
    first, shares, trace, second = done.stdout.strip().splitlines()
    assert re.match(
        r"cfg2 on 2 CPU processes of \d+ threads?: \S+ s per step, \S+ s in all, seed 7, picture in ", first
    )
    assert first.endswith(str(tmp_path / "a.png"))
    assert re.match(r"synchronous calls: \S+ s on average, compute \S+ %, wait \S+ %, post \S+ %$", shares)
    assert trace == f"trace in {tmp_path / 't.json.gz'}"
    events = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("cat") == "call" for event in events) == 2 * 3
    psnr = re.search(r"against 1 CPU process of .*x per step, .*x in all, PSNR (\S+) dB, SSIM (\S+), ", second)
    assert psnr is not None and float(psnr[1]) > 60 and float(psnr[2]) > 0.999
    assert Image.open(tmp_path / "a.png").size == (72, 64)
    assert Image.open(tmp_path / "a-compare.png").size[0] > 3 * 72
    assert "3/3" in done.stderr and "Traceback" not in done.stderr


def test_one_device_in_this_process(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.jpg"
    done = run("run", folder, "-p", "a", "-d", "cpu", "--steps", "1", "--dtype", "bfloat16", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert re.match(r"patch1 on 1 CPU process: .* seed \d+, picture in .*one\.jpg\n$", done.stdout)
    assert Image.open(out).size == (64, 64)


def test_a_sampler_says_how_many_calls_it_took(folder: Path, tmp_path: Path) -> None:
    words = ("run", folder, "-p", "a", "-d", "cpu", "--steps", "6", "--seed", "7", "--sampler", "picard")
    done = run(*words, "--window", "3", "--tolerance", "1e-4", "-o", tmp_path / "a.png")
    assert done.exit_code == 0, done.stderr
    assert "distrifusion: sampler='picard' saves few of 6 denoiser calls" in done.stderr
    calls = re.match(r"patch1 on 1 CPU process: \S+ s per call, (\d) calls, \S+ s in all", done.stdout)
    assert calls is not None and 2 <= int(calls[1]) <= 6
    for more, says in (
        (("--scheduler", "heun"), "HeunDiscreteScheduler is not known as a map"),
        (("--window", "7"), "window=7 is more than the 6 steps"),
        (("--plan", "patch2.naive"), "or sampler='sequential'"),
    ):
        done = run(*words, *more, "-o", tmp_path / "b.png")
        assert done.exit_code == 2 and says in done.stderr and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("config", "more", "says"),
    [
        ({"_class_name": "PNDMScheduler"}, (), "PNDMScheduler is not known as a map"),
        ({"_class_name": "DDIMScheduler"}, (), "clip_sample=True cannot be solved in parallel"),
        ({"_class_name": "PNDMScheduler"}, ("--scheduler", "euler", "--window", "21"), "window=21 is more than the 20"),
        ({"_class_name": "EulerDiscreteScheduler"}, ("--strength", "0.5", "--window", "11"), "more than the 10 steps"),
    ],
)
def test_what_cannot_serve_a_sampler_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, config: dict[str, str], more: tuple[str, ...], says: str
) -> None:
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = ("--image", tmp_path / "a.png") if "--strength" in more else ()
    done = run("run", tmp_path, "-p", "a", "-d", "cpu", "--steps", "20", "--sampler", "picard", *image, *more)
    assert done.exit_code == 2 and says in done.stderr


def test_the_answer_as_json(folder: Path, tmp_path: Path) -> None:
    done = run("run", folder, "-p", "a", "--steps", "2", "--seed", "7", "-o", tmp_path / "a.png", "--format", "json",
               "--trace", tmp_path / "t.json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["plan"] == "patch1" and answer["seed"] == 7 and answer["picture"] == str(tmp_path / "a.png")
    assert 0 < answer["seconds_per_step"] < answer["seconds"] and "compared" not in answer
    assert answer["trace"]["file"] == str(tmp_path / "t.json")
    assert [share["what"] for share in answer["trace"]["calls"]["one device"]["shares"]] == ["compute"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--plan", "pach2"], "did you mean 'patch2'"),
        (["--plan", "patch3", "--devices", "2"], "nearest plan for 2"),
        (["--devices", "0"], "devices=0"),
        (["--devices", "gpu"], "none of"),
        (["--size", "100x64"], "width=100 must be a multiple of 8; the nearest is 96 or 104"),
        (["--size", "0x64"], "width=0"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--steps", "-3"], "num_inference_steps=-3"),
        (["--guidance", "nan"], "finite"),
        (["--scheduler", "eular"], "scheduler 'eular'"),
        (["--dtype", "int8"], "dtype 'int8'"),
        (["--out", "/nowhere/at/all/a.png"], "there is no folder '/nowhere/at/all'"),
        (["--out", "a.pictures"], "use .png"),
        (["--out", "/"], "is a folder"),
        (["--trace", "/nowhere/at/all/t.json"], "there is no folder '/nowhere/at/all'"),
        (["--trace", "t.txt"], "does not end in .json or .json.gz"),
        (["--trace", "/"], "does not end in"),
        (["--devices", "1", "--compare"], "--compare compares with one device"),
        (["--devices", "2", "--plan", "async2", "--graphs"], "has messages under way between two calls"),
    ],
)
def test_bad_values_are_one_clear_line(folder: Path, words: list[str], says: str) -> None:
    done = run("run", folder, "--prompt", "a", *words)
    assert done.exit_code == 2
    assert says in done.stderr and done.stderr.startswith("distrifusion: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.json").mkdir()
    monkeypatch.setattr(distrifusion.loading, "load", None)
    done = run("run", folder, "-p", "a", "--trace", tmp_path / "t.json")
    assert done.exit_code == 2 and "is a folder; name a file in it" in done.stderr


@pytest.mark.parametrize("model", ["/nowhere/at/all", "dmeo", "/"])
def test_bad_models(model: str) -> None:
    done = run("run", model, "--prompt", "a")
    assert done.exit_code == 2 and done.stderr.startswith("distrifusion: ") and model in done.stderr


@pytest.mark.parametrize("words", [["--steps", "many"], ["--seed", "-1"], ["--nonsense", "1"], []])
def test_bad_options(folder: Path, words: list[str]) -> None:
    done = run("run", folder, *words)
    assert done.exit_code == 2 and "Traceback" not in done.stderr


def test_help() -> None:
    assert "run" in run().stdout + run().stderr
    shown = run("run", "--help")
    assert shown.exit_code == 0
    for option in ("--prompt", "--devices", "--plan", "--size", "--steps", "--seed", "--compare"):
        assert option in shown.stdout


@pytest.mark.parametrize("command", ["run", "verify", "doctor", "models"])
def test_help_does_not_wait_for_torch(command: str) -> None:
    script = f"import sys; from distrifusion.cli import app; app(['{command}', '-h'], standalone_mode=False); "
    script += "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"distrifusion {distrifusion.__version__}\n"
