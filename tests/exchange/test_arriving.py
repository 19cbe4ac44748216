"""Tensors that arrive in bands: samplers go on band by band, everything else waits, and numbers are the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import ConfigError
from distrifusion.exchange import arriving
from distrifusion.exchange.arriving import Arriving, Bands, arrive
from distrifusion.layout.partition import Interval

BANDS = Bands(2, (Interval(0, 4), Interval(4, 6), Interval(6, 9)))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Sender:
    """A tensor [2, 3, 9, 5] whose bands arrive when they are asked for, and which of them have been."""

    def __init__(self, seed: int = 0) -> None:
        self.value = noise(2, 3, 9, 5, seed=seed)
        self.asked: list[int] = []
        room = torch.full_like(self.value, torch.nan)

        def fetch(band: int) -> None:
            part = BANDS.parts[band]
            room[:, :, part.start : part.stop] = self.value[:, :, part.start : part.stop]
            self.asked.append(band)

        self.arriving = Arriving.of(room, BANDS, fetch)


def guided(prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Guidance and a step as pipelines write them."""
    without, wanted = prediction.chunk(2)
    velocity = without + 3.0 * (wanted - without)
    return (latents.to(torch.float32) - torch.tensor(0.1) * velocity).to(prediction.dtype)


def test_a_step_needs_no_band_before_it_is_asked_for_one() -> None:
    sender, latents = Sender(), noise(1, 3, 9, 5, seed=1)
    stepped = guided(sender.arriving, latents)
    doubled = torch.cat([stepped] * 2)
    assert sender.asked == [] and doubled.shape == (2, 3, 9, 5) and doubled.dtype == torch.float32
    arrive(doubled, 1)
    assert sender.asked == [1]
    expected = torch.cat([guided(sender.value, latents)] * 2)
    assert torch.equal(doubled.so_far()[:, :, 4:6], expected[:, :, 4:6])
    assert torch.equal(doubled, expected)
    assert sender.asked == [1, 0, 2]
    assert type(doubled) is type(stepped) is type(sender.arriving) is torch.Tensor


@pytest.mark.parametrize(
    ("make", "pointwise"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, True),
        (lambda: diffusers.DDIMScheduler(clip_sample=True), True),
        (diffusers.DPMSolverMultistepScheduler, True),
        (diffusers.EulerDiscreteScheduler, True),
        (diffusers.UniPCMultistepScheduler, False),
        (diffusers.LMSDiscreteScheduler, False),
        (diffusers.PNDMScheduler, False),
        (diffusers.EulerAncestralDiscreteScheduler, False),
    ],
)
def test_samplers_give_the_same_bits_and_the_pointwise_wait_for_nothing(
    make: Callable[[], Any], pointwise: bool
) -> None:
    def run(predict: Callable[[int], torch.Tensor]) -> torch.Tensor:
        scheduler = make()
        scheduler.set_timesteps(5)
        latents: Any = noise(2, 3, 9, 5, seed=9)
        generator = torch.Generator().manual_seed(3)
        options = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
        for i, timestep in enumerate(scheduler.timesteps[:4]):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(predict(i), timestep, latents, **options, return_dict=False)[0]
        return latents

    senders = [Sender(seed) for seed in range(4)]
    stepped = run(lambda i: senders[i].arriving)
    if pointwise:
        assert isinstance(stepped, Arriving)
        assert not any(sender.asked for sender in senders)
        arrive(stepped, 0)
        assert all(sender.asked == [0] for sender in senders)
    assert torch.equal(stepped, run(lambda i: senders[i].value))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(),
        lambda x: x[:1],
        lambda x: x.flip(2),
        lambda x: torch.cat([x, x], 2),
        lambda x: x.chunk(3, dim=-2)[0],
        lambda x: x @ x.transpose(2, 3),
        lambda x: x + noise(9, 1),
        lambda x: x.add_(1),
        lambda x: torch.from_numpy(x.numpy().copy()),
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: copy.deepcopy(x),
        lambda x: torch.nn.functional.softmax(x, 2),
    ],
)
def test_any_function_gives_what_it_gives_of_a_plain_tensor(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    sender = Sender()
    expected = function(sender.value.clone())
    assert torch.equal(function(sender.arriving), expected)


def test_what_was_computed_from_it_is_there_before_it_can_be_changed() -> None:
    sender = Sender()
    more = sender.arriving + 1
    sender.arriving.zero_()
    assert torch.equal(more, sender.value + 1)


def test_a_plain_argument_that_was_changed_meanwhile_is_an_error() -> None:
    sender, latents = Sender(), noise(2, 3, 9, 5, seed=1)
    stepped = latents + sender.arriving
    latents.zero_()
    with pytest.raises(ConfigError, match="changed in place"):
        stepped.sum()


def test_the_gate_sees_a_function_that_is_not_pointwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "_POINTWISE", arriving._POINTWISE | {"flip"})
    sender = Sender()
    assert not torch.equal(sender.arriving.flip(2), sender.value.flip(2))
