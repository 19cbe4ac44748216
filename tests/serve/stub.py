"""A pipeline without a model: a test says when it takes a step and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from PIL import Image

from distrifusion import Cancelled, Plan
from distrifusion.runtime.pipeline import EndedRun, LoadedPipeline
from distrifusion.runtime.source import PipelineFacts
from distrifusion.runtime.timing import RunTimes


class StubPipeline(LoadedPipeline):
    """A loaded pipeline whose picture is of one colour, the lower bits of its seed.

    Attributes:
        drawn: the prompts of all calls, in order.
        go: a call waits for it after every step; it is set at first.
        fails: raised by the next call, once.
    """

    def __init__(self) -> None:
        super().__init__(Plan.parse("cfg2"), (torch.device("cpu"),) * 2, 1, 0)
        own = {"drawn": [], "go": threading.Event(), "fails": None, "_at": None, "_stopped": set()}
        self.__dict__.update(own)
        self.go.set()

    def _facts(self) -> PipelineFacts:
        return PipelineFacts(diffusers.StableDiffusionXLPipeline, 8)

    def _step(self) -> int | None:
        return self._at

    def _run(self, number: int, arguments: dict[str, Any], traced: bool, weighed: bool) -> EndedRun:
        self.drawn.append(arguments["prompt"])
        steps = arguments["num_inference_steps"]
        for step in range(steps):
            self.__dict__["_at"] = step
            while not self.go.wait(0.01):
                self._leave_if_cancelled(number)
            self._leave_if_cancelled(number)
        self.__dict__["_at"] = None
        error, self.__dict__["fails"] = self.fails, None
        if error is not None:
            raise error
        generator = arguments["generator"]
        seeds = [g.initial_seed() for g in (generator if isinstance(generator, list) else [generator])]
        size = (arguments.get("width", 64), arguments.get("height", 64))
        pictures = [Image.new("RGB", size, (seed % 256, 0, 0)) for seed in seeds]
        times = RunTimes(tuple(0.5 * (step + 1) for step in range(steps)), 0.5 * steps)
        return EndedRun(_Output(pictures), times, [], [])

    def _leave_if_cancelled(self, number: int) -> None:
        if number in self._stopped:
            raise Cancelled("the call was cancelled", step=self._at)

    def _cancel(self, number: int) -> None:
        self._stopped.add(number)

    def _get(self, name: str) -> Any:
        raise AttributeError(name)

    def _set(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def _end(self) -> None:
        pass


class _Output(Mapping[str, Any]):
    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __getitem__(self, name: str) -> Any:
        return {"images": self.images}[name]

    def __iter__(self) -> Any:
        return iter(["images"])

    def __len__(self) -> int:
        return 1
