"""A loaded pipeline whose workers run components: calls, a call that is cancelled while ranks are apart, traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distrifusion import Cancelled, load
from distrifusion.runtime.spawned import SpawnedPipeline
from models import relative_error

CALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 6, "output_type": "latent"}


@pytest.fixture(scope="module", params=["async2.forecast.w1", "async2.stride2.w1"])
def apart(sdxl_folder: Path, request: pytest.FixtureRequest) -> Iterator[SpawnedPipeline]:
    with load(sdxl_folder, devices=2, plan=request.param) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    torch.manual_seed(11)
    return pipe(**{**CALL, **changes}).images


def test_runs_come_close_are_exact_within_the_warm_up_and_repeat(one: Any, apart: SpawnedPipeline) -> None:
    assert relative_error(draw(apart, num_inference_steps=2), draw(one, num_inference_steps=2)) < 1e-5
    first = draw(apart)
    assert 1e-6 < relative_error(first, draw(one)) < 0.3
    assert torch.equal(draw(apart), first)


def test_all_leave_a_cancelled_call_at_the_same_step(apart: SpawnedPipeline) -> None:
    first = draw(apart)
    for _ in range(3):
        timer = threading.Timer(0.05, apart.cancel)
        timer.start()
        with pytest.raises(Cancelled):
            draw(apart, num_inference_steps=400)
        timer.join()
        assert torch.equal(draw(apart), first)
