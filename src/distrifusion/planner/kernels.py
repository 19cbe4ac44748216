"""How fast one rank of this machine computes: kernels by kind, and calls of a denoiser with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
from distrifusion.planner.calls import Arguments, arguments
from distrifusion.planner.operations import Counting, LayerKind, Operations
from distrifusion.planner.rehearsal import SilentTransport, rehearse
from distrifusion.planner.speeds import Speed
from distrifusion.runtime.devices import num_cores

_BUDGET = 0.25  # seconds for each kind of kernel
_CALL_BUDGET = 2.0  # seconds that a whole call of the denoiser may take to be measured
_PIXELS = (256, 512)
_DIVIDED = Plan.parse("patch2")


def measure_speed(blueprint: Blueprint, device: torch.device, threads: int) -> Speed:
    """Rates by kind of layer on kernels alone, then made to agree with whole calls of the denoiser, random weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if device.type == "cpu" else before)
    try:
        # Not inference mode, in which composite kernels are not seen as what they are made of.
        with torch.no_grad():
            rates, bandwidth, launch = _kernels(device, blueprint.dtype)
            memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else node_memory().total
            places = max(1, num_cores() // threads) if device.type == "cpu" else 0
            speed = Speed(
                name_of(device), rates, bandwidth, launch, launch, 0.0, 1.0, places, memory, "measured here"
            )  # fmt: skip
            return _agreeing(speed, blueprint, device)
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


def _agreeing(speed: Speed, blueprint: Blueprint, device: torch.device) -> Speed:
    """The same device with rates and a cost of kernels by which calls of the denoiser take what they really take."""
    if 2 * blueprint.weights > node_memory().free or blueprint.weights > _CALL_BUDGET * 1e10:
        return speed
    calls = _Calls(speed, blueprint, device)
    points = calls.whole()
    if not points:
        return speed
    (work, seconds) = points[-1]
    if len(points) == 2:
        small, short = points[0]
        # seconds = computing / factor + what kernels cost, twice.
        more = speed.computing(work) - speed.computing(small)
        factor = max(0.05, min(20.0, more / max(1e-9, seconds - short)))
        others = short - speed.computing(small) / factor - small.others * speed.launch
        layer = max(0.0, others / small.calls.total())
        speed = replace(speed, layer=layer, source=f"{speed.source}, whole calls")
    speed = speed.made_to_take(seconds, work) if speed.launching(work) < seconds else speed
    return replace(speed, post=calls.seconds_per_post(speed))


class _Calls:
    """Calls of one row of the batch of a denoiser with random weights, which are measured.

    Args:
        speed: of the device, as far as it is known: no call is made that would take long.
        blueprint: whose denoiser.
        device: where.
    """

    def __init__(self, speed: Speed, blueprint: Blueprint, device: torch.device) -> None:
        self._blueprint = blueprint
        self._device = device
        self._model: nn.Module | None = None
        self._given = {pixels: self._arguments(pixels) for pixels in _PIXELS}
        self._work: dict[int, Operations] = {}
        for pixels, given in self._given.items():
            with Counting() as counting:
                blueprint.denoiser(**given)
            if speed.seconds(counting.operations) > _CALL_BUDGET:
                break
            self._work[pixels] = counting.operations

    def _arguments(self, pixels: int) -> Arguments:
        blueprint, side = self._blueprint, pixels // self._blueprint.factor
        return arguments(blueprint.denoiser, 1, side, side, blueprint.dtype)

    def whole(self) -> list[tuple[Operations, float]]:
        """Work and seconds of undivided calls, the smallest first."""
        return [(work, self._seconds(pixels)) for pixels, work in self._work.items()]

    def seconds_per_post(self, speed: Speed) -> float:
        """What a divided call takes more than its kernels, by post: of one of two ranks, whose messages go nowhere.

        That is the work of cutting, putting together and naming what is exchanged. In the smallest call it is most of
        what there is to see.
        """
        pixels = min(self._work)
        try:
            work = rehearse(self._blueprint.denoiser, _DIVIDED, self._given[pixels]).steady
        except DistrifusionError:  # no such plan for this model
            return 0.0
        more = self._divided_seconds(pixels) - speed.seconds(work.operations)
        return max(0.0, more / max(1, len(work.posts)))

    def _divided_seconds(self, pixels: int) -> float:
        transport = SilentTransport(0, _DIVIDED.num_ranks, {})
        denoiser = ParallelDenoiser(self._real(), _DIVIDED, transport)
        denoiser.attach()
        try:
            return self._seconds(pixels, transport.begin)
        finally:
            denoiser.detach()

    def _seconds(self, pixels: int, before: Callable[[], None] = lambda: None) -> float:
        given = _with_values(self._given[pixels], self._device)
        model = self._real()

        def call() -> None:
            before()
            model(**given)

        return _median(call, self._device)

    def _real(self) -> nn.Module:
        if self._model is None:
            empty = self._blueprint.denoiser
            made: nn.Module = type(empty).from_config(empty.config)  # type: ignore[attr-defined]
            self._model = made.to(self._device, self._blueprint.dtype).eval()
        return self._model


def _with_values(value: Any, device: torch.device) -> Any:
    return map_tensors(value, lambda x: torch.ones(x.shape, dtype=x.dtype, device=device))


def _median(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a run after one that warms up; at least three, and more while there is time."""
    times: list[float] = []
    start = None
    while len(times) < 4 or (time.perf_counter() - (start or 0) < _BUDGET and len(times) < 200):
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
