"""Line charts as SVG text, for a page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 46
_NICE = (1, 2, 2.5, 5, 10)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        values: y at x = first, first + 1 and so on; what the axis cannot show (infinite; 0 on a logarithm) is a gap.
        style: CSS class of the page: `thin`, `bold` or `dashed`.
        title: shown when the pointer is on the line.
        label: written above the line's end.
    """

    values: Sequence[float]
    style: str
    title: str
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line at some x with a word beside it."""

    x: float
    text: str


def chart(
    lines: Sequence[Line], x_title: str, y_title: str, *, first: int = 1, log: bool = False, marks: Sequence[Mark] = ()
) -> str:
    """An SVG element, or an empty text if no value can be drawn."""
    drawable = [y for line in lines for y in line.values if math.isfinite(y) and (y > 0 or not log)]
    if not drawable:
        return ""
    axis = _log_axis(drawable) if log else _linear_axis(drawable)
    last = first + max(len(line.values) for line in lines) - 1

    def across(x: float) -> float:
        return _LEFT + (x - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - axis.share(y) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">']
    for y in axis.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{axis.text(y)}</text>')
    for tick in _whole_ticks(first, last):
        parts.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    for mark in marks:
        x = across(mark.x)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        anchor, shift = ("start", 5) if x < _WIDTH / 2 else ("end", -5)
        parts.append(f'<text x="{x + shift:.1f}" y="{_TOP + 12}" text-anchor="{anchor}">{escape(mark.text)}</text>')
    for line in lines:
        for piece in _pieces(line.values, log):
            points = " ".join(f"{across(first + i):.1f},{up(y):.1f}" for i, y in piece)
            title = f"<title>{escape(line.title)}</title>"
            parts.append(f'<polyline class="{line.style}" points="{points}">{title}</polyline>')
        if line.label and (pieces := _pieces(line.values, log)):
            last_y = up(pieces[-1][-1][1]) - 6
            parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{last_y:.1f}" text-anchor="end">{escape(line.label)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    turned = f'transform="rotate(-90 14 {(_HEIGHT - _BOTTOM + _TOP) / 2})"'
    parts.append(
        f'<text x="14" y="{(_HEIGHT - _BOTTOM + _TOP) / 2}" text-anchor="middle" {turned}>{escape(y_title)}</text>'
    )
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool

    def share(self, y: float) -> float:
        """Where a value is between the ends, 0 to 1."""
        low, high, at = (math.log10(v) for v in (self.low, self.high, y)) if self.log else (self.low, self.high, y)
        return (at - low) / (high - low)

    def text(self, y: float) -> str:
        """A tick for a reader."""
        power = round(math.log10(y)) if self.log else 0
        return f"10{str(power).translate(_SUPERSCRIPT)}" if power else f"{y:g}"


def _linear_axis(values: Sequence[float]) -> _Axis:
    """From 0, or from a nice number below if all values are far from it."""
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < high / 2 or low == high >= 0 else low
    high = high if high > low else low + 1
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(n * power for n in _NICE if n * power * 6 >= high - low)
    start, stop = math.floor(low / step), math.ceil(high / step)
    return _Axis(start * step, stop * step, tuple(i * step for i in range(start, stop + 1)), log=False)


def _log_axis(values: Sequence[float]) -> _Axis:
    """From a power of ten to a power of ten, with at most about eight ticks."""
    start, stop = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    stop = max(stop, start + 1)
    every = math.ceil((stop - start) / 8)
    return _Axis(10.0**start, 10.0**stop, tuple(10.0**i for i in range(start, stop + 1, every)), log=True)


def _whole_ticks(first: int, last: int) -> list[int]:
    step = next(n for power in range(9) for n in (10**power, 2 * 10**power, 5 * 10**power) if (last - first) / n <= 10)
    return [x for x in range(first, last + 1) if x % step == 0]


def _pieces(values: Sequence[float], log: bool) -> list[list[tuple[int, float]]]:
    """Runs of values that can be drawn, each with its index."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for index, y in enumerate(values):
        if math.isfinite(y) and (y > 0 or not log):
            pieces[-1].append((index, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
