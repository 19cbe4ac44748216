"""What a sampler asks for and what it gives, and the two ways to serve it: alone, or several in one denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Evaluations:
    """Denoiser evaluations that can run at the same time. Legend: R rows, B pictures.

    Attributes:
        x: what the denoiser reads, scaled as it wants it: [R, B, ...].
        timesteps: one per row, as the denoiser takes them: [R].
        estimate: the final sample as far as it is known now: [B, ...].
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    estimate: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """What a sampler ends with.

    Attributes:
        x: the sample: [B, ...].
        trajectory: all states from noise to sample [N + 1, B, ...] for N steps; None where they are not kept.
        calls: denoiser calls.
        rows: evaluations of one picture's states in them, pictures counted once.
    """

    x: torch.Tensor
    trajectory: torch.Tensor | None
    calls: int
    rows: int


# Yields what it needs, is sent the denoiser's outputs [R, B, ...] for it, and returns the sample.
Sampler = Generator[Evaluations, torch.Tensor, Sample]


def drive(sampler: Sampler, denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Sample:
    """Serve one sampler to its end.

    Args:
        sampler: not begun yet.
        denoise: the denoiser's outputs [R, B, ...] for x [R, B, ...] and timesteps [R].
    """
    return drive_together([sampler], lambda x, timesteps, owners: denoise(x, timesteps))[0]


def drive_together(
    samplers: Sequence[Sampler], denoise: Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
) -> list[Sample]:
    """Serve several samplers, the rows of all that still need some in one denoiser call, until all have ended.

    Args:
        samplers: not begun yet; they may have different steps and windows, their pictures have one shape.
        denoise: as for `drive`; the third argument says to which sampler, by its place, each row belongs.
    """
    wanted = {number: next(sampler) for number, sampler in enumerate(samplers)}
    ended: dict[int, Sample] = {}
    while wanted:
        counts = [len(evaluations.timesteps) for evaluations in wanted.values()]
        owners = [number for number, count in zip(wanted, counts, strict=True) for _ in range(count)]
        x = torch.cat([evaluations.x for evaluations in wanted.values()])
        timesteps = torch.cat([evaluations.timesteps for evaluations in wanted.values()])
        answers = denoise(x, timesteps, owners).split(counts)
        for number, answer in zip(tuple(wanted), answers, strict=True):
            try:
                wanted[number] = samplers[number].send(answer)
            except StopIteration as stop:
                ended[number] = stop.value
                del wanted[number]
    return [ended[number] for number in range(len(samplers))]
