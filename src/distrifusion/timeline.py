"""When every rank computed, posted and waited in its denoiser calls: spans, their sums, and a Chrome trace of them."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distrifusion.errors import ConfigError

COMPUTE, WAIT, POST = "compute", "wait", "post"
# What a call exchanged: nothing (one device), this call's values, or for some kinds those of the last call.
ALONE, SYNCHRONOUS, DISPLACED = "one device", "synchronous", "displaced"
_ENDINGS = (".json", ".json.gz")
_NUM_LONGEST = 10


class Span(NamedTuple):
    """A part of a denoiser call.

    Attributes:
        what: COMPUTE, WAIT or POST.
        kind: of the values that are posted or waited for: "kv", "halo", "norm", "parcel" (halos and norm statistics
            of up to sixteen layers in one message), "hidden" (hidden states between components), "flow" (streams
            between stages), "sum" and "part" (outputs of layers whose weights are divided) or "exit" (the prediction,
            and levels that are too coarse to cut); empty for COMPUTE.
        layer: that asked for them; empty for COMPUTE.
        start, end: in nanoseconds, by the clock that all ranks share.
        peers: ranks that the values went to or came from.
        sent, received: bytes of the messages.
    """

    what: str
    kind: str
    layer: str
    start: int
    end: int
    peers: tuple[int, ...] = ()
    sent: int = 0
    received: int = 0

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end - self.start) / 1e9


@dataclass(frozen=True)
class Call:
    """One denoiser call on one rank.

    Attributes:
        model: "unet", or the ControlNet's place.
        number: of the call among those of its model in one run, from 1.
        mode: ALONE, SYNCHRONOUS or DISPLACED.
        start, end: in nanoseconds, by the clock that all ranks share.
        exchanges: posts and waits, in their order.
    """

    model: str
    number: int
    mode: str
    start: int
    end: int
    exchanges: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end - self.start) / 1e9

    def spans(self) -> Iterator[Span]:
        """The whole call without a gap: what is neither a post nor a wait is compute."""
        at = self.start
        for span in self.exchanges:
            if span.start > at:
                yield Span(COMPUTE, "", "", at, span.start)
            yield span
            at = span.end
        if self.end > at:
            yield Span(COMPUTE, "", "", at, self.end)


@dataclass(frozen=True)
class RankTimeline:
    """What one rank did.

    Attributes:
        outside: exchanges outside of calls: the last posts of a run, which are waited for at its end.
        uncertainty: nanoseconds by which its clock may differ from rank 0's; 0 on one machine.
    """

    rank: int
    device: str
    calls: tuple[Call, ...]
    outside: tuple[Span, ...] = ()
    uncertainty: int = 0


@dataclass(frozen=True)
class Share:
    """What some kind of span took of the calls; means per call and rank.

    Attributes:
        share: of the calls' time, 0 to 1.
        seconds: per call.
        count: spans per call.
        sent: bytes per call.
    """

    what: str
    kind: str
    share: float
    seconds: float
    count: float
    sent: float


@dataclass(frozen=True)
class LongWait:
    """A layer that is waited for; seconds are means per call and rank, `longest` is of a single wait."""

    kind: str
    layer: str
    seconds: float
    longest: float


@dataclass
class Timeline:
    """What every rank did, in rank order; empty until something was drawn."""

    plan: str
    ranks: list[RankTimeline] = field(default_factory=list)

    def add(self, parts: Sequence[RankTimeline]) -> None:
        """Append what the ranks did after what is here."""
        self.ranks = [_joined(*pair) for pair in zip(self.ranks, parts, strict=True)] if self.ranks else list(parts)

    def modes(self) -> list[str]:
        """Modes that calls were in, in the order in which they appear."""
        return list(dict.fromkeys(call.mode for rank in self.ranks for call in rank.calls))

    def calls(self, mode: str) -> list[Call]:
        """All ranks' calls of a mode, without the first of a run, which carries one-time costs, if there are others."""
        found = [call for rank in self.ranks for call in rank.calls if call.mode == mode]
        later = [call for call in found if call.number > 1]
        return later or found

    def text(self) -> str:
        """A line for every mode: what compute, wait and post took."""
        lines = []
        for mode in self.modes():
            calls = self.calls(mode)
            found = shares(calls)
            total = {what: 100 * sum(s.share for s in found if s.what == what) for what in (COMPUTE, WAIT, POST)}
            parts = ", ".join(f"{what} {share:.1f} %" for what, share in total.items())
            lines.append(f"{mode} calls: {sum(s.seconds for s in found):.3g} s on average, {parts}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """What compute, posts and waits took, and the layers that are waited for most, by mode, for JSON."""
        found = {}
        for mode in self.modes():
            calls = self.calls(mode)
            found[mode] = {
                "shares": [asdict(share) for share in shares(calls)],
                "longest_waits": [asdict(wait) for wait in longest_waits(calls, _NUM_LONGEST)],
            }
        return {"calls": found}

    def chrome(self) -> dict[str, Any]:
        """The trace in Chrome's format (Trace Event Format), a process for each rank, times in microseconds."""
        zero = min((call.start for rank in self.ranks for call in rank.calls), default=0)
        events = [event for rank in self.ranks for event in _events(rank, zero)]
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"plan": self.plan}}

    def write(self, path: Path | str) -> None:
        """Write the Chrome trace, which chrome://tracing and ui.perfetto.dev open.

        Raises:
            ConfigError: if the path cannot be that of a trace.
        """
        path = check_trace_path(Path(path))
        data = json.dumps(self.chrome(), separators=(",", ":")).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def shares(calls: Sequence[Call]) -> list[Share]:
    """What each kind of span took of the calls: compute first, then the rest from the largest."""
    groups = _grouped(calls, lambda span: (span.what, span.kind))
    total, n = sum(call.seconds for call in calls), len(calls)
    found = []
    for (what, kind), spans in groups.items():
        seconds = sum(span.seconds for span in spans)
        sent = sum(span.sent for span in spans) if what == POST else 0
        found.append(Share(what, kind, seconds / total, seconds / n, len(spans) / n, sent / n))
    return sorted(found, key=lambda share: (share.what != COMPUTE, -share.share))


def longest_waits(calls: Sequence[Call], count: int) -> list[LongWait]:
    """The layers that are waited for most."""
    groups = _grouped(calls, lambda span: (span.kind, span.layer) if span.what == WAIT else None)
    found = [
        LongWait(*key, sum(span.seconds for span in spans) / len(calls), max(span.seconds for span in spans))
        for key, spans in groups.items()
    ]
    return sorted(found, key=lambda wait: -wait.seconds)[:count]


def _grouped(calls: Iterable[Call], key: Callable[[Span], tuple[str, str] | None]) -> dict[tuple[str, str], list[Span]]:
    groups = defaultdict[tuple[str, str], list[Span]](list)
    for span in (span for call in calls for span in call.spans()):
        if (name := key(span)) is not None:
            groups[name].append(span)
    return groups


def check_trace_path(path: Path) -> Path:
    """The path of a trace to be written.

    Raises:
        ConfigError: if it has another ending, is a folder, or lies in a folder that is not there or cannot be written.
    """
    if not path.name.endswith(_ENDINGS):
        raise ConfigError(f"trace '{path}' does not end in {' or '.join(_ENDINGS)}, which trace viewers read")
    if path.is_dir():
        raise ConfigError(f"trace '{path}' is a folder; name a file in it, such as {path / 'trace.json'}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder '{path.parent}' for the trace '{path.name}'; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"trace '{path}' cannot be written; choose another place")
    return path


def _joined(before: RankTimeline, after: RankTimeline) -> RankTimeline:
    calls, outside = (*before.calls, *after.calls), (*before.outside, *after.outside)
    return RankTimeline(after.rank, after.device, calls, outside, max(before.uncertainty, after.uncertainty))


def _events(rank: RankTimeline, zero: int) -> Iterator[dict[str, Any]]:
    title = f"rank {rank.rank}, {rank.device}"
    if rank.uncertainty:
        title += f", clock within {rank.uncertainty / 1e3:.0f} us of rank 0"
    yield {"ph": "M", "name": "process_name", "pid": rank.rank, "args": {"name": title}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank.rank, "args": {"sort_index": rank.rank}}
    yield {"ph": "M", "name": "thread_name", "pid": rank.rank, "tid": 0, "args": {"name": "denoiser"}}
    for call in rank.calls:
        name = f"{call.model} call {call.number}, {call.mode}"
        yield _event(name, "call", rank.rank, call.start - zero, call.end - call.start, {})
        for span in call.spans():
            yield _span_event(span, rank.rank, zero)
    for span in rank.outside:
        yield _span_event(span, rank.rank, zero)


def _span_event(span: Span, rank: int, zero: int) -> dict[str, Any]:
    if span.what == COMPUTE:
        return _event(COMPUTE, COMPUTE, rank, span.start - zero, span.end - span.start, {})
    details = {"layer": span.layer, "peers": list(span.peers), "sent": span.sent, "received": span.received}
    return _event(f"{span.what} {span.kind}", span.what, rank, span.start - zero, span.end - span.start, details)


def _event(name: str, category: str, rank: int, start: int, length: int, details: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": start / 1e3, "dur": length / 1e3}
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": 0, **times, "args": details}
