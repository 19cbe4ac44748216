"""One denoiser call on all ranks drawn over time, as SVG text for a page that needs nothing else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape

from distrifusion.timeline import COMPUTE, POST, WAIT, Call, Span, Timeline

_WIDTH = 720
_LEFT, _RIGHT, _TOP = 64, 16, 4
_BAR, _GAP, _AXIS, _LEGEND = 26, 6, 24, 22
_NICE = (1, 2, 5, 10)
# Waits that say what they are when the pointer is on them; all would make the page heavy.
_NUM_TITLED = 40
_KINDS = ("norm", "halo", "kv", "hidden", "flow", "sum", "part", "parcel", "exit")


def typical_call(timeline: Timeline, mode: str) -> list[Call]:
    """By rank, the call of a mode whose length is the median: of the model that takes the most time."""
    calls = timeline.calls(mode)
    seconds = defaultdict[str, float](float)
    for call in calls:
        seconds[call.model] += call.seconds
    model = max(seconds, key=lambda name: seconds[name])
    by_number = defaultdict[int, list[Call]](list)
    for call in calls:
        if call.model == model:
            by_number[call.number].append(call)
    ranked = sorted(by_number.values(), key=_length)
    return ranked[len(ranked) // 2]


def strip(calls: Sequence[Call]) -> str:
    """An SVG element: a bar for every rank, compute pale, waits in the colour of their kind, posts half as high.

    CSS classes: `compute`, and the kinds of values.
    """
    start, length = min(call.start for call in calls), _length(calls)
    scale = (_WIDTH - _LEFT - _RIGHT) / length
    bottom = _TOP + len(calls) * (_BAR + _GAP)
    height = bottom + _AXIS + _LEGEND

    def across(time: int) -> float:
        return _LEFT + (time - start) * scale

    parts = [f'<svg class="strip" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="one call on all ranks">']
    for tick, label in _ticks(length):
        x = _LEFT + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{label}</text>')
    spans = [[span for span in call.spans() if span.what != COMPUTE] for call in calls]
    waits = sorted((span for own in spans for span in own if span.what == WAIT), key=lambda span: -span.seconds)
    titled = set(waits[:_NUM_TITLED])
    for rank, (call, own) in enumerate(zip(calls, spans, strict=True)):
        y = _TOP + rank * (_BAR + _GAP)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + _BAR / 2 + 4:.1f}" text-anchor="end">rank {rank}</text>')
        x, end = across(call.start), across(call.end)
        parts.append(f'<rect class="compute" x="{x:.2f}" y="{y}" width="{end - x:.2f}" height="{_BAR}"/>')
        for kind in _kinds(own):
            boxes = "".join(_box(span, y, across) for span in own if span.kind == kind)
            parts.append(f'<path class="{escape(kind)}" d="{boxes}"/>')
        parts += [_title(span, y, across) for span in own if span in titled]
    parts += _legend(_kinds([span for own in spans for span in own]), height - 6)
    return "\n".join([*parts, "</svg>"])


def _length(calls: Sequence[Call]) -> int:
    """Nanoseconds from the first start to the last end."""
    return max(call.end for call in calls) - min(call.start for call in calls)


def _kinds(spans: Sequence[Span]) -> list[str]:
    """Kinds that are there, in the legend's order."""
    return [kind for kind in _KINDS if any(span.kind == kind for span in spans)]


def _box(span: Span, y: float, across: Callable[[int], float]) -> str:
    """A wait as high as the bar, a post half as high."""
    x, width = across(span.start), across(span.end) - across(span.start)
    height = _BAR / 2 if span.what == POST else _BAR
    return f"M{x:.2f} {y + _BAR:.0f}h{width:.3f}v-{height:.0f}h-{width:.3f}z"


def _title(span: Span, y: float, across: Callable[[int], float]) -> str:
    text = f"{span.what} {1e3 * span.seconds:.2f} ms: {span.kind}, {span.layer}"
    x, width = across(span.start), across(span.end) - across(span.start)
    box = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}"'
    return f'<rect class="pointed" {box}><title>{escape(text)}</title></rect>'


def _ticks(length: int) -> list[tuple[float, str]]:
    """Round times from 0 to a length in nanoseconds, as offsets and labels in milliseconds."""
    power = 10 ** math.floor(math.log10(length / 6))
    step = next(n * power for n in _NICE if n * power * 8 >= length)
    count = int(length // step)
    return [(i * step, f"{i * step / 1e6:g}" + (" ms" if i == count else "")) for i in range(count + 1)]


def _legend(kinds: Sequence[str], y: float) -> list[str]:
    parts, x = [], float(_LEFT)
    for kind in (COMPUTE, *kinds):
        word = kind if kind == COMPUTE else f"wait for {kind}"
        parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y - 9}" width="10" height="10"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="{y}">{word}</text>')
        x += 32 + 6.4 * len(word)
    return parts
