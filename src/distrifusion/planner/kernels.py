"""How fast one rank of this machine computes: kernels by kind, and calls of a denoiser with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.doctor.machine import cpu_model
from distrifusion.errors import DistrifusionError
from distrifusion.memory.free import node_memory
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Counting, LayerKind, Operations
from distrifusion.planner.rehearsal import CallWork, SilentTransport, rehearse
from distrifusion.planner.speeds import Speed
from distrifusion.runtime.devices import num_cores

_BUDGET = 0.25  # seconds for each kind of kernel
_CALLS_BUDGET = 1.0  # and for each size of calls of the denoiser
# Calls are measured of which even a slow device makes one in some seconds: operations on a CPU, and on others.
_MOST_WORK = {"cpu": 5e10, "cuda": 5e12}
# Pixels, and whether both branches of guidance: the first two tell what kernels cost beside their work, the last one at
# which rates they work.
_SIZES = ((128, False), (256, False), (512, True))
_DIVIDED = Plan.parse("patch2")


def measure_speed(blueprint: Blueprint, device: torch.device, threads: int) -> Speed:
    """Rates by kind of layer on kernels alone, then made to agree with whole calls of the denoiser, random weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if device.type == "cpu" else before)
    try:
        # Not inference mode, in which composite kernels are not seen as what they are made of.
        with torch.no_grad():
            # First: what large tensors leave behind in the allocator makes calls faster than those of ranks are.
            calls = _measured_calls(blueprint, device)
            rates, bandwidth, launch = _kernels(device, blueprint.dtype)
            memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else node_memory().total
            places = max(1, num_cores() // threads) if device.type == "cpu" else 0
            speed = Speed(
                name_of(device), rates, bandwidth, launch, launch, 0.0, 1.0, places, memory, "measured here"
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
        rates[kind] = counting.operations.total / _median(run, device)
    big, small = noise(4 << 20), noise(16)
    bandwidth = 3 * big.nbytes / _median(lambda: big.add(big), device)
    return rates, bandwidth, _median(lambda: small.add(1), device)


@dataclass
class _MeasuredCalls:
    """Work and seconds of calls of a denoiser with random weights.

    Attributes:
        whole: undivided calls, the smallest first; none where one would take too long, or too much memory.
        divided: one of two ranks' part of a call, whose messages go nowhere; None where it cannot be divided so.
    """

    whole: list[tuple[Operations, float]] = field(default_factory=list)
    divided: tuple[CallWork, float] | None = None


def _measured_calls(blueprint: Blueprint, device: torch.device) -> _MeasuredCalls:
    found, most = _MeasuredCalls(), _MOST_WORK[device.type]
    one_row = replace(blueprint, guided=False)
    calls = [(blueprint if both else one_row).arguments(pixels, pixels) for pixels, both in _SIZES]
    known = [(given, work) for given in calls if (work := _work_of(blueprint.denoiser, given)).total <= most]
    if not known or 2 * blueprint.weights > node_memory().free:
        return found
    empty = blueprint.denoiser
    made: nn.Module = type(empty).from_config(empty.config)  # type: ignore[attr-defined]
    model = made.to(device, blueprint.dtype).eval()
    for given, work in known:
        found.whole.append((work, _seconds(model, given, device)))
    found.divided = _divided(blueprint, model, known[:2][-1][0], device)
    return found


def _divided(
    blueprint: Blueprint, model: nn.Module, given: Arguments, device: torch.device
) -> tuple[CallWork, float] | None:
    try:
        work = rehearse(blueprint.denoiser, _DIVIDED, given, 0).steady
    except DistrifusionError:
        return None
    transport = SilentTransport(0, _DIVIDED.num_ranks, {})
    denoiser = ParallelDenoiser(model, _DIVIDED, transport)
    denoiser.attach()
    try:
        return work, _seconds(model, given, device, transport.begin)
    finally:
        denoiser.detach()


def _agreeing(speed: Speed, calls: _MeasuredCalls) -> Speed:
    """The same device with rates and costs of kernels and posts by which calls take what they really take."""
    if len(calls.whole) > 1:
        (small, short), (work, seconds) = calls.whole[:2]
        # seconds = computing / factor + what kernels cost, twice.
        more = speed.computing(work) - speed.computing(small)
        factor = max(0.05, min(20.0, more / max(1e-9, seconds - short)))
        others = short - speed.computing(small) / factor - small.others * speed.launch
        layer = max(0.0, others / small.calls.total())
        speed = replace(speed, layer=layer, source=f"{speed.source}, whole calls")
        speed = _taking(speed, work, seconds)
    if calls.divided is not None:
        # What a divided call takes more than its kernels: cutting, putting together and naming what is exchanged.
        work, seconds = calls.divided[0].operations, calls.divided[1]
        speed = replace(speed, post=max(0.0, seconds - speed.seconds(work)) / max(1, len(calls.divided[0].posts)))
    return _taking(speed, *calls.whole[-1])


def _taking(speed: Speed, work: Operations, seconds: float) -> Speed:
    return speed.made_to_take(seconds, work) if speed.launching(work) < seconds else speed


def _work_of(model: nn.Module, given: Arguments) -> Operations:
    with Counting() as counting:
        model(**given)
    return counting.operations


def _seconds(
    model: nn.Module, given: Arguments, device: torch.device, before: Callable[[], None] = lambda: None
) -> float:
    values = _with_values(given, device)

    def call() -> None:
        before()
        model(**values)

    return _median(call, device, _CALLS_BUDGET)


def _with_values(value: Any, device: torch.device) -> Any:
    return map_tensors(value, lambda x: torch.ones(x.shape, dtype=x.dtype, device=device))


def _median(run: Callable[[], object], device: torch.device, budget: float | None = None) -> float:
    """Median seconds of a run after one that warms up; at least three, and more while there is time."""
    times: list[float] = []
    start, budget = None, _BUDGET if budget is None else budget
    while len(times) < 4 or (time.perf_counter() - (start or 0) < budget and len(times) < 200):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        start = start or begin
    return statistics.median(times[1:])


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()
