"""How fast this machine is: measured in seconds, kept in a file, and measured again when something has changed."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

from distrifusion.doctor.machine import cpu_model
from distrifusion.doctor.round_trip import RoundTripError, measure
from distrifusion.errors import ConfigError
from distrifusion.memory.free import node_memory
from distrifusion.nested import map_tensors
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.calls import arguments
from distrifusion.planner.links import Link, Links
from distrifusion.planner.operations import Counting, LayerKind, Operations
from distrifusion.planner.speeds import Speed

_LIBRARIES = ("torch", "diffusers", "distrifusion")
_FOLDER_VARIABLE = "DISTRIFUSION_CACHE"
_BUDGET = 0.25  # seconds for each kind of kernel
_CALL_BUDGET = 2.0  # seconds that a whole call of the denoiser may take to be measured
_PIXELS = (256, 512)
_LINK_LIMIT = 60.0
# CPU ranks carry their messages themselves: no copy hides behind what the same core computes (docs/measurements.md).
_CPU_OVERLAP, _GPU_OVERLAP = 0.0, 0.9
# Computing processes of one machine slow each other by 1 to 4 %: the ceilings in docs/measurements.md.
_CPU_DIVIDED = 1.03


@dataclass(frozen=True)
class Circumstances:
    """What a calibration holds for; another device, model, type or number of threads has its own.

    Attributes:
        versions: of the libraries; where they differ, the calibration is stale.
    """

    device: str
    model: str
    dtype: str
    threads: int
    versions: Mapping[str, str]

    @classmethod
    def here(cls, blueprint: Blueprint, device: torch.device, threads: int) -> Self:
        """Those of this process."""
        versions = {name: version(name) for name in _LIBRARIES}
        return cls(_name_of(device), blueprint.name, str(blueprint.dtype), threads, versions)

    @property
    def file(self) -> Path:
        """Where it is kept."""
        what = json.dumps([self.device, self.model, self.dtype, self.threads])
        return cache_folder() / f"calibration-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Calibration:
    """A device and its links.

    Attributes:
        stale: versions that differ from those that an older calibration was made with; empty where there was none.
    """

    speed: Speed
    links: Links
    stale: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"speed": self.speed.as_dict(), "links": self.links.as_dict()}


def cache_folder() -> Path:
    """Where calibrations are kept: DISTRIFUSION_CACHE, or the user's cache."""
    given = os.environ.get(_FOLDER_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "distrifusion"


def calibrated(blueprint: Blueprint, device: torch.device, threads: int) -> Calibration:
    """The calibration of this machine: as it is kept, or measured now and kept.

    Args:
        blueprint: whose kernels are measured.
        device: one of those that will draw.
        threads: of a rank on CPU.

    Raises:
        ConfigError: if what is kept cannot be read.
    """
    now = Circumstances.here(blueprint, device, threads)
    kept = _read(now.file)
    changed: dict[str, str] = {}
    if kept is not None:
        before = kept.get("versions", {})
        changed = {name: before.get(name, "none") for name, v in now.versions.items() if before.get(name) != v}
        if not changed:
            return Calibration(Speed.from_dict(kept["speed"]), Links.from_dict(kept["links"]), {})
    found = Calibration(measure_speed(blueprint, device, threads), measure_links(device), changed)
    now.file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": dict(now.versions), "model": now.model, **found.as_dict()}, indent=1)
    now.file.write_text(text, encoding="utf-8")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the calibration '{file}' cannot be read: {error}; delete it, and it is measured anew"
        ) from error
    if not isinstance(row, dict) or not {"speed", "links"} <= row.keys():
        raise ConfigError(f"the calibration '{file}' has no speed and links; delete it, and it is measured anew")
    return row


def measure_speed(blueprint: Blueprint, device: torch.device, threads: int) -> Speed:
    """Rates by kind of layer on kernels alone, then made to agree with whole calls of the denoiser, random weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if device.type == "cpu" else before)
    try:
        # Not inference mode, in which composite kernels are not seen as what they are made of.
        with torch.no_grad():
            rates, bandwidth, launch = _kernels(device, blueprint.dtype)
            memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else node_memory().total
            slower = _CPU_DIVIDED if device.type == "cpu" else 1.0
            speed = Speed(_name_of(device), rates, bandwidth, launch, launch, slower, memory, "measured here")
            return _agreeing(speed, blueprint, device)
    finally:
        torch.set_num_threads(before)


def measure_links(device: torch.device) -> Links:
    """Messages between two processes of this machine."""
    backend = "nccl" if device.type == "cuda" and torch.cuda.device_count() > 1 else "gloo"
    try:
        found = measure(backend, _LINK_LIMIT)[-1]
    except RoundTripError as error:
        raise ConfigError(f"the link between two ranks cannot be measured: {error}; name a profile by --on") from error
    link = Link(found.microseconds / 2e6, found.gigabytes_per_second * 1e9)
    overlap = _GPU_OVERLAP if backend == "nccl" else _CPU_OVERLAP
    return Links("here", link, link, 1024, overlap, f"measured: {found.way}")


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
    """The same device with rates and launch by which two sizes of the denoiser take what they are measured to take."""
    if 2 * blueprint.weights > node_memory().free or blueprint.weights > _CALL_BUDGET * 1e10:
        return speed
    points = _whole_calls(speed, blueprint, device)
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
    return speed.made_to_take(seconds, work) if speed.launching(work) < seconds else speed


def _whole_calls(speed: Speed, blueprint: Blueprint, device: torch.device) -> list[tuple[Operations, float]]:
    """Work and seconds of calls of one row at two sizes, as long as they are expected to be short."""
    model, points = None, []
    for pixels in _PIXELS:
        side = pixels // blueprint.factor
        on_meta = arguments(blueprint.denoiser, 1, side, side, blueprint.dtype)
        with Counting() as counting:
            blueprint.denoiser(**on_meta)
        if speed.seconds(counting.operations) > _CALL_BUDGET:
            break
        if model is None:
            model = type(blueprint.denoiser).from_config(blueprint.denoiser.config)  # type: ignore[attr-defined]
            model = model.to(device, blueprint.dtype).eval()
        given = _with_values(on_meta, device)
        points.append((counting.operations, _median(partial(model, **given), device)))
    return points


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


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()
