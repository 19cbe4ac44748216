"""What the caller gets when one rank fails, dies, is stopped or hangs, and that the next call works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import load
from distrifusion.errors import OutOfMemory, RankFailed, StepTimeout
from distrifusion.runtime.spawned import SpawnedPipeline


def faulty(folder: Path, order: Path) -> Callable[[], Any]:
    """A factory of a pipeline whose rank 1 does what the file `order` says, in the third denoiser call of a run."""

    def build() -> Any:
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        calls = [0]

        def obey(*_: Any) -> None:
            calls[0] += 1
            if torch.distributed.get_rank() != 1 or not order.exists() or calls[0] < 3:
                return
            match order.read_text():
                case "raise":
                    raise LookupError("of this rank")
                case "memory":
                    torch.empty(1 << 60, dtype=torch.uint8)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hang":
                    time.sleep(1000)

        pipe.unet.register_forward_pre_hook(obey)
        return pipe

    return build


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("order") / "order"


@pytest.fixture(scope="module")
def pipe(sdxl_folder: Path, order: Path) -> Iterator[SpawnedPipeline]:
    with load(faulty(sdxl_folder, order), devices=2, plan="patch2", step_timeout=10) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.vae.enable_slicing()
        yield pipe


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("raise", RankFailed, "rank 1 failed in step 2: builtins.LookupError: of this rank"),
        ("memory", OutOfMemory, "rank 1 ran out of memory in step 2: .*half precision"),
        ("kill", RankFailed, "rank 1 was ended by SIGKILL in step 2"),
        ("stop", RankFailed, "rank 1 was stopped by a signal in step 2"),
        ("hang", StepTimeout, "no rank moved on for 10 s; rank . is last, in step 2"),
    ],
)
def test_one_rank_ends_the_call_and_not_the_pipeline(
    pipe: SpawnedPipeline, order: Path, fault: str, error: type[RankFailed | OutOfMemory | StepTimeout], says: str
) -> None:
    order.write_text(fault)
    with pytest.raises(error, match=says) as caught:
        pipe("a", num_inference_steps=5)
    order.unlink()
    assert caught.value.step == 2
    assert error is StepTimeout or caught.value.rank == 1
    assert pipe.pids == ()


def test_ctrl_c_ends_the_call_and_the_workers(pipe: SpawnedPipeline) -> None:
    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    pids = pipe.pids
    with pytest.raises(KeyboardInterrupt):
        pipe("a", num_inference_steps=5, callback_on_step_end=interrupt)
    assert pipe.pids == ()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_restart_repeats_what_was_changed(pipe: SpawnedPipeline) -> None:
    torch.manual_seed(8)
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    assert pipe.vae.use_slicing is True
    # What was repeated drew its numbers long ago.
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(8)))
    assert len(pipe("a", num_inference_steps=2).images) == 1


def test_errors_of_all_ranks_keep_the_workers(pipe: SpawnedPipeline) -> None:
    pids = pipe.pids
    with pytest.raises(ValueError, match=r"`negative_prompt`: .* has batch size 3") as caught:
        pipe(["a"], negative_prompt=["a", "b", "c"])
    assert "worker.py" in str(caught.value.__cause__)
    with pytest.raises(AttributeError, match="encode_prompd"):
        pipe.encode_prompd("a")
    assert len(pipe("a", num_inference_steps=1).images) == 1
    assert pipe.pids == pids


def test_close_leaves_no_process(pipe: SpawnedPipeline) -> None:
    pids = pipe.pids
    assert len(pids) == 2
    pipe.close()
    pipe.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
