"""What `load` returns: called like the diffusers pipeline, wherever its ranks are."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from distrifusion.errors import ConfigError
from distrifusion.memory.use import MemoryUse
from distrifusion.plan import Plan
from distrifusion.runtime import call_checks
from distrifusion.runtime.source import PipelineFacts
from distrifusion.runtime.timing import RunTimes
from distrifusion.timeline import RankTimeline, Timeline

_REFUSED = {
    "from_pipe": "give load a function that builds the pipeline you want",
    "from_pretrained": "call load for another pipeline",
    "from_single_file": "give load a function that calls it",
    "enable_model_cpu_offload": "the ranks hold their part on their devices; leave it out",
    "enable_sequential_cpu_offload": "the ranks hold their part on their devices; leave it out",
    "enable_group_offload": "the ranks hold their part on their devices; leave it out",
    "to": "load(devices=...) places the pipeline, and load(torch_dtype=...) says its dtype",
    "cuda": "load(devices=...) places the pipeline",
    "cpu": "load(devices=...) places the pipeline",
}


@dataclass(frozen=True)
class EndedRun:
    """What a call gave.

    Attributes:
        ranks: what the ranks did in it; empty if it was not traced.
        memory: what the ranks took in it; empty if it was not weighed.
    """

    output: Any
    times: RunTimes
    ranks: list[RankTimeline]
    memory: list[MemoryUse]


class LoadedPipeline(ABC):
    """A diffusers pipeline on all its devices.

    It is called like the pipeline; every other attribute and method of the pipeline is reached by its name. Calls of
    several threads are served one after the other. Under torchrun every rank makes the same calls; otherwise there is
    one caller, whatever the number of devices.

    Attributes:
        plan: what is divided, and how.
        devices: one per rank.
        threads: CPU threads of every rank, None if the process keeps its own setting.
        rank: of this process among the callers; 0 except under torchrun.
        last_run: times of the last call that ended, None before.
    """

    plan: Plan
    devices: tuple[torch.device, ...]
    threads: int | None
    rank: int
    last_run: RunTimes | None

    def __init__(self, plan: Plan, devices: tuple[torch.device, ...], threads: int | None, rank: int) -> None:
        own = {"plan": plan, "devices": devices, "threads": threads, "rank": rank, "last_run": None}
        # Calls are counted from 1; `_running` is the number of the one that is being served.
        own |= {"_lock": threading.RLock(), "_num_calls": 0, "_running": None, "_closed": False}
        own |= {"_timeline": None, "_weighed": None}
        self.__dict__.update(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw, with the arguments of the diffusers pipeline and its output.

        `callback_on_step_end` runs in the caller's process; what it changes holds on every rank. `sampler=` and its
        choices (`engine/words.py`) are taken besides: many steps are then solved in each denoiser call.

        Raises:
            ConfigError: if an argument is unknown or cannot work; the nearest that works is named.
            Cancelled: if `cancel` was called meanwhile.
            OutOfMemory: if a device has not enough; the ranks are started anew by the next call, as after
            RankFailed, StepTimeout: if a rank fails alone or stands still.
            Whatever the pipeline itself raises on every rank alike.
        """
        with self._turn():
            number = self._num_calls + 1
            self.__dict__.update(_num_calls=number, _running=number)
            try:
                facts = self._facts()
                arguments = call_checks.bind(facts, args, kwargs)
                call_checks.check(facts, arguments, self.plan)
                asked = {"traced": self._timeline is not None, "weighed": self._weighed is not None}
                ended = self._run(number, arguments, **asked)
            finally:
                self.__dict__["_running"] = None
            self.__dict__["last_run"] = ended.times
            if self._timeline is not None:
                self._timeline.add(ended.ranks)
            if self._weighed is not None:
                self._weighed[:] = ended.memory
            return ended.output

    @contextmanager
    def trace(self) -> Iterator[Timeline]:
        """Note when every rank computes, posts and waits in the denoiser calls of what is drawn meanwhile.

        The timeline grows with every call that ends without an error. Under torchrun it has all ranks on rank 0, the
        own one elsewhere.

        Raises:
            ConfigError: if the pipeline is traced already, or, by its call, if it has no denoiser.

        Under torchrun every rank calls it.
        """
        with self._turn():
            if self._timeline is not None:
                raise ConfigError("this pipeline is traced already; use the timeline of that block")
            timeline = self.__dict__["_timeline"] = Timeline(str(self.plan))
        try:
            yield timeline
        finally:
            self.__dict__["_timeline"] = None

    @contextmanager
    def weigh(self) -> Iterator[list[MemoryUse]]:
        """Measure what every rank takes of memory in what is drawn meanwhile.

        The list holds an entry for every rank, of the last call that ended without an error. A rank begins by giving
        back what it holds unused, before the time of the call counts. Under torchrun the list has the own rank's.

        Raises:
            ConfigError: if the pipeline is weighed already.

        Under torchrun every rank calls it.
        """
        with self._turn():
            if self._weighed is not None:
                raise ConfigError("this pipeline is weighed already; use the list of that block")
            found: list[MemoryUse] = []
            self.__dict__["_weighed"] = found
        try:
            yield found
        finally:
            self.__dict__["_weighed"] = None

    def cancel(self) -> None:
        """End the call that is being served: it raises `Cancelled`, and the pipeline is ready for the next call.

        It may be called from another thread, from a callback or from a signal handler, and returns at once. All ranks
        leave after the same denoising step, at the latest the one after that in which they hear of it. If no step
        follows at which they could leave (the picture is being decoded), the call ends as if nothing was said; if no
        call is being served, nothing happens. Under torchrun one rank calls it for all.
        """
        number = self._running
        if number is not None:
            self._cancel(number)

    @property
    def current_step(self) -> int | None:
        """The denoising step (from 0) that the running call is in; None outside of a loop, and where no call runs.

        It costs the ranks nothing, and may be asked from another thread as often as one likes.
        """
        return None if self._running is None or self._closed else self._step()

    def check(self, **arguments: Any) -> None:
        """Check the arguments of a call without making it, also while another thread's call is served.

        Raises:
            ConfigError, PlanError: as the call itself would, before any rank begins.
        """
        facts = self._facts()
        call_checks.check(facts, call_checks.bind(facts, (), arguments), self.plan)

    def close(self) -> None:
        """End what `load` started; a second close does nothing."""
        with self._lock:
            if self._running is not None:
                raise ConfigError("a callback cannot close the pipeline that is calling it; cancel() ends the call")
            if not self._closed:
                self.__dict__["_closed"] = True
                self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"plan '{self.plan}' on {', '.join(map(str, self.devices))}"
        return f"<{type(self).__name__}: {state}>"

    def __getattr__(self, name: str) -> Any:
        # Only names that are not found here; those of Python's and IPython's protocols are not the pipeline's.
        if name.startswith(("__", "_repr_", "_ipython_")) or name in LoadedPipeline.__annotations__:
            raise AttributeError(name)
        if name in _REFUSED:
            return _Refused(name)
        with self._turn(within_call=True):
            return self._get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LoadedPipeline.__annotations__:
            raise AttributeError(f"{name} is chosen by load and cannot be set")
        with self._turn(within_call=True):
            self._set(name, value)

    @contextmanager
    def _turn(self, within_call: bool = False) -> Iterator[None]:
        """One caller at a time; a callback may look at the pipeline that called it, but not call it again."""
        with self._lock:
            if self._closed:
                raise ConfigError("this pipeline is closed; load it again")
            if self._running is not None and not within_call:
                raise ConfigError("a callback cannot call the pipeline that is calling it")
            yield

    @abstractmethod
    def _facts(self) -> PipelineFacts: ...

    @abstractmethod
    def _step(self) -> int | None: ...

    @abstractmethod
    def _run(self, number: int, arguments: dict[str, Any], traced: bool, weighed: bool) -> EndedRun: ...

    @abstractmethod
    def _cancel(self, number: int) -> None: ...

    @abstractmethod
    def _get(self, name: str) -> Any: ...

    @abstractmethod
    def _set(self, name: str, value: Any) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class _Refused:
    """Stands for a method that a loaded pipeline does not have; asking whether it exists is no error."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(f"{self.name} cannot be used on a loaded pipeline: {_REFUSED[self.name]}")


def tensor_inputs(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that the caller's `callback_on_step_end` gets, as diffusers finds them."""
    callback = arguments["callback_on_step_end"]
    if hasattr(callback, "tensor_inputs"):
        return tuple(callback.tensor_inputs)
    return tuple(arguments.get("callback_on_step_end_tensor_inputs", ("latents",)))
