"""Noting when the ranks of a pipeline compute, post and wait; what is noted becomes a `Timeline`."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
from diffusers import DiffusionPipeline, MultiControlNetModel
from torch import nn

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.errors import ConfigError
from distrifusion.exchange.meeting import running_system
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.posted import tag_of
from distrifusion.exchange.traced import Mark, Noted, TracedTransport
from distrifusion.exchange.transport import Message, Transport
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment
from distrifusion.timeline import ALONE, DISPLACED, SYNCHRONOUS, Call, RankTimeline, Span, Timeline

T = TypeVar("T")
# What diffusers calls the models that are called at every step.
_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "controlnet")
_CLOCK_ROUNDS = 16
_CLOCK_TAG, _SIZE_TAG, _DATA_TAG = (tag_of(f"trace:{name}") for name in ("clock", "size", "data"))


@contextmanager
def trace(pipe: DiffusionPipeline) -> Iterator[Timeline]:
    """Note when every rank computes, posts and waits in the denoiser calls of a parallelized pipeline meanwhile.

    The timeline is there when the block has ended without an error: on rank 0 that of all ranks, on others their own.
    Times are the host's, on a GPU those of its current stream. Ranks of one machine read one clock; that of another
    machine is set by rank 0's to within half a message's round trip, which the timeline says.

    Args:
        pipe: in the hands of `parallelize`, or a plain pipeline, which is traced as one device.

    Raises:
        ConfigError: if the pipeline has no denoiser.

    Every rank calls it.
    """
    tracer = Tracer(pipe)
    timeline = Timeline(str(tracer.plan))
    with tracer:
        yield timeline
    timeline.add(tracer.collect())


class Clock(Protocol):
    """Marks moments, and says later when one was, in nanoseconds of this process's `time.perf_counter_ns`."""

    def now(self) -> Mark: ...

    def read(self, mark: Mark) -> int: ...


class HostClock:
    """The clock of this process; on Linux all processes of a machine read the same."""

    def now(self) -> int:
        return time.perf_counter_ns()

    def read(self, mark: int) -> int:
        return mark


class StreamClock:
    """When the work before a moment was done on the current CUDA stream; marking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._zero = self.now()
        self._zero_host = time.perf_counter_ns()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, mark: Any) -> int:
        mark.synchronize()
        return self._zero_host + round(self._zero.elapsed_time(mark) * 1e6)


@dataclass
class _OpenCall:
    """A call that is being noted."""

    model: str
    number: int
    start: Mark
    mode: str = ALONE
    end: Mark = None
    noted: list[Noted] = field(default_factory=list)


class Tracer:
    """Notes the denoiser calls of one rank's pipeline while it is entered; outside, nothing of it is in the way."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._models = _models(pipe)
        divisions = [division for model in self._models.values() if (division := ParallelDenoiser.dividing(model))]
        self.plan = divisions[0].plan if divisions else Plan()
        # One rank alone has nothing to exchange.
        self._exchanges = [division.exchange for division in divisions if self.plan.num_ranks > 1]
        self._device = pipe._execution_device
        self._clock = StreamClock(self._device) if self._device.type == "cuda" else HostClock()
        self._attachment = Attachment()
        self._transports: list[Transport] = []
        self._calls: list[_OpenCall] = []
        self._numbers: Counter[str] = Counter()
        self._open: list[_OpenCall] = []
        self._outside: list[Noted] = []

    def __enter__(self) -> Self:
        for name, model in self._models.items():
            self._attachment.replace(model, "forward", partial(partial, self._call, name))
        for exchange in self._exchanges:
            self._transports.append(exchange.transport)
            posting = partial(getattr, exchange, "posting")
            exchange.transport = TracedTransport(exchange.transport, posting, self._clock.now, self._note)
            self._attachment.replace(exchange, "begin", partial(partial, self._begin))
        return self

    def __exit__(self, *_: object) -> None:
        self._attachment.detach()
        for exchange, transport in zip(self._exchanges, self._transports, strict=True):
            exchange.transport = transport
        self._transports.clear()

    def timeline(self, ahead: int = 0, uncertainty: int = 0) -> RankTimeline:
        """What was noted.

        Args:
            ahead: nanoseconds by which rank 0's clock is ahead of this one's.
            uncertainty: of `ahead`.
        """

        def read(mark: Mark) -> int:
            return self._clock.read(mark) + ahead

        def spans(noted: list[Noted]) -> tuple[Span, ...]:
            return tuple(_span(item, read(item.start), read(item.end)) for item in noted)

        calls = tuple(Call(c.model, c.number, c.mode, read(c.start), read(c.end), spans(c.noted)) for c in self._calls)
        rank = self._exchanges[0].transport.rank if self._exchanges else 0
        return RankTimeline(rank, str(self._device), calls, spans(self._outside), uncertainty)

    def collect(self) -> list[RankTimeline]:
        """Everybody's on rank 0, one's own elsewhere. Every rank calls it."""
        if not self._exchanges:
            return [self.timeline()]
        transport = self._exchanges[0].transport
        difference = clock_difference(transport, self._device)
        same_machine = transport.broadcast(running_system()) == running_system()
        return gather(transport, self._device, self.timeline(*(0, 0) if same_machine else difference))

    def _call(self, model: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._numbers[model] += 1
        call = _OpenCall(model, self._numbers[model], self._clock.now())
        self._open.append(call)
        try:
            return forward(*args, **kwargs)
        finally:
            call.end = self._clock.now()
            self._open.pop()
            self._calls.append(call)

    def _begin(self, begin: Callable[[CallPolicy], None], policy: CallPolicy) -> None:
        self._open[-1].mode = DISPLACED if policy.stale or policy.late else SYNCHRONOUS
        begin(policy)

    def _note(self, noted: Noted) -> None:
        (self._open[-1].noted if self._open else self._outside).append(noted)


def _models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that are called at every step, by name."""
    found: dict[str, nn.Module] = {}
    for name in _DENOISERS:
        model = getattr(pipe, name, None)
        if isinstance(model, MultiControlNetModel):
            found |= {f"{name}.{i}": net for i, net in enumerate(model.nets)}
        elif isinstance(model, nn.Module):
            found[name] = model
    if not found:
        raise ConfigError(f"{type(pipe).__name__} has none of {', '.join(_DENOISERS)}, so there is nothing to trace")
    return found


def _span(noted: Noted, start: int, end: int) -> Span:
    layer, _, use = noted.name.removeprefix("parcel:").rpartition("#")
    layer += "" if use == "0" else f", use {int(use) + 1}"
    return Span(noted.what, noted.kind, layer, start, end, noted.peers, noted.sent, noted.received)


def clock_difference(
    transport: Transport, device: torch.device, now: Callable[[], int] = time.perf_counter_ns
) -> tuple[int, int]:
    """Nanoseconds by which rank 0's clock is ahead of this rank's, and by how much that may be wrong (Cristian 1989).

    Every rank calls it.
    """
    stamp = torch.zeros(1, dtype=torch.int64, device=device)
    if transport.rank == 0:
        for peer in range(1, transport.world_size):
            for _ in range(_CLOCK_ROUNDS):
                transport.post([], [Message(peer, stamp, _CLOCK_TAG)]).wait()
                stamp.item()  # on a GPU the message has come only now
                transport.post([Message(peer, stamp.fill_(now()), _CLOCK_TAG)], []).wait()
        return 0, 0
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        start = now()
        transport.post([Message(0, stamp, _CLOCK_TAG)], []).wait()
        transport.post([], [Message(0, stamp, _CLOCK_TAG)]).wait()
        theirs, end = stamp.item(), now()
        rounds.append((end - start, int(theirs) - (start + end) // 2))
    length, ahead = min(rounds)
    return ahead, length // 2


def gather(transport: Transport, device: torch.device, own: T) -> list[T]:
    """Everybody's value by rank on rank 0, one's own alone elsewhere. Every rank calls it."""
    if transport.rank != 0:
        data = torch.frombuffer(bytearray(pickle.dumps(own)), dtype=torch.uint8).to(device)
        size = torch.tensor([data.numel()], device=device)
        transport.post([Message(0, size, _SIZE_TAG)], []).wait()
        transport.post([Message(0, data, _DATA_TAG)], []).wait()
        return [own]
    values = [own]
    for peer in range(1, transport.world_size):
        size = torch.zeros(1, dtype=torch.int64, device=device)
        transport.post([], [Message(peer, size, _SIZE_TAG)]).wait()
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
        transport.post([], [Message(peer, data, _DATA_TAG)]).wait()
        values.append(pickle.loads(data.cpu().numpy().tobytes()))
    return values
