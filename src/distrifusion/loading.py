"""One call from a hub id, a folder or a function to a pipeline on all its devices."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from distrifusion.errors import ConfigError
from distrifusion.exchange.transport import SingleTransport
from distrifusion.graphs import check_device, check_plan
from distrifusion.in_place import parallelize
from distrifusion.plan import Plan
from distrifusion.planner import auto
from distrifusion.runtime import devices as device_specs
from distrifusion.runtime import source as sources
from distrifusion.runtime.in_process import InProcessPipeline, TorchrunPlace
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.runtime.processes import Crew
from distrifusion.runtime.spawned import SpawnedPipeline

_LOGGER = logging.getLogger(__name__)
_BACKENDS = {"gloo": ("cpu", "gloo"), "nccl": ("cuda", "cpu:gloo,cuda:nccl")}


def load(
    source: str | os.PathLike[str] | Callable[[], DiffusionPipeline],
    devices: device_specs.DeviceSpec = None,
    plan: Plan | str | None = None,
    *,
    fidelity: str = "exact",
    size: tuple[int, int] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    step_timeout: float = 600.0,
    start_timeout: float = 1800.0,
    graphs: bool = False,
    **from_pretrained: Any,
) -> LoadedPipeline:
    """Load a diffusers pipeline onto one or many devices; the result is called like the pipeline.

    One device is served in this process. Several are served by one worker process each, started here once and used for
    every call until `close()`, the end of a `with` block, or the end of this process. Under torchrun nothing is
    started: this process joins the others as one rank, every rank calls `load` and then makes the same calls.

    Args:
        source: a hub id ("stabilityai/stable-diffusion-xl-base-1.0"), a folder, "demo" or "demo-dit" (the
            embedded models), or a function without arguments that returns a pipeline. Worker processes on CPU share
            what one call of it gives, unless it leaves a thread behind; otherwise every rank calls it.
        devices: how many (2: GPUs where CUDA is, else CPU processes), which ("cuda:1", ["cuda:0", "cuda:1"], [0, 1],
            ["cpu", "cpu"]), or which kind ("cuda": all GPUs, "cpu": as many processes as the plan has ranks).
            None: as many as the plan has ranks; without a plan all GPUs, or one CPU.
        plan: what to divide, such as "cfg2.patch2" or "patch4.displaced.w4". None: the exact plan for the devices.
            "auto": the one predicted to be fastest on this machine that keeps `fidelity`, on as many of the devices as
            help; the machine is measured for some seconds the first time.
        fidelity: what "auto" may take: "exact", "close" or "any".
        size: width and height in pixels that "auto" plans for. None: those the model was made for.
        backend: "gloo" for CPU ranks, "nccl" for GPU ranks. None: the one that fits the devices.
        threads: CPU threads of every rank, at least 1. None: the cores divided by the ranks; one device, and a rank
            of torchrun, keep their process's own setting.
        step_timeout: seconds without a finished step after which a call is given up.
        start_timeout: seconds that starting the workers and reading the weights may take.
        graphs: within a call, capture denoiser calls that repeat and replay them (`docs/graphs.md`).
        from_pretrained: keywords for `DiffusionPipeline.from_pretrained`, such as torch_dtype=torch.float16.

    Raises:
        PlanError: if the plan has an unknown word or does not occupy exactly these devices.
        ConfigError: if another argument cannot work; before any weight is read.
        UnsupportedModel: if the plan divides a model that has a layer without a rule.
        RankFailed, StepTimeout: if a rank fails alone, or starting passes its limit.
    """
    automatic = isinstance(plan, str) and plan.strip().lower() == auto.AUTO
    wanted = None if plan is None or automatic else Plan.parse(plan)
    _check_numbers(threads, step_timeout, start_timeout)
    place = TorchrunPlace.of(os.environ)
    if place is not None and automatic:
        raise ConfigError(
            "plan='auto' may take fewer devices than torchrun has started; ask `distrifusion plan` and name it"
        )
    if place is not None:
        found = sources.find(source, from_pretrained)
        return _join(place, found, devices, wanted, backend, threads, step_timeout, graphs)
    where, chosen = device_specs.resolve(devices, wanted)
    group_backend = _group_backend(backend, where[0])
    if graphs:
        check_device(where[0])
    found = sources.find(source, from_pretrained)
    if automatic:
        ranking = auto.choose(source, where, wish=fidelity, size=size, threads=threads, keywords=from_pretrained)
        chosen = ranking.chosen.plan
        where = where[: chosen.num_ranks]
        _LOGGER.info("plan 'auto': %s", ranking.reason)
    found.check_plan(chosen)
    if graphs:
        check_plan(chosen)
    if len(where) == 1:
        alone = found.open(where[0])
        if graphs:
            parallelize(alone, chosen, SingleTransport(), graphs=True)
        return InProcessPipeline(alone, chosen, where, threads)
    threads = threads or device_specs.threads_per_rank(where)
    crew = Crew(found, chosen, where, group_backend, threads, step_timeout, start_timeout, graphs)
    pipe = SpawnedPipeline(crew)
    pipe.start()
    return pipe


def _join(
    place: TorchrunPlace,
    found: sources.Source,
    devices: device_specs.DeviceSpec,
    wanted: Plan | None,
    backend: str | None,
    threads: int | None,
    step_timeout: float,
    graphs: bool,
) -> LoadedPipeline:
    plan = device_specs.check_world(devices, wanted, place.world_size)
    found.check_plan(plan)
    device = place.device(devices)
    if graphs:
        check_device(device)
        check_plan(plan)
    joined = place.join(_group_backend(backend, device), device, step_timeout)
    if plan.num_ranks > 1 or graphs:
        pipe = parallelize(found.open(), plan, graphs=graphs, device=device)
    else:
        pipe = found.open(device)
    return InProcessPipeline(pipe, plan, (device,) * plan.num_ranks, threads, place.rank, ends_group=joined)


def _group_backend(backend: str | None, device: torch.device) -> str:
    if backend is None:
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; it is one of {', '.join(_BACKENDS)}")
    kind, group_backend = _BACKENDS[backend]
    if kind != device.type:
        raise ConfigError(f"backend='{backend}' serves {kind} ranks and the devices are {device.type}; leave it out")
    return group_backend


def _check_numbers(threads: int | None, step_timeout: float, start_timeout: float) -> None:
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads={threads!r} must be a whole number of at least 1, or None")
    for name, seconds in (("step_timeout", step_timeout), ("start_timeout", start_timeout)):
        if type(seconds) not in (int, float):
            raise ConfigError(f"{name}={seconds!r} must be a number of seconds")
        if not 0 < seconds < math.inf:
            raise ConfigError(f"{name}={seconds!r} must be above 0 and finite; no wait here is without a limit")
