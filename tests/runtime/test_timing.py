"""The clock of a call: what it waits for, and what it does not."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from distrifusion.exchange.arriving import Arriving, Bands
from distrifusion.layout.partition import Interval
from distrifusion.runtime.timing import StepClock, timed_tensors

CPU = torch.device("cpu")


def _latents(fetched: list[int]) -> Arriving:
    room = torch.zeros(1, 1, 4, 2)
    return Arriving.of(room, Bands(2, (Interval(0, 2), Interval(2, 4))), fetched.append)


def test_the_first_and_the_last_step_end_when_all_pieces_have_come_and_others_do_not_wait() -> None:
    clock = StepClock(CPU)
    came: list[list[int]] = [[], [], []]
    for step, fetched in enumerate(came):
        clock.step_ended(step == 2, {"latents": _latents(fetched)})
    assert came == [[0, 1], [], [0, 1]]
    assert len(clock.times().steps) == 3


def test_latents_that_are_not_shown_are_not_waited_for() -> None:
    clock = StepClock(CPU)
    clock.step_ended(True, {})
    clock.step_ended(True, {"latents": torch.zeros(1)})
    assert len(clock.ends) == 2


def test_a_pipeline_is_asked_for_latents_where_it_has_them_to_show() -> None:
    assert timed_tensors(StableDiffusion3Pipeline) == ("latents",)
    assert timed_tensors(DiffusionPipeline) == ()
