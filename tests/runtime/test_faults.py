"""What the caller gets when one rank fails, dies, is stopped or hangs, and that the next call works."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import load
from distrifusion.errors import OutOfMemory, RankFailed, StepTimeout
from distrifusion.runtime.faults import is_out_of_memory
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.faulty import Order, faulty, give, gone_within, hit, is_alive, outcome, parent_of

RAISED = (RankFailed, r"rank 1 failed {}: builtins\.LookupError: of this rank")
MEMORY = (OutOfMemory, "rank 1 ran out of memory {}: .*half precision")
KILLED = (RankFailed, "rank 1 was ended by SIGKILL {}.*memory runs out")
STOPPED = (RankFailed, "rank 1 was stopped by a signal {}")
OUTSIDE = "outside the denoising loop"


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("order") / "order"


@pytest.fixture(scope="module")
def pipe(sdxl_folder: Path, order: Path) -> Iterator[SpawnedPipeline]:
    with load(faulty(sdxl_folder, order), devices=2, plan="patch2", step_timeout=6) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.vae.enable_slicing()
        yield pipe


@pytest.fixture(scope="module")
def expected(pipe: SpawnedPipeline) -> torch.Tensor:
    return draw(pipe)


def draw(pipe: SpawnedPipeline, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe("a", num_inference_steps=5, generator=generator, output_type="np", **arguments).images)


@pytest.mark.supports("feature", "a rank that fails, dies, stops or hangs is a typed error, and the next call works")
@pytest.mark.parametrize(
    ("what", "error", "says", "step"),
    [
        (Order("kill", "text", rank=0), RankFailed, "rank 0 was ended by SIGKILL {}", None),
        (Order("memory", "text", rank=0), OutOfMemory, "rank 0 ran out of memory {}", None),
        (Order("raise", "loop", passed=2), *RAISED, 2),
        (Order("memory", "middle", passed=2), *MEMORY, 2),
        (Order("kill", "loop", passed=2), *KILLED, 2),
        (Order("stop", "loop", passed=2), *STOPPED, 2),
        (Order("hang", "loop", passed=2), StepTimeout, "no rank moved on for 6 s; rank 1 is last, {}, after exc", 2),
        (Order("memory", "vae"), *MEMORY, None),
        (Order("stop", "vae"), *STOPPED, None),
        (Order("raise", "setting"), *RAISED, None),
        (Order("kill", "setting"), *KILLED, None),
    ],
    ids=lambda value: f"{value.fault} in {value.place}" if isinstance(value, Order) else "",
)
def test_one_rank_ends_the_call_and_not_the_pipeline(
    pipe: SpawnedPipeline,
    order: Path,
    expected: torch.Tensor,
    what: Order,
    error: type[RankFailed | OutOfMemory | StepTimeout],
    says: str,
    step: int | None,
) -> None:
    give(order, what)
    pids = pipe.pids
    answer = outcome(pipe.vae.enable_tiling if what.place == "setting" else lambda: draw(pipe))
    order.unlink()
    with pytest.raises(error, match=says.format(OUTSIDE if step is None else f"in step {step}")):
        raise answer
    assert (answer.rank, answer.step) == (what.rank, step)
    if (what.fault, what.place) == ("kill", "loop"):
        assert re.search("of layer '.+'", answer.exchange) and answer.exchange in str(answer)
    assert pipe.pids == () and gone_within(pids, 10)
    assert torch.equal(draw(pipe), expected)


def test_an_error_of_the_rank_that_encodes_the_text_is_the_error_of_all(
    pipe: SpawnedPipeline, order: Path, expected: torch.Tensor
) -> None:
    draw(pipe)
    pids = pipe.pids
    give(order, Order("raise", "text", rank=0))
    answer = outcome(lambda: draw(pipe))
    order.unlink()
    assert type(answer) is LookupError and str(answer) == "of this rank"
    assert torch.equal(draw(pipe), expected) and pipe.pids == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_while_the_callers_callback_runs(
    pipe: SpawnedPipeline, expected: torch.Tensor, rank: int
) -> None:
    def kill(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            hit(pipe.pids[rank], "kill")
        return tensors

    with pytest.raises(RankFailed, match=f"rank {rank} was ended by SIGKILL in step 1") as caught:
        draw(pipe, callback_on_step_end=kill)
    assert (caught.value.rank, caught.value.step) == (rank, 1)
    assert torch.equal(draw(pipe), expected)


def test_a_failure_within_a_callbacks_request_ends_the_call(pipe: SpawnedPipeline, expected: torch.Tensor) -> None:
    failures: list[RankFailed] = []

    def look(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        hit(pipe.pids[0], "kill")
        for _ in range(2):
            try:
                _ = pipe.vae.use_slicing
            except RankFailed as failure:
                failures.append(failure)
        return tensors

    with pytest.raises(RankFailed, match="within the callback"):
        draw(pipe, callback_on_step_end=look)
    assert len(failures) == 2 and failures[0].rank == 0
    assert torch.equal(draw(pipe), expected)


def test_a_rank_that_dies_between_calls_is_no_error(pipe: SpawnedPipeline, expected: torch.Tensor) -> None:
    pids = pipe.pids
    hit(pids[1], "kill")
    assert gone_within(pids[1:], 10)
    assert torch.equal(draw(pipe), expected)
    assert not set(pids) & set(pipe.pids) and gone_within(pids, 10)


def test_a_stopped_rank_does_not_hold_up_a_long_message(pipe: SpawnedPipeline, expected: torch.Tensor) -> None:
    hit(pipe.pids[1], "stop")
    answer = outcome(lambda: draw(pipe, latents=torch.zeros(1, 4, 1024, 1024)))
    with pytest.raises(RankFailed, match="rank 1 was stopped by a signal"):
        raise answer
    assert torch.equal(draw(pipe), expected)


def test_the_process_that_starts_ranks_may_die(pipe: SpawnedPipeline, expected: torch.Tensor) -> None:
    pids = pipe.pids
    hit(parent_of(pids[0]), "kill")
    assert gone_within(pids, 10)
    assert torch.equal(draw(pipe), expected)


def test_ctrl_c_ends_the_call_and_the_workers(pipe: SpawnedPipeline) -> None:
    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    pids = pipe.pids
    with pytest.raises(KeyboardInterrupt):
        pipe("a", num_inference_steps=5, callback_on_step_end=interrupt)
    assert pipe.pids == ()
    assert not any(map(is_alive, pids))


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


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (RankFailed("rank 1 failed: out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, is_so: bool) -> None:
    assert is_out_of_memory(error) is is_so


def test_memory_that_ran_out_in_this_process_is_said_likewise(sdxl_folder: Path) -> None:
    def give_up(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.empty(1 << 60, dtype=torch.uint8)}

    with load(sdxl_folder, devices=1) as one:
        one.set_progress_bar_config(disable=True)
        with pytest.raises(OutOfMemory, match="rank 0 ran out of memory in step 0") as caught:
            one("a", num_inference_steps=2, callback_on_step_end=give_up)
        assert caught.value.step == 0
        assert len(one("a", num_inference_steps=1).images) == 1


def test_close_leaves_no_process(pipe: SpawnedPipeline) -> None:
    pids = pipe.pids
    assert len(pids) == 2
    pipe.close()
    pipe.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
