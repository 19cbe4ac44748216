"""A random fault of a random rank at a random moment, again and again: each is answered by its error, and then the next
call draws what it always draws.

DISTRIFUSION_LONG_TESTS=1 injects 100 faults instead of a dozen.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distrifusion import load
from distrifusion.errors import Cancelled, OutOfMemory, RankFailed, StepTimeout
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.faulty import PLACES, Order, faulty, give, gone_within, hit, outcome

NUM_FAULTS = 100 if os.environ.get("DISTRIFUSION_LONG_TESTS") == "1" else 12
NUM_STEPS = 4
NUM_RANKS = 3
ERRORS = {
    "raise": RankFailed,
    "memory": OutOfMemory,
    "kill": RankFailed,
    "stop": RankFailed,
    "hang": StepTimeout,
}


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("order") / "order"


@pytest.fixture(scope="module")
def pipe(sdxl_folder: Path, order: Path) -> Iterator[SpawnedPipeline]:
    plan = f"patch{NUM_RANKS}.displaced.w1"
    with load(faulty(sdxl_folder, order), devices=NUM_RANKS, plan=plan, step_timeout=6) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


@pytest.fixture(scope="module")
def expected(pipe: SpawnedPipeline) -> torch.Tensor:
    return draw(pipe)


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, list[float]]]:
    """Seconds until each fault was answered, by its kind; `pytest -s` shows them."""
    seconds: dict[str, list[float]] = {}
    yield seconds
    for fault, taken in sorted(seconds.items()):
        print(f"\n{fault}: {len(taken)} times, the longest answer took {max(taken):.1f} s", end="")


def draw(pipe: SpawnedPipeline, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": NUM_STEPS, "generator": generator, "output_type": "np", **arguments}
    return torch.from_numpy(pipe("a lake", **call).images)


@pytest.mark.parametrize("number", range(NUM_FAULTS))
def test_a_fault_is_answered_and_forgotten(
    pipe: SpawnedPipeline, order: Path, expected: torch.Tensor, answers: dict[str, list[float]], number: int
) -> None:
    chance = random.Random(number)
    inject = chance.choice([on_order, on_order, from_a_callback, from_outside])
    pids = pipe.pids
    began = time.monotonic()
    fault = inject(chance, pipe, order, expected)
    answers.setdefault(fault, []).append(time.monotonic() - began)
    assert torch.equal(draw(pipe), expected)
    assert gone_within(set(pids) - set(pipe.pids), 10)


@pytest.mark.parametrize("passed", range(NUM_STEPS))
def test_an_error_of_all_ranks_within_the_network_leaves_no_message(
    pipe: SpawnedPipeline, order: Path, expected: torch.Tensor, passed: int
) -> None:
    pids = pipe.pids
    give(order, Order("raise", "middle", rank=None, passed=passed))
    error = outcome(lambda: draw(pipe))
    order.unlink()
    assert type(error) is LookupError, error
    assert torch.equal(draw(pipe), expected)
    assert pipe.pids == pids


def on_order(chance: random.Random, pipe: SpawnedPipeline, order: Path, expected: torch.Tensor) -> str:
    """A rank fails by itself at a place of the call. Returns the fault, as the other two do."""
    place = chance.choice(PLACES)
    in_loop = place in ("loop", "middle")
    fault = chance.choice([*ERRORS, "raise", "memory", "kill", "stop"])
    if (place, fault) == ("setting", "hang"):
        fault = "stop"  # a setting may take as long as a start
    # Rank 0 encodes the text for all.
    rank = 0 if place == "text" else chance.randrange(NUM_RANKS)
    what = Order(fault, place, rank, chance.randrange(NUM_STEPS) if in_loop else 0)
    give(order, what)
    error = outcome(pipe.vae.enable_tiling if place == "setting" else lambda: draw(pipe))
    order.unlink()
    if (place, fault) == ("text", "raise"):
        assert type(error) is LookupError, (what, error)
        return fault
    assert type(error) is ERRORS[fault], (what, error)
    assert (error.rank, error.step) == (what.rank, what.passed if in_loop else None), (what, error)
    return fault


def from_a_callback(chance: random.Random, pipe: SpawnedPipeline, order: Path, expected: torch.Tensor) -> str:
    """A rank is killed or stopped while all wait for the caller, or the call is cancelled there."""
    fault, rank, when = chance.choice(["kill", "stop", "cancel"]), chance.randrange(NUM_RANKS), chance.randrange(2)

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == when:
            pipe.cancel() if fault == "cancel" else hit(pipe.pids[rank], fault)
        return tensors

    error = outcome(lambda: draw(pipe, callback_on_step_end=callback))
    if fault == "cancel":
        assert type(error) is Cancelled and error.step == when, error
    else:
        assert type(error) is RankFailed and (error.rank, error.step) == (rank, when), (fault, error)
    return fault


def from_outside(chance: random.Random, pipe: SpawnedPipeline, order: Path, expected: torch.Tensor) -> str:
    """A rank is killed or stopped, or the call is cancelled, at any time of a call: it may be over by then."""
    fault, rank = chance.choice(["kill", "stop", "cancel"]), chance.randrange(NUM_RANKS)
    pid = pipe.pids[rank]
    act: Callable[[], None] = pipe.cancel if fault == "cancel" else lambda: hit(pid, fault)
    timer = threading.Timer(chance.uniform(0.0, 0.4), act)
    timer.start()
    answer = outcome(lambda: draw(pipe))
    timer.join()
    if isinstance(answer, torch.Tensor):
        assert torch.equal(answer, expected)
        if fault == "stop":
            os.kill(pid, signal.SIGCONT)
        assert fault != "kill" or gone_within([pid], 10)
    elif fault == "cancel":
        assert type(answer) is Cancelled, answer
    else:
        assert type(answer) is RankFailed and answer.rank == rank, (fault, answer)
    return fault
