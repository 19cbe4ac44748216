"""Seconds of several things on one device, each run once in every turn: what else goes on falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_FEWEST, _MOST = 4, 200  # turns, the one that warms up among them


def in_turns(runs: Sequence[Callable[[], object]], device: torch.device, budget: float) -> list[float]:
    """Median seconds of each run after one that warms up.

    Args:
        runs: what is measured, in the order of a turn.
        device: where they run.
        budget: seconds after the first turn in which more turns begin; at least three are made.
    """
    times: list[list[float]] = [[] for _ in runs]
    end = None
    while len(times[0]) < _FEWEST or (time.perf_counter() < (end or 0.0) and len(times[0]) < _MOST):
        for run, seconds in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        end = end or time.perf_counter() + budget
    return [statistics.median(seconds[1:]) for seconds in times]
