"""Putting a plan on a diffusers pipeline in place, and taking it off again."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, DiffusionPipeline, MultiControlNetModel
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distrifusion.anatomy import check_family
from distrifusion.anatomy.vae import halves_of
from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.division import Division
from distrifusion.engine.run import sampled
from distrifusion.errors import ConfigError, PlanError, UnsupportedModel
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import SingleTransport, Transport
from distrifusion.graphs import Backend, backend_for, check_device, check_plan
from distrifusion.once import ENCODERS
from distrifusion.plan import Plan, Split
from distrifusion.request import Parallel, callbacks_alone, request
from distrifusion.strategies.weights import staying

_HANDLE = "_distrifusion"
# Components that predict; those after the first take over in the course of a run, and have a prefix of their own.
_DENOISERS = ("unet", "transformer", "transformer_2")


def parallelize(
    pipe: DiffusionPipeline,
    plan: Plan | str,
    mesh: DeviceMesh | Transport | None = None,
    pictures: str = "all",
    graphs: bool = False,
    device: torch.device | None = None,
) -> DiffusionPipeline:
    """Divide the denoiser of a diffusers pipeline over the ranks of a plan, in place (DistriFusion, arXiv 2402.19481).

    Afterwards every rank calls the pipeline with the same arguments and gets the same result. Random numbers follow
    rank 0: its global generators and the generators passed to the call are copied to the others at the start of a run.
    A ControlNet of the pipeline is divided too, and so is its VAE, always exactly and over all ranks, within a run;
    prompts are encoded by rank 0 for all. What a callback decodes or encodes, its rank does alone.

    Its calls take `sampler=` and its choices besides (`engine/words.py`): many steps in each denoiser call.

    A pipeline that `from_pipe` made of this one shares its U-Net: call `parallelize` on it as well, with the same plan.

    Args:
        pipe: an unmodified pipeline with a `unet` (SDXL, SD 1.x, SD 2.x) or a `transformer` (SD3, FLUX, PixArt, Wan and
            others); it stays of its class, parameters keep their names.
        plan: a Plan or its text, such as "cfg2.patch2.displaced.w4".
        mesh: the ranks. None: the default process group, initialised by the caller. A one-dimensional DeviceMesh: its
            group. A Transport: messages of the caller's own making.
        pictures: "all", or "first": then the pictures that a run decodes are put together on rank 0 alone, and the call
            returns None on the other ranks. Latents all ranks get.
        graphs: within a run, capture denoiser calls that repeat and replay them (`docs/graphs.md`).
        device: this rank's, where the pipeline is moved to without the layers that the plan gives to other ranks; they
            stay in the host's memory. None: the pipeline is on this rank's device already.

    Returns:
        The same pipeline.

    Raises:
        PlanError: if the plan is unknown or does not fit the number of ranks.
        UnsupportedModel: if the denoiser has a layer for which there is no rule; the layer is named.
        ConfigError: if the pipeline is parallelized already, or shares a model that is divided by another plan, or no
            process group is initialised, or `pictures` is something else, or `graphs` cannot be had.

    Every rank calls it.
    """
    plan = Plan.parse(plan)
    if pictures not in (Calls.ALL, Calls.FIRST):
        raise ConfigError(f"pictures={pictures!r} must be 'all' or 'first': the ranks that get them")
    if hasattr(pipe, _HANDLE):
        raise ConfigError("this pipeline is parallelized already; call unparallelize(pipe) first")
    check_class(type(pipe), plan)
    first = next(iter(_denoisers(pipe).values()), None)
    if first is None:
        raise UnsupportedModel(f"{type(pipe).__name__} has no {' or '.join(_DENOISERS)} that could be parallelized")
    shared = _division_of(first)
    place = device or pipe.device
    transport = shared.exchange.transport if shared else _transport(plan, mesh, place)
    plan.check_devices(transport.world_size)
    if graphs:
        check_device(place)
        check_plan(plan)
    denoisers: list[ParallelDenoiser] = []
    coders: list[ParallelCoder] = []
    try:
        for prefix, model in _divided_models(pipe).items():
            denoisers.append(_divide(model, plan, transport, prefix, backend_for(place) if graphs else None))
        for prefix, model in _coders(pipe).items() if plan.num_ranks > 1 else ():
            coders += _divide_coder(model, plan, transport, prefix)
        if device is not None:
            with staying(module for denoiser in denoisers for module in denoiser.aside):
                pipe.to(device)
    except BaseException:
        _leave([*denoisers, *coders], pipe)
        raise
    parallel = Parallel(tuple(denoisers), tuple(coders), Calls(pictures))
    for division in parallel.divisions:
        division.holders.add(pipe)
    setattr(pipe, _HANDLE, parallel)
    pipe.__class__ = _parallel_class(type(pipe))
    return pipe


def check_class(cls: type, plan: Plan) -> None:
    """Check what a pipeline's class alone says of whether a plan can divide it, before any weight is read.

    Raises:
        PlanError: if its pipelines divide their batch themselves and the plan does so too, or if the plan says what
            has no meaning for their denoiser.
        UnsupportedModel: if its pipelines have no denoiser that is known and the plan needs several ranks.
    """
    if plan.batch > 1 and issubclass(cls, PAGMixin):
        raise PlanError(
            f"plan '{plan}': {cls.__name__} divides the batch itself, inside its attention, and cfg2 or dp would cut "
            f"it before; use 'patch{plan.num_ranks}'"
        )
    parameters = inspect.signature(cls).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    name = next((name for name in _DENOISERS if name in parameters), None)
    if plan.num_ranks == 1:
        return
    if name is None:
        if not open_ended:
            raise UnsupportedModel(
                f"{cls.__name__} has no {' or '.join(_DENOISERS[:2])} that could be parallelized; it runs on one device"
            )
    elif name == "unet":
        plan.check_bands(cls.__name__)
    else:
        plan.check_tokens(cls.__name__)
        annotation = parameters[name].annotation
        if isinstance(annotation, type) and issubclass(annotation, nn.Module):
            check_family(annotation)


def unparallelize(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Restore a pipeline to what it was before `parallelize`, bit for bit.

    A model that another parallelized pipeline shares stays divided until that one is restored too.

    Raises:
        ConfigError: if the pipeline is not parallelized, or another tool's hook (CPU offload) lies around the model.
    """
    divisions = _parallel_of(pipe).divisions
    for division in divisions:
        division.check_outermost()
    _leave(divisions, pipe)
    delattr(pipe, _HANDLE)
    pipe.__class__ = type(pipe).__mro__[1]
    return pipe


def denoiser_of(pipe: DiffusionPipeline) -> ParallelDenoiser:
    """The parallel denoiser of a parallelized pipeline (byte counts, pool, plan).

    Raises:
        ConfigError: if the pipeline is not parallelized.
    """
    return denoisers_of(pipe)[0]


def denoisers_of(pipe: DiffusionPipeline) -> tuple[ParallelDenoiser, ...]:
    """The parallel denoisers of a parallelized pipeline, then its parallel ControlNets.

    Raises:
        ConfigError: if the pipeline is not parallelized.
    """
    return _parallel_of(pipe).denoisers


def coders_of(pipe: DiffusionPipeline) -> tuple[ParallelCoder, ...]:
    """The parallel halves of a parallelized pipeline's autoencoders; none where they run whole on every rank.

    Raises:
        ConfigError: if the pipeline is not parallelized.
    """
    return _parallel_of(pipe).coders


def called_alike(pipe: DiffusionPipeline) -> AbstractContextManager[None]:
    """Within the block all ranks call the autoencoders of a parallelized pipeline alike, so they divide the work."""
    return _parallel_of(pipe).calls(Calls.ALL)


def _parallel_of(pipe: DiffusionPipeline) -> Parallel:
    parallel = getattr(pipe, _HANDLE, None)
    if parallel is None:
        raise ConfigError("this pipeline is not parallelized; call parallelize(pipe, plan) first")
    return parallel


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models that predict, by the prefix of their layers' names: none for the first."""
    found = [(name, model) for name in _DENOISERS if (model := getattr(pipe, name, None)) is not None]
    return {f"{name}." if i else "": model for i, (name, model) in enumerate(found)}


def _divided_models(pipe: Any) -> dict[str, nn.Module]:
    """The models that are divided, by the prefix of their layers' names; others run whole on every rank."""
    models = _denoisers(pipe)
    control = getattr(pipe, "controlnet", None)
    nets: list[Any] = list(control.nets) if isinstance(control, MultiControlNetModel) else [control]
    # The residuals of several nets are added, so either all are cut or none; an average over the picture is not cut.
    if all(isinstance(net, ControlNetModel) and not net.config.global_pool_conditions for net in nets):
        models |= {f"controlnet.{i}.": net for i, net in enumerate(nets)}
    return models


def _coders(pipe: Any) -> dict[str, nn.Module]:
    """The halves of autoencoders that are divided, by the prefix of their layers' names."""
    return {prefix: half for name, part in pipe.components.items() for prefix, half in halves_of(name, part).items()}


def _divide_coder(model: nn.Module, plan: Plan, transport: Transport, prefix: str) -> list[ParallelCoder]:
    """Divide half an autoencoder, or join its division; none if it has no rule: whole on every rank it is right too."""
    coder = _division_of(model)
    if coder is None:
        coder = ParallelCoder(model, Split.ROWS if plan.split is Split.ALTERNATING else plan.split, transport, prefix)
        try:
            coder.attach()
        except UnsupportedModel as error:
            if transport.rank == 0:
                warnings.warn(f"{error}; it runs whole on every rank", stacklevel=3)
            return []
    assert isinstance(coder, ParallelCoder)
    if coder.exchange.transport.world_size != transport.world_size:
        raise ConfigError(
            f"'{prefix.rstrip('.')}' is divided over {coder.exchange.transport.world_size} ranks for another pipeline "
            f"that shares it; use as many ranks instead of {transport.world_size}, or call unparallelize on that one"
        )
    return [coder]


def _divide(
    model: nn.Module, plan: Plan, transport: Transport, prefix: str, graphs: Backend | None
) -> ParallelDenoiser:
    """Divide a model, or join the division that it has from another pipeline."""
    denoiser = _division_of(model)
    if denoiser is None:
        if hasattr(model, "_hf_hook"):
            raise ConfigError(
                f"{type(model).__name__} has a CPU offload hook, which would lie inside the division; call "
                "pipe.remove_all_hooks(), then parallelize, and enable the offload afterwards"
            )
        denoiser = ParallelDenoiser(model, plan, transport, prefix)
        if graphs is not None:
            denoiser.capture_by(graphs)
        denoiser.attach()
        denoiser.needs_request = plan.num_ranks > 1
    assert isinstance(denoiser, ParallelDenoiser)
    if denoiser.plan != plan:
        raise ConfigError(
            f"{type(model).__name__} is divided by plan '{denoiser.plan}' for another pipeline that shares it; use "
            f"that plan instead of '{plan}', or call unparallelize on the other pipeline first"
        )
    if (denoiser.graphs is None) != (graphs is None):
        raise ConfigError(
            f"{type(model).__name__} is divided with graphs={graphs is None} for another pipeline that shares it; say "
            "the same here, or call unparallelize on that one"
        )
    return denoiser


def _division_of(model: nn.Module) -> Division | None:
    """The division that a model has for another pipeline; one whose pipelines are all gone is undone."""
    division = Division.dividing(model)
    if division is None or division.holders:
        return division
    division.check_outermost()
    division.detach()
    return None


def _leave(divisions: Sequence[Division], pipe: DiffusionPipeline) -> None:
    """Restore the models that no other pipeline holds."""
    for division in divisions:
        division.holders.discard(pipe)
        if not division.holders:
            division.detach()


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


def _parallel_class(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass under the same name whose calls are requests of the parallel denoiser."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = _parallel_of(self)
        _refresh(self, parallel)
        plan, agree = parallel.denoisers[0].plan, parallel.transport.broadcast
        with sampled(self, args, kwargs, plan, agree) as own, request(self, parallel, args, own):
            result = base.__call__(self, *args, **callbacks_alone(parallel, own))
            return None if parallel.withheld and parallel.transport.rank > 0 else result

    def shared(encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def encode_shared(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _parallel_of(self).encode(self, partial(encode, self, *args, **kwargs))

        return encode_shared

    names = {"__call__": __call__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    __call__.__doc__, __call__.__wrapped__ = base.__call__.__doc__, base.__call__  # type: ignore[attr-defined]
    names |= {name: shared(getattr(base, name)) for name in ENCODERS if hasattr(base, name)}
    return type(base.__name__, (base,), names)


def _refresh(pipe: Any, parallel: Parallel) -> None:
    """Look at the models again before a run; raises ConfigError if one was replaced."""
    halves = _coders(pipe)
    models = [*_divided_models(pipe).values(), *(halves.get(coder.prefix) for coder in parallel.coders)]
    for division, model in itertools.zip_longest(parallel.divisions, models):
        if division is None or division.model is not model:
            raise ConfigError(
                "a denoiser, controlnet or vae of this pipeline was replaced after parallelize (torch.compile does "
                "that too); call unparallelize(pipe), then parallelize(pipe, plan)"
            )
        division.refresh()
