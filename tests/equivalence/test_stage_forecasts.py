"""Old keys and values of pieces, carried on: exact where nothing moves, nearer where all moves evenly."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from division import EXACT, errors, on_ranks, predictions

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.pieces import PieceBuffer
from models import moved, run_request
from transformers_tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py


@cache
def model_of(family: str) -> Any:
    return FAMILIES[family].make()


def walk(family: str, num_steps: int, batch: int = 1) -> list[dict[str, Any]]:
    """Latents that move on a line, in steps of the model's time so small that they alone change what it gives."""
    x = FAMILIES[family].inputs(batch, *FAMILIES[family].size)
    start, end = x["hidden_states"], moved(x, 0.3)["hidden_states"]
    return [
        {**x, "hidden_states": torch.lerp(start, end, i / 5), "timestep": x["timestep"] * (1 - 2e-5 * i)}
        for i in range(num_steps)
    ]


@pytest.mark.supports("plan", "pipe<N>.m<M>.forecast")
@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("SD3", "pipe2.m3"),
        ("SD3", "cfg2.pipe2.m3"),
        ("FLUX.1 dev", "pipe4.m5"),
        ("FLUX.1 dev", "pipe2.ulysses2.m2"),  # keys of a whole are not arranged
        ("PixArt-Sigma", "pipe2.m4"),
    ],
)
def test_an_input_given_again_is_exact_under_a_forecast(family: str, plan: str) -> None:
    x = FAMILIES[family].inputs(2, *FAMILIES[family].size)
    y = moved(x)
    assert max(errors(model_of(family), f"{plan}.forecast.w1", [x, y, y, y, y])) <= EXACT


@pytest.mark.parametrize("plan", ["pipe2.m3", "cfg2.pipe2.ulysses2.m2"])
def test_where_no_time_passes_a_forecast_leaves_the_bits_as_they_are(plan: str) -> None:
    steps = [{**step, "timestep": torch.full((2,), 500.0)} for step in walk("SD3", 5, batch=2)]
    plain, carried = (predictions(model_of("SD3"), f"{plan}{word}.w1", steps)[0] for word in ("", ".forecast200"))
    assert all(torch.equal(a, b) for a, b in zip(carried, plain, strict=True))


@pytest.mark.parametrize("plan", ["pipe2.m3", "pipe2.ulysses2.m2"])
@pytest.mark.parametrize("family", ["SD3", "FLUX.1 dev"])
def test_a_forecast_is_nearer_where_values_move_on_a_line(family: str, plan: str) -> None:
    steps = walk(family, 6)
    plain, half, full = (
        errors(model_of(family), f"{plan}{word}.w1", steps)[-1] for word in ("", ".forecast", ".forecast100")
    )
    assert full < half < plain
    assert EXACT < full < plain / 2


def test_the_first_call_of_pieces_is_carried_on_by_two_whole_ones() -> None:
    steps = walk("SD3", 3)
    plain, carried = (errors(model_of("SD3"), f"pipe2.m3{word}.w1", steps)[-1] for word in ("", ".forecast100"))
    assert EXACT < carried < plain / 2


def test_each_row_is_carried_on_by_its_own_time() -> None:
    """The first row's time stands still, and so do its old values: it has the bits that it has without a forecast."""
    steps = walk("SD3", 5, batch=2)
    still = steps[0]["timestep"][:1]
    steps = [{**step, "timestep": torch.cat([still, step["timestep"][1:]])} for step in steps]
    plain, carried = (predictions(model_of("SD3"), f"pipe2.m3{word}.w1", steps)[0] for word in ("", ".forecast100"))
    assert torch.equal(carried[-1][0], plain[-1][0])
    assert not torch.equal(carried[-1][1], plain[-1][1])


def test_values_carried_back_are_farther_off(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, intact = walk("SD3", 6), PieceBuffer.advance
    plain = errors(model_of("SD3"), "pipe2.m3.w1", steps)[-1]
    monkeypatch.setattr(PieceBuffer, "advance", lambda self, weight: intact(self, -weight))
    assert errors(model_of("SD3"), "pipe2.m3.forecast.w1", steps)[-1] > plain


def test_a_request_is_not_carried_on_by_the_one_before() -> None:
    steps = walk("SD3", 4)

    def work(model: Any, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        run_request(model, denoiser, [moved(step, 1.0) for step in steps], "before")
        assert denoiser.pool.num_bytes == 0
        return run_request(model, denoiser, steps, "after")

    fresh = predictions(model_of("SD3"), "pipe2.m3.forecast.w0", steps)
    for own, other in zip(on_ranks(model_of("SD3"), "pipe2.m3.forecast.w0", work), fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
