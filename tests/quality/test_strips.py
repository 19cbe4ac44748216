"""One denoiser call drawn over time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from distrifusion.quality.strips import strip, typical_call
from distrifusion.timeline import POST, SYNCHRONOUS, WAIT, Call, RankTimeline, Span, Timeline

MS = 1_000_000


def call(number: int, start: int, length: int, *exchanges: Span) -> Call:
    """A synchronous call of the U-Net; times in milliseconds."""
    return Call("unet", number, SYNCHRONOUS, start * MS, (start + length) * MS, exchanges)


def test_the_typical_call_is_the_one_of_median_length_not_the_first() -> None:
    lengths = [900, 30, 10, 20]
    calls = tuple(call(i + 1, 1000 * i, length) for i, length in enumerate(lengths))
    later = tuple(call(i + 1, 1000 * i, length + 1) for i, length in enumerate(lengths))
    timeline = Timeline("patch2", [RankTimeline(0, "cpu", calls), RankTimeline(1, "cpu", later)])
    assert [(c.number, c.seconds) for c in typical_call(timeline, SYNCHRONOUS)] == [(4, 0.020), (4, 0.021)]


def test_bars_are_to_scale_and_long_waits_say_what_they_are() -> None:
    wait = Span(WAIT, "norm", "a <b> layer", 50 * MS, 75 * MS, (1,), 8, 8)
    post = Span(POST, "halo", "conv", 10 * MS, 20 * MS, (1,), 8, 8)
    svg = strip([call(2, 0, 100, post, wait), call(2, 0, 50)])
    root = ElementTree.fromstring(svg)
    bars = [float(bar.get("width", "")) for bar in root.iter("rect") if bar.get("class") == "compute"]
    assert bars[0] == 640 and bars[1] == 320  # and the legend's
    paths = {path.get("class"): path.get("d", "") for path in root.iter("path")}
    assert paths.keys() == {"norm", "halo"}
    # The wait takes a quarter of the call at the bar's height, the post a tenth at half of it.
    assert re.fullmatch(r"M384\.00 30h160\.000v-26h-160\.000z", paths["norm"])
    assert re.fullmatch(r"M128\.00 30h64\.000v-13h-64\.000z", paths["halo"])
    assert [title.text for title in root.iter("title")] == ["wait 25.00 ms: norm, a <b> layer"]
    words = [text.text for text in root.iter("text")]
    assert words[:2] == ["0", "20"] and {"100 ms", "rank 0", "rank 1", "wait for norm"} <= set(words)


@pytest.mark.parametrize(("length", "last"), [(1, "1 ms"), (7, "7 ms"), (350, "350 ms"), (61_000, "60000 ms")])
def test_times_below_the_bars_are_round(length: int, last: str) -> None:
    words = [text.text for text in ElementTree.fromstring(strip([call(1, 0, length)])).iter("text")]
    assert last in words and 4 <= len(words) <= 13
