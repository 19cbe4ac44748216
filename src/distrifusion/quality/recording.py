"""Pictures with everything that is compared: the latents of every step and the times."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.timeline import Timeline

# Entered around every call: the command line lets Ctrl-C cancel the call there.
Guard = Callable[[LoadedPipeline], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Recording:
    """One drawn picture.

    Attributes:
        latents: after every denoising step, each [B, C, H, W] in fp32; empty if the pipeline does not call back.
        seconds_per_step: mean over the steps after the first.
        seconds: of the whole call.
        timeline: what the ranks did, if it was asked for.
    """

    picture: Image.Image
    latents: tuple[np.ndarray, ...]
    seconds_per_step: float
    seconds: float
    timeline: Timeline | None = None


def record(
    pipe: LoadedPipeline,
    arguments: Mapping[str, Any],
    seed: int,
    label: str,
    calls_back: bool = True,
    guard: Guard = nullcontext,
    traced: bool = False,
) -> Recording:
    """Draw one picture from the noise of `seed` and keep the latents of every step.

    Args:
        arguments: of the pipeline's call, without generator and callback.
        label: what the progress bar says.
        calls_back: the pipeline's class takes `callback_on_step_end`.
        traced: also note what the ranks do.

    Raises:
        Whatever the call raises.
    """
    latents: list[np.ndarray] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # A copy: the scheduler may write the next step into the same memory.
        latents.append(tensors["latents"].detach().to("cpu", torch.float32, copy=True).numpy())
        return tensors

    pipe.set_progress_bar_config(desc=label, dynamic_ncols=True)
    callback = {"callback_on_step_end": keep} if calls_back else {}
    with guard(pipe), pipe.trace() if traced else nullcontext() as timeline:
        output = pipe(**arguments, **callback, generator=torch.Generator("cpu").manual_seed(seed))
    times = pipe.last_run
    assert times is not None
    return Recording(output.images[0], tuple(latents), times.seconds_per_step, times.total, timeline)


class Shelf:
    """Recordings in a folder, by run and seed, so that memory holds those of one seed at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, run: str, seed: int, recording: Recording) -> None:
        """Keep a recording."""
        stem = self._stem(run, seed)
        recording.picture.save(stem.with_suffix(".png"), compress_level=1)
        np.savez(stem.with_suffix(".npz"), *recording.latents)
        times = [recording.seconds_per_step, recording.seconds]
        stem.with_suffix(".json").write_text(json.dumps(times), encoding="utf-8")

    def get(self, run: str, seed: int) -> Recording:
        """A kept recording."""
        stem = self._stem(run, seed)
        with np.load(stem.with_suffix(".npz")) as arrays:
            latents = tuple(arrays[f"arr_{index}"] for index in range(len(arrays.files)))
        seconds_per_step, seconds = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        return Recording(self.picture(run, seed), latents, seconds_per_step, seconds)

    def picture(self, run: str, seed: int) -> Image.Image:
        """The picture of a kept recording alone."""
        with Image.open(self._stem(run, seed).with_suffix(".png")) as picture:
            return picture.convert("RGB")

    def _stem(self, run: str, seed: int) -> Path:
        return self._folder / f"{run}-{seed}"
