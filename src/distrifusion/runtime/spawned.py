"""A loaded pipeline whose ranks are worker processes; the caller's side."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from distrifusion.errors import Cancelled, ConfigError, RankFailed
from distrifusion.runtime import call_checks, randomness
from distrifusion.runtime.operations import Call, CallResult, Component, Get, Invoke, Method, Same, Set
from distrifusion.runtime.pipeline import EndedRun, LoadedPipeline, tensor_inputs
from distrifusion.runtime.processes import Crew
from distrifusion.runtime.source import PipelineFacts
from distrifusion.runtime.stepping import Unchanged
from distrifusion.runtime.wire import (
    BarClosed,
    BarMoved,
    BarOpened,
    CallbackRaised,
    Generators,
    StepAnswer,
    StepEnded,
    pack,
    unpack,
)
from distrifusion.runtime.workers import RaisedAlike, Workers

# Methods that write files or publish: one rank does it for all.
_ONE_RANK = ("save_", "push_to_hub")


class SpawnedPipeline(LoadedPipeline):
    """The pipeline in worker processes: attributes are read from rank 0 and set on all ranks, methods run on all.

    A scheduler or config that is read is a copy. A component (`pipe.vae`) stays in the workers; its attributes and
    methods are reached through it.
    """

    def __init__(self, crew: Crew) -> None:
        super().__init__(crew.plan, crew.devices, crew.threads, rank=0)
        workers = Workers(crew)
        # What was changed since loading, in order, as (path, packed operation); a restart repeats it.
        own: dict[str, Any] = {"_workers": workers, "_changes": [], "_bar_config": {}}
        own["_finalizer"] = weakref.finalize(self, workers.close)
        self.__dict__.update(own)

    def start(self) -> None:
        """Start the workers if none run, and repeat what was changed before they were lost.

        Raises:
            RankFailed, StepTimeout: if a rank fails alone or loading passes its limit.
            Whatever opening the pipeline raises on every rank alike.
        """
        if self._workers.running:
            return
        self._workers.start()
        try:
            for _, payload in self._changes:
                self._workers.request([payload] * len(self.devices), self._workers.crew.start_timeout)
        except RaisedAlike as alike:
            self._workers.end()
            raise alike.failure.error() from alike.failure.cause()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers in rank order; empty while none run."""
        return self._workers.pids

    def set_progress_bar_config(self, **config: Any) -> None:
        """Keywords for the tqdm bar that is drawn in this process, as in diffusers."""
        self.__dict__["_bar_config"] = config

    def invoke(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the pipeline's method at `path` on every rank; returns rank 0's answer."""
        with self._turn(within_call=True):
            self.start()
            states = randomness.capture(self.devices[0], {}, torch.cuda.is_initialized())
            operation = Invoke(path, args, kwargs, states)
            (answer, _), *_ = self._ask(operation)
            if isinstance(answer, Same):
                owner = path.rpartition(".")[0]
                return self._get(owner) if owner else self
            return answer.value

    def _facts(self) -> PipelineFacts:
        if self._workers.facts is None:
            self.start()
        return self._workers.facts

    def _step(self) -> int | None:
        return self._workers.board.step_of(0)

    def _run(self, number: int, arguments: dict[str, Any], traced: bool, weighed: bool) -> EndedRun:
        self.start()
        self._workers.board.write(0, None)  # where a call before this one was left
        callback = arguments.get("callback_on_step_end")
        names = None if callback is None else tensor_inputs(arguments)
        sent = {name: value for name, value in arguments.items() if not name.startswith("callback_on_step_end")}
        with_cuda = torch.cuda.is_initialized() or sent.get("generator") is None
        call = Call(number, sent, randomness.capture(self.devices[0], {}, with_cuda), names, traced, weighed)
        watcher = _Watcher(self, self._workers, number, callback, self._bar_config, with_cuda)
        try:
            results: list[CallResult] = self._ask(call, watcher)
        except (CallbackRaised, RankFailed):
            if watcher.error is None:
                raise
            raise watcher.error from None
        except Cancelled as cancelled:
            raise cancelled from None
        finally:
            watcher.close_bar()
        assert results[0].times is not None
        ranks = [result.timeline for result in results if result.timeline is not None]
        memory = [result.memory for result in results if result.memory is not None]
        return EndedRun(results[0].output, results[0].times, ranks, memory)

    def _cancel(self, number: int) -> None:
        self._workers.board.cancel(number)

    def _get(self, path: str) -> Any:
        self.start()
        answer = self._ask(Get(path))[0]
        if isinstance(answer, Component):
            return RemoteComponent(self, path, answer.kind)
        return RemoteMethod(self, path) if isinstance(answer, Method) else answer.value

    def _set(self, path: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            raise ConfigError(f"{path} cannot be replaced by a {type(value).__name__} after loading; give it to load")
        self.start()
        self._ask(Set(path, value))

    def _end(self) -> None:
        self._finalizer()

    def _ask(self, operation: Any, watcher: _Watcher | None = None) -> list[Any]:
        """Answers of the ranks that an operation is for; random states that came back are taken over."""
        payload, generators = pack(operation, modules=isinstance(operation, Invoke))
        call_checks.check_generators(generators, self.devices[0])
        crew = self._workers.crew
        limit = crew.start_timeout if self._running is None else crew.step_timeout
        num_ranks = 1 if _for_one_rank(operation) else len(self.devices)
        if watcher is not None:
            watcher.generators = generators
        try:
            answers = self._workers.request([payload] * num_ranks, limit, watcher)
        except RaisedAlike as alike:
            # After an error of the callback this process is further than the ranks: the callback may have drawn.
            if watcher is None or watcher.error is None:
                self._take_over(operation, unpack(alike.failure.randomness, self.devices[0])[0], generators)
            raise alike.failure.error() from alike.failure.cause()
        if isinstance(operation, Call | Invoke):
            states = answers[0].randomness if isinstance(operation, Call) else answers[0][1]
            self._take_over(operation, states, generators)
        if self._running is None and _is_change(operation, answers[0]):
            self._remember(operation, payload)
        return answers

    def _take_over(self, operation: Any, states: randomness.Randomness, generators: Generators) -> None:
        """Put this process's streams and the caller's generators where the request left them."""
        if isinstance(operation, Call | Invoke):
            randomness.restore(states, self.devices[0], generators, with_cuda=operation.randomness.cuda is not None)

    def _remember(self, change: Set | Invoke, payload: bytes) -> None:
        """Note a change for a restart; a later setting of the same thing stands for the earlier ones."""
        if isinstance(change, Set) or change.path.rpartition(".")[2].startswith("set_"):
            self._changes[:] = [(path, old) for path, old in self._changes if path != change.path]
        self._changes.append((change.path, payload))

    def __dir__(self) -> Iterable[str]:
        facts = self._workers.facts
        return {*super().__dir__(), *(dir(facts.cls) if facts else ())}


class RemoteMethod:
    """A method of the pipeline; called, it runs on every rank."""

    def __init__(self, pipe: SpawnedPipeline, path: str) -> None:
        self._pipe = pipe
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipe.invoke(self._path, args, kwargs)

    def __repr__(self) -> str:
        return f"<method {self._path} of {self._pipe!r}>"


class RemoteComponent:
    """A module of the pipeline, which stays in the workers; attributes are read from rank 0 and set on all ranks."""

    def __init__(self, pipe: SpawnedPipeline, path: str, kind: str) -> None:
        self.__dict__.update(_pipe=pipe, _path=path, _kind=kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipe.invoke(self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with self._pipe._turn(within_call=True):
            return self._pipe._get(f"{self._path}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        with self._pipe._turn(within_call=True):
            self._pipe._set(f"{self._path}.{name}", value)

    def __repr__(self) -> str:
        return f"<{self._kind} '{self._path}' of {self._pipe!r}>"


class _Watcher:
    """The caller's side of a running call: draws its bar, and runs the callback that every rank waits for."""

    def __init__(
        self,
        pipe: SpawnedPipeline,
        workers: Workers,
        number: int,
        callback: Callable[..., Any] | None,
        bar_config: Mapping[str, Any],
        with_cuda: bool,
    ) -> None:
        self.error: Exception | None = None
        self.generators: Generators = {}
        self._with_cuda = with_cuda
        self._pipe = pipe
        self._workers = workers
        self._number = number
        self._callback = callback
        self._bar_config = bar_config
        self._bar: Any = None

    def __call__(self, event: Any, call: int) -> None:
        match event:
            case BarOpened(total):
                self.close_bar()
                self._bar = tqdm(**{"total": total, **self._bar_config})
            case BarMoved(steps) if self._bar is not None:
                self._bar.update(steps)
            case BarClosed():
                self.close_bar()
            case StepEnded(step, payload):
                answer = StepAnswer(call, self._answer(step, payload))
                board = self._workers.board
                if board.is_cancelled(self._number):
                    # Every rank waits for this answer, so all can leave at the end of this very step.
                    board.end_call(self._number, 0)
                self._workers.answer_step(answer)

    def close_bar(self) -> None:
        """Leave the bar as it stands; a second time does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _answer(self, step: int, payload: bytes) -> bytes | None:
        assert self._callback is not None
        device = self._pipe.devices[0]
        timestep, tensors, states = unpack(payload, device)[0]
        randomness.restore(states, device, self.generators, self._with_cuda)
        versions = {name: (tensor, tensor._version) for name, tensor in tensors.items() if tensor is not None}
        try:
            returned = self._callback(self._pipe, step, timestep, tensors)
            in_place, outputs = _changes(versions, returned)
            return pack((in_place, outputs, randomness.capture(device, self.generators, self._with_cuda)))[0]
        except Exception as error:
            # Every rank leaves the call, then it is raised to the caller.
            self.error = error
            return None


def _changes(given: Mapping[str, tuple[torch.Tensor, int]], returned: Any) -> tuple[dict[str, Any], Any]:
    """What a callback changed in place, and what it returned with `Unchanged` for tensors it gave back."""
    in_place = {name: tensor for name, (tensor, version) in given.items() if tensor._version != version}
    if not isinstance(returned, dict):
        return in_place, returned
    same = {name for name, value in returned.items() if name in given and value is given[name][0]}
    return in_place, {name: Unchanged if name in same else value for name, value in returned.items()}


def _is_change(operation: Any, answer: Any) -> bool:
    """True for a setting, and for a method that returned nothing or its own object: it was called for its effect."""
    if not isinstance(operation, Invoke) or _for_one_rank(operation):
        return isinstance(operation, Set)
    return isinstance(answer[0], Same) or answer[0].value is None


def _for_one_rank(operation: Any) -> bool:
    if isinstance(operation, Invoke):
        return operation.path.rpartition(".")[2].startswith(_ONE_RANK)
    return isinstance(operation, Get)
