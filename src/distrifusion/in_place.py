"""Putting a plan on a diffusers pipeline in place, and taking it off again."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, DiffusionPipeline, MultiControlNetModel
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distrifusion.denoiser import OpenRequest, ParallelDenoiser
from distrifusion.errors import ConfigError, PlanError, RankFailed, StepTimeout, UnsupportedModel
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import Transport
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment

_HANDLE = "_distrifusion"


def parallelize(
    pipe: DiffusionPipeline, plan: Plan | str, mesh: DeviceMesh | Transport | None = None
) -> DiffusionPipeline:
    """Divide the denoiser of a diffusers pipeline over the ranks of a plan, in place (DistriFusion, arXiv 2402.19481).

    Afterwards every rank calls the pipeline with the same arguments and gets the same result. Random numbers follow
    rank 0: its global generators and the generators passed to the call are copied to the others at the start of a run.
    A ControlNet of the pipeline is divided too.

    A pipeline that `from_pipe` made of this one shares its U-Net: call `parallelize` on it as well, with the same plan.

    Args:
        pipe: an unmodified pipeline with a `unet` (SDXL, SD 1.x, SD 2.x); it stays of its class, parameters keep
            their names. It is on this rank's device already.
        plan: a Plan or its text, such as "cfg2.patch2.displaced.w4".
        mesh: the ranks. None: the default process group, initialised by the caller. A one-dimensional DeviceMesh: its
            group. A Transport: messages of the caller's own making.

    Returns:
        The same pipeline.

    Raises:
        PlanError: if the plan is unknown or does not fit the number of ranks.
        UnsupportedModel: if the denoiser has a layer for which there is no rule; the layer is named.
        ConfigError: if the pipeline is parallelized already, or shares a model that is divided by another plan, or no
            process group is initialised.

    Every rank calls it.
    """
    plan = Plan.parse(plan)
    if hasattr(pipe, _HANDLE):
        raise ConfigError("this pipeline is parallelized already; call unparallelize(pipe) first")
    if getattr(pipe, "unet", None) is None:
        raise UnsupportedModel(f"{type(pipe).__name__} has no unet; only U-Net pipelines can be parallelized")
    check_class(type(pipe), plan)
    shared = _division_of(pipe.unet)
    transport = shared.exchange.transport if shared else _transport(plan, mesh, pipe.device)
    plan.check_devices(transport.world_size)
    denoisers: list[ParallelDenoiser] = []
    try:
        for prefix, model in _divided_models(pipe).items():
            denoisers.append(_divide(model, plan, transport, prefix))
    except BaseException:
        _leave(denoisers, pipe)
        raise
    for denoiser in denoisers:
        denoiser.holders.add(pipe)
    setattr(pipe, _HANDLE, tuple(denoisers))
    pipe.__class__ = _parallel_class(type(pipe))
    return pipe


def check_class(cls: type, plan: Plan) -> None:
    """Check what a pipeline's class alone says of whether a plan can divide it, before any weight is read.

    Raises:
        PlanError: if its pipelines divide their batch themselves and the plan does so too.
        UnsupportedModel: if its pipelines have no U-Net and the plan needs several ranks.
    """
    if plan.cfg > 1 and issubclass(cls, PAGMixin):
        raise PlanError(
            f"plan '{plan}': {cls.__name__} divides the batch itself, inside its attention, and cfg2 would cut it "
            f"before; use 'patch{plan.num_ranks}'"
        )
    parameters = inspect.signature(cls).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if plan.num_ranks > 1 and "unet" not in parameters and not open_ended:
        raise UnsupportedModel(
            f"{cls.__name__} has no unet; only U-Net pipelines can be parallelized, and this one runs on one device"
        )


def unparallelize(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Restore a pipeline to what it was before `parallelize`, bit for bit.

    A model that another parallelized pipeline shares stays divided until that one is restored too.

    Raises:
        ConfigError: if the pipeline is not parallelized, or another tool's hook (CPU offload) lies around the model.
    """
    denoisers = denoisers_of(pipe)
    for denoiser in denoisers:
        denoiser.check_outermost()
    _leave(denoisers, pipe)
    delattr(pipe, _HANDLE)
    pipe.__class__ = type(pipe).__mro__[1]
    return pipe


def denoiser_of(pipe: DiffusionPipeline) -> ParallelDenoiser:
    """The parallel U-Net of a parallelized pipeline (byte counts, pool, plan).

    Raises:
        ConfigError: if the pipeline is not parallelized.
    """
    return denoisers_of(pipe)[0]


def denoisers_of(pipe: DiffusionPipeline) -> tuple[ParallelDenoiser, ...]:
    """The parallel U-Net of a parallelized pipeline, then its parallel ControlNets.

    Raises:
        ConfigError: if the pipeline is not parallelized.
    """
    denoisers = getattr(pipe, _HANDLE, None)
    if denoisers is None:
        raise ConfigError("this pipeline is not parallelized; call parallelize(pipe, plan) first")
    return denoisers


def _divided_models(pipe: Any) -> dict[str, nn.Module]:
    """The models that are divided, by the prefix of their layers' names; others run whole on every rank."""
    models: dict[str, nn.Module] = {"": pipe.unet}
    control = getattr(pipe, "controlnet", None)
    nets: list[Any] = list(control.nets) if isinstance(control, MultiControlNetModel) else [control]
    # The residuals of several nets are added, so either all are cut or none; an average over the picture is not cut.
    if all(isinstance(net, ControlNetModel) and not net.config.global_pool_conditions for net in nets):
        models |= {f"controlnet.{i}.": net for i, net in enumerate(nets)}
    return models


def _divide(model: nn.Module, plan: Plan, transport: Transport, prefix: str) -> ParallelDenoiser:
    """Divide a model, or join the division that it has from another pipeline."""
    denoiser = _division_of(model)
    if denoiser is None:
        if hasattr(model, "_hf_hook"):
            raise ConfigError(
                f"{type(model).__name__} has a CPU offload hook, which would lie inside the division; call "
                "pipe.remove_all_hooks(), then parallelize, and enable the offload afterwards"
            )
        denoiser = ParallelDenoiser(model, plan, transport, prefix)
        denoiser.attach()
        denoiser.needs_request = plan.num_ranks > 1
    elif denoiser.plan != plan:
        raise ConfigError(
            f"{type(model).__name__} is divided by plan '{denoiser.plan}' for another pipeline that shares it; use "
            f"that plan instead of '{plan}', or call unparallelize on the other pipeline first"
        )
    return denoiser


def _division_of(model: nn.Module) -> ParallelDenoiser | None:
    """The division that a model has for another pipeline; one whose pipelines are all gone is undone."""
    denoiser = ParallelDenoiser.dividing(model)
    if denoiser is None or denoiser.holders:
        return denoiser
    denoiser.check_outermost()
    denoiser.detach()
    return None


def _leave(denoisers: Sequence[ParallelDenoiser], pipe: DiffusionPipeline) -> None:
    """Restore the models that no other pipeline holds."""
    for denoiser in denoisers:
        denoiser.holders.discard(pipe)
        if not denoiser.holders:
            denoiser.detach()


def _transport(plan: Plan, mesh: DeviceMesh | Transport | None, device: torch.device) -> Transport:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ConfigError(f"the mesh has {mesh.ndim} dimensions; give one of 1, the plan itself divides its ranks")
        return transport_of(mesh.get_group(), device)
    if mesh is not None:
        return mesh
    if dist.group.WORLD is not None:
        return transport_of(dist.group.WORLD, device)
    if plan.num_ranks > 1:
        raise ConfigError(
            f"plan '{plan}' needs {plan.num_ranks} ranks and no process group is initialised; call "
            "torch.distributed.init_process_group() first, or use distrifusion.load(), which starts the ranks itself"
        )
    return SingleTransport()


class SingleTransport:
    """One rank alone: there is nobody to send to."""

    rank = 0
    world_size = 1

    def post(self, sends: Any, receives: Any) -> Any:
        raise AssertionError("one rank has no peers")

    def broadcast(self, value: Any) -> Any:
        return value


def _parallel_class(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass under the same name whose calls are requests of the parallel denoiser."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _request(self, args, kwargs):
            return base.__call__(self, *args, **kwargs)

    names = {"__call__": __call__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    __call__.__doc__, __call__.__wrapped__ = base.__call__.__doc__, base.__call__  # type: ignore[attr-defined]
    return type(base.__name__, (base,), names)


_requests = itertools.count()


@contextmanager
def _request(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """One run of the pipeline: agreed random numbers, one request, the scheduler's steps counted."""
    denoisers = denoisers_of(pipe)
    for denoiser, model in itertools.zip_longest(denoisers, _divided_models(pipe).values()):
        if denoiser is None or denoiser.model is not model:
            raise ConfigError(
                "the unet or controlnet of this pipeline was replaced after parallelize (torch.compile does that too); "
                "call unparallelize(pipe), then parallelize(pipe, plan)"
            )
        denoiser.refresh()
    agree_on_randomness(denoisers[0].exchange.transport, pipe._execution_device, _generators(args, kwargs))
    steps = Attachment()
    steps.replace(pipe.scheduler, "step", partial(_counted, denoisers))
    request = next(_requests)
    # A callback may run another pipeline that shares the models: its request lies within this one.
    around = [denoiser.open(request) for denoiser in denoisers]
    try:
        yield
    except BaseException:
        # What other ranks sent is taken in, so that no later run finds it; why that may fail is the error at hand.
        with suppress(RankFailed, StepTimeout):
            _close(denoisers, around)
        raise
    else:
        _close(denoisers, around)
    finally:
        steps.detach()


def _close(denoisers: Sequence[ParallelDenoiser], around: list[OpenRequest]) -> None:
    for denoiser, before in zip(denoisers, around, strict=True):
        denoiser.close(before)


def _counted(denoisers: Sequence[ParallelDenoiser], step: Callable[..., Any]) -> Callable[..., Any]:
    """A scheduler's step after which the denoisers' next calls are the first of their scheduler step again."""

    def step_and_reset(*args: Any, **kwargs: Any) -> Any:
        for denoiser in denoisers:
            denoiser.slot = 0
        return step(*args, **kwargs)

    return step_and_reset


def _generators(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for value in (*args, *kwargs.values()):
        found += [g for g in (value if isinstance(value, list | tuple) else [value]) if isinstance(g, torch.Generator)]
    return found


def agree_on_randomness(transport: Transport, device: torch.device, generators: list[torch.Generator]) -> None:
    """Copy rank 0's random state to the other ranks: the global generators and those given. Every rank calls it."""
    if transport.world_size == 1:
        return
    accessors: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        accessors.append((lambda: torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device)))
    accessors += [(g.get_state, g.set_state) for g in generators]
    states = transport.broadcast([get() for get, _ in accessors])
    for (_, put), state in zip(accessors, states, strict=True):
        put(state)
