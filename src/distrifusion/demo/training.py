"""The training loop of every stage: bf16 autocast, AdamW, Muon, warm-up and linear decay, EMA, checkpoints, a log."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distrifusion.demo.processes import average_over_ranks, num_ranks, rank


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and at which rate.

    It ends after ``steps`` steps or ``seconds`` seconds of training, whichever is given. The learning rate rises over
    ``warmup`` steps, stays, and falls linearly to 0 over the last ``decay`` share of the stage, so that a stage may be
    resumed with a new length for as long as it has not begun to decay.
    """

    learning_rate: float
    steps: int | None = None
    seconds: float | None = None
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    ema: float = 0.998
    log_every: int = 50
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"give steps or seconds, not both or neither: {self.steps=}, {self.seconds=}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the stage that is done, in [0, 1]."""
        done = step / self.steps if self.steps else seconds / (self.seconds or 1.0)
        return min(1.0, done)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, (1 - progress) / self.decay)


class TrainingLog:
    """Appends one JSON object a line to a file and prints it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **fields: object) -> None:
        """Add one line; floats are rounded to five digits."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        with self.file.open("a") as stream:
            stream.write(line + "\n")


def device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> AbstractContextManager[None]:
    """bf16 autocast on :func:`device`."""
    return torch.autocast(device().type, dtype=torch.bfloat16)


def fit(
    stage: str,
    model: nn.Module,
    loss_of_step: Callable[[int, np.random.Generator], tuple[Tensor, int]],
    schedule: Schedule,
    checkpoint: Path,
    log: TrainingLog,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """Train ``model`` in place and leave the moving average of its weights in it; all ranks must call it.

    ``loss_of_step(step, rng)`` draws a batch and returns its loss and the number of samples; ``rng`` is seeded by step
    and rank, so that a resumed run sees what an unbroken one would. Training goes on from ``checkpoint`` if the file is
    there; rank 0 rewrites it every ``schedule.checkpoint_seconds`` and at the end. ``matrices`` are the weights that
    Muon trains (Jordan et al. 2024; its steps are scaled to the size of AdamW's), AdamW trains the others.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(parameters, matrices, schedule)
    state = _State(model, optimizers, [p.detach().clone() for p in parameters])
    if checkpoint.exists():
        state.load(checkpoint)
    before, started, saved, losses = state.seconds, time.monotonic(), time.monotonic(), []
    while (progress := schedule.progress(state.step, state.seconds)) < 1:
        rate = schedule.rate(state.step, progress)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        loss, size = loss_of_step(state.step, np.random.default_rng((state.step, rank())))
        model.zero_grad(set_to_none=True)
        loss.backward()
        elapsed = before + time.monotonic() - started
        shared = torch.tensor([float(loss.detach()), elapsed, size], dtype=torch.float32, device=device())
        gradients = [p.grad for p in parameters if p.grad is not None]
        average_over_ranks([*gradients, shared])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state.advance(parameters, schedule.ema, round(float(shared[2]) * num_ranks()), float(shared[1]))
        losses.append(float(shared[0]))
        if state.step % schedule.log_every == 0 and rank() == 0:
            progressed = {"step": state.step, "samples": state.samples, "seconds": round(state.seconds)}
            log.write(stage=stage, **progressed, loss=sum(losses) / len(losses), learning_rate=rate)
            losses.clear()
        if time.monotonic() - saved > schedule.checkpoint_seconds:
            state.save(checkpoint)
            saved = time.monotonic()
    state.save(checkpoint)
    load_average(model, state.average)


def _optimizers(
    parameters: list[nn.Parameter], matrices: Sequence[nn.Parameter], schedule: Schedule
) -> list[torch.optim.Optimizer]:
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in parameters if id(weight) not in chosen]
    decay = schedule.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(list(matrices), weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@dataclass
class _State:
    """Everything that a checkpoint holds."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: list[Tensor]
    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def advance(self, parameters: list[nn.Parameter], ema: float, samples: int, seconds: float) -> None:
        """Count a step and move the averaged weights; the average forgets its beginning faster than ``ema``."""
        self.step, self.samples, self.seconds = self.step + 1, self.samples + samples, seconds
        weight = 1 - min(ema, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in parameters], weight)

    def save(self, file: Path) -> None:
        """Write the checkpoint, on rank 0 only; the old one stays until the new one is complete."""
        if rank() == 0:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            state = {"model": self.model.state_dict(), "optimizers": optimizers}
            counts = {"step": self.step, "samples": self.samples, "seconds": self.seconds}
            torch.save(state | {"average": self.average} | counts, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)

    def load(self, file: Path) -> None:
        """Take up a checkpoint."""
        state = torch.load(file, map_location=device(), weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step = state["average"], state["step"]
        self.samples, self.seconds = state["samples"], state["seconds"]


def load_average(model: nn.Module, average: list[Tensor]) -> None:
    """Copy the averaged weights of a checkpoint into the trainable parameters of ``model``."""
    with torch.no_grad():
        for parameter, mean in zip((p for p in model.parameters() if p.requires_grad), average, strict=True):
            parameter.copy_(mean)
