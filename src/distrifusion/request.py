"""One run of a parallelized pipeline: what all ranks agree on before it, and what each kind of call in it means."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.denoiser import OpenRequest, ParallelDenoiser
from distrifusion.division import Division
from distrifusion.errors import ConfigError, RankFailed, StepTimeout
from distrifusion.exchange.transport import Transport
from distrifusion.once import encode_once
from distrifusion.strategies.attach import Attachment

_CALLBACKS = ("callback_on_step_end", "callback")
_requests = itertools.count()


@dataclass
class Parallel:
    """What is put on a pipeline.

    Attributes:
        denoisers: its U-Net or transformers, then its ControlNets.
        coders: the halves of its autoencoders.
        pictures: who gets what a run decodes.
        now: how the ranks call the pipeline's encoders at this moment.
    """

    denoisers: tuple[ParallelDenoiser, ...]
    coders: tuple[ParallelCoder, ...]
    pictures: Calls
    now: Calls = Calls.ALONE

    @property
    def divisions(self) -> tuple[Division, ...]:
        """All models that are divided."""
        return (*self.denoisers, *self.coders)

    @property
    def transport(self) -> Transport:
        """The ranks."""
        return self.denoisers[0].exchange.transport

    @property
    def withheld(self) -> bool:
        """Whether a picture was decoded in this run that rank 0 alone has."""
        return any(coder.withheld for coder in self.coders)

    def encode(self, pipe: Any, work: Callable[[], Any]) -> Any:
        """What a method of the pipeline that encodes prompts gives: of rank 0 for all in a run, else of each rank."""
        if self.now is Calls.ALONE or self.transport.world_size == 1:
            return work()
        with self.calls(Calls.ALONE):  # such methods call each other
            return encode_once(self.transport, pipe._execution_device, work)

    @contextmanager
    def calls(self, how: Calls) -> Iterator[None]:
        """Say how the ranks call encoders and decoders within a block."""
        before, self.now = self.now, how
        with ExitStack() as stack:
            for coder in self.coders:
                stack.enter_context(coder.calls(how))
            try:
                yield
            finally:
                self.now = before


@contextmanager
def request(pipe: Any, parallel: Parallel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """One run of the pipeline: agreed random numbers, one request, the scheduler's steps counted."""
    denoisers = parallel.denoisers
    agree_on_randomness(parallel.transport, pipe._execution_device, _generators(args, kwargs))
    steps = Attachment()
    steps.replace(pipe.scheduler, "step", partial(_counted, parallel))
    number = next(_requests)
    # A callback may run another pipeline that shares the models: its request lies within this one.
    around = [denoiser.open(number) for denoiser in denoisers]
    withheld = [coder.withheld for coder in parallel.coders]
    for coder in parallel.coders:
        coder.withheld = False
    try:
        with parallel.calls(parallel.pictures):
            yield
    except BaseException:
        # What other ranks sent is taken in, so that no later run finds it; why that may fail is the error at hand.
        with suppress(RankFailed, StepTimeout):
            _close(denoisers, around)
        raise
    else:
        _close(denoisers, around)
    finally:
        steps.detach()
        for coder, before in zip(parallel.coders, withheld, strict=True):
            coder.withheld = before


def callbacks_alone(parallel: Parallel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with callbacks in which every rank decodes and encodes by itself: they may run on one only."""

    def alone(callback: Any) -> Any:
        # diffusers' own callback objects are known by their class, and decode nothing.
        if not callable(callback) or isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            return callback

        def call_alone(*args: Any, **options: Any) -> Any:
            with parallel.calls(Calls.ALONE):
                return callback(*args, **options)

        return call_alone

    return {name: alone(value) if name in _CALLBACKS else value for name, value in kwargs.items()}


def _close(denoisers: Sequence[ParallelDenoiser], around: list[OpenRequest]) -> None:
    for denoiser, before in zip(denoisers, around, strict=True):
        denoiser.close(before)


def _counted(parallel: Parallel, step: Callable[..., Any]) -> Callable[..., Any]:
    """A scheduler's step after which the denoisers' next calls are the first of their scheduler step again."""

    def step_and_reset(*args: Any, **kwargs: Any) -> Any:
        if parallel.withheld:
            raise ConfigError(
                "this pipeline goes on after it has decoded a picture, which only rank 0 has; parallelize it with "
                "pictures='all'"
            )
        for denoiser in parallel.denoisers:
            denoiser.slot = 0
        return step(*args, **kwargs)

    return step_and_reset


def _generators(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for value in (*args, *kwargs.values()):
        found += [g for g in (value if isinstance(value, list | tuple) else [value]) if isinstance(g, torch.Generator)]
    return found


def agree_on_randomness(transport: Transport, device: torch.device, generators: list[torch.Generator]) -> None:
    """Copy rank 0's random state to the other ranks: the global generators and those given. Every rank calls it."""
    if transport.world_size == 1:
        return
    accessors: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        accessors.append((lambda: torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device)))
    accessors += [(g.get_state, g.set_state) for g in generators]
    states = transport.broadcast([get() for get, _ in accessors])
    for (_, put), state in zip(accessors, states, strict=True):
        put(state)
