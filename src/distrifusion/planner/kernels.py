"""How fast one rank of this machine computes: kernels by kind, then made to agree with calls of a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F

from distrifusion.doctor.machine import cpu_model
from distrifusion.memory.free import node_memory
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.operations import Counting, LayerKind, Operations
from distrifusion.planner.rank_calls import MeasuredCalls, measured_calls
from distrifusion.planner.speeds import Speed
from distrifusion.planner.turns import in_turns
from distrifusion.runtime.surroundings import num_cores

_BUDGET = 0.25  # seconds for each kind of kernel
_NOTHING = 1e-12  # of errors that differ by rounding


def measure_speed(blueprint: Blueprint, device: torch.device, threads: int) -> Speed:
    """Rates by kind of layer on kernels alone, then made to agree with whole calls of the denoiser, random weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if device.type == "cpu" else before)
    try:
        # Not inference mode, in which composite kernels are not seen as what they are made of.
        with torch.no_grad():
            # First: what large tensors leave behind in the allocator makes calls faster than those of ranks are.
            calls = measured_calls(blueprint, device)
            rates, bandwidth, launch = _kernels(device, blueprint.dtype)
            memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else node_memory().total
            places = max(1, num_cores() // threads) if device.type == "cpu" else 0
            speed = Speed(
                name_of(device), rates, bandwidth, layer=launch, launch=launch, post=0.0, hand=0.0, divided=1.0,
                convolved=1.0, host=0.0, places=places, memory=memory, source="measured here",
            )  # fmt: skip
            return _agreeing(speed, calls) if calls.whole else speed
    finally:
        torch.set_num_threads(before)


def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[dict[LayerKind, float], float, float]:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    size = 1 if device.type == "cpu" else 4
    x, kernel = noise(1, 128 * size, 64, 64), noise(128 * size, 128 * size, 3, 3)
    rows, matrix = noise(1024 * size, 512 * size), noise(512 * size, 512 * size)
    heads = noise(1, 4 * size, 1024, 64)
    runs: dict[LayerKind, Callable[[], object]] = {
        LayerKind.CONVOLUTION: lambda: F.conv2d(x, kernel, padding=1),
        LayerKind.LINEAR: lambda: rows @ matrix,
        LayerKind.ATTENTION: lambda: F.scaled_dot_product_attention(heads, heads, heads),
    }
    rates = {}
    for kind, run in runs.items():
        with Counting() as counting:
            run()
        rates[kind] = counting.operations.total / _seconds(run, device)
    big, small = noise(4 << 20), noise(16)
    bandwidth = 3 * big.nbytes / _seconds(lambda: big.add(big), device)
    return rates, bandwidth, _seconds(lambda: small.add(1), device)


def _agreeing(speed: Speed, calls: MeasuredCalls) -> Speed:
    """The same device with rates and costs of kernels and posts by which calls take what they really take."""
    if len(calls.whole) > 1:
        speed = _small_calls(speed, calls)
    return _taking(speed, *calls.whole[-1])


def _small_calls(speed: Speed, calls: MeasuredCalls) -> Speed:
    """A factor of the rates, and what a layer's kernel, a post and a stage's post cost, none of them below 0.

    All together, by the least squares of relative errors: the layers of a call in pieces are many more, and what is
    said of them too much would be missing in its posts.
    """
    whole = [(work, seconds, 0, 0) for work, seconds in calls.whole[:2]]
    bands, stages = ([(call.work, call.seconds)] if call else [] for call in (calls.bands, calls.stages))
    parts = [(work.operations, seconds, len(work.posts), 0) for work, seconds in bands]
    parts += [(work.operations, seconds, 0, len(work.posts)) for work, seconds in stages]
    rows, seconds = [], []
    for work, took, posts, hands in (*whole, *parts):
        rows.append([speed.computing(work) / took, work.calls.total() / took, posts / took, hands / took])
        seconds.append((took - work.others * speed.launch) / took)
    slower, layer, post, hand = _not_negative(torch.tensor(rows).double(), torch.tensor(seconds).double())
    factor = 1 / max(0.05, min(20.0, slower))
    rates = {kind: rate * factor for kind, rate in speed.rates.items()}
    return replace(
        speed, rates=rates, bandwidth=speed.bandwidth * factor, layer=layer, post=post, hand=hand,
        source=f"{speed.source}, whole calls",
    )  # fmt: skip


def _not_negative(rows: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """x >= 0 with the least |rows x - wanted|: of few unknowns, by trying which of them are 0."""
    best, least = [0.0] * rows.shape[1], math.inf
    for used in product((True, False), repeat=rows.shape[1]):
        kept = [i for i, use in enumerate(used) if use and bool(rows[:, i].any())]
        if not kept:
            continue
        found = torch.linalg.lstsq(rows[:, kept], wanted, driver="gelsd").solution
        error = float((rows[:, kept] @ found - wanted).norm())
        if bool((found >= 0).all()) and error < least - _NOTHING:
            best, least = [0.0] * rows.shape[1], error
            for i, value in zip(kept, found.tolist(), strict=True):
                best[i] = value
    return best


def _taking(speed: Speed, work: Operations, seconds: float) -> Speed:
    return speed.made_to_take(seconds, work) if speed.launching(work) < seconds else speed


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return in_turns([run], device, _BUDGET)[0]


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()
