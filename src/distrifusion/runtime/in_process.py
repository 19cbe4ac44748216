"""A loaded pipeline whose rank is this process: one device, or one rank of torchrun."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch.distributed.distributed_c10d import _get_default_store

from distrifusion.engine.run import sampled
from distrifusion.errors import ConfigError
from distrifusion.memory.use import weighing
from distrifusion.plan import Plan
from distrifusion.runtime import attributes, source
from distrifusion.runtime.cancelling import Boundaries, OwnAgreement, StoreAgreement
from distrifusion.runtime.faults import typed
from distrifusion.runtime.pipeline import EndedRun, LoadedPipeline, tensor_inputs
from distrifusion.runtime.stepping import WatchedBars
from distrifusion.runtime.surroundings import TORCHRUN, started_by_torchrun
from distrifusion.runtime.timing import StepClock, timed_tensors
from distrifusion.tracing import Tracer

_pipelines = itertools.count()


class InProcessPipeline(LoadedPipeline):
    """The pipeline itself, with the interface that all loaded pipelines have."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        plan: Plan,
        devices: tuple[torch.device, ...],
        threads: int | None,
        rank: int = 0,
        ends_group: bool = False,
    ) -> None:
        super().__init__(plan, devices, threads, rank)
        agreement = OwnAgreement() if plan.num_ranks == 1 else StoreAgreement(_meeting_place())
        boundaries = Boundaries(agreement)
        own: dict[str, Any] = {"_pipe": pipe, "_ends_group": ends_group, "_known": source.facts_of(pipe)}
        own |= {"_agreement": agreement, "_boundaries": boundaries}
        self.__dict__.update(own)
        pipe.progress_bar = WatchedBars(pipe.progress_bar, boundaries)

    def _facts(self) -> source.PipelineFacts:
        return self._known

    def _step(self) -> int | None:
        return self._boundaries.step

    def _run(self, number: int, arguments: dict[str, Any], traced: bool, weighed: bool) -> EndedRun:
        tracer = Tracer(self._pipe) if traced else None
        use = weighing(self._pipe.device) if weighed else None
        clock = StepClock(self._pipe.device)
        self._boundaries.begin(number)
        followed = _followed(type(self._pipe), arguments, clock, self._boundaries)
        try:
            with _threads(self.threads), tracer or nullcontext(), self._sampled({**arguments, **followed}) as own:
                output = self._pipe(**own)
        except Exception as error:
            short = typed(error, self.rank, self._boundaries.step)
            if short is error:
                raise
            raise short from error
        times = clock.times()
        memory = [use()] if use else []
        return EndedRun(output, times, tracer.collect() if tracer else [], memory)

    def _sampled(self, arguments: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """The arguments for the pipeline itself, whose loop serves a sampler if they ask for one."""
        divided = self.plan.num_ranks > 1  # then the pipeline sees to it
        return nullcontext(arguments) if divided else sampled(self._pipe, (), arguments)

    def _cancel(self, number: int) -> None:
        self._agreement.cancel(number)

    def _get(self, name: str) -> Any:
        return attributes.resolve(self._pipe, name)

    def _set(self, name: str, value: Any) -> None:
        attributes.replace(self._pipe, name, value)

    def _end(self) -> None:
        vars(self._pipe).pop("progress_bar", None)
        self.__dict__["_pipe"] = None
        if self._ends_group:
            dist.destroy_process_group()


@dataclass(frozen=True)
class TorchrunPlace:
    """This process's place among those that torchrun started."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> TorchrunPlace | None:
        """Read it from the environment; None where torchrun did not start this process."""
        if not started_by_torchrun(environment):
            return None
        rank, local_rank, world_size = (int(environment[name]) for name in TORCHRUN[:3])
        return cls(rank, local_rank, world_size)

    def device(self, wanted: object) -> torch.device:
        """The device of this rank: its GPU where there are GPUs, unless the CPU is wanted.

        Raises:
            ConfigError: if there is no GPU for this rank.
        """
        if wanted == "cpu" or not torch.cuda.is_available():
            if wanted == "cuda":
                raise ConfigError("device 'cuda' was asked for and there is no CUDA here; use 'cpu'")
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {self.local_rank} has no GPU of its own, {torch.cuda.device_count()} are here; "
                "start fewer ranks, or say devices='cpu'"
            )
        return torch.device("cuda", self.local_rank)

    def join(self, backend: str, device: torch.device, limit: float) -> bool:
        """Initialise the default process group unless it is; True if this did it. Every rank calls it."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if dist.is_initialized():
            if dist.get_world_size() != self.world_size:
                raise ConfigError(f"the process group has {dist.get_world_size()} ranks, torchrun {self.world_size}")
            return False
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=limit))
        return True


def _meeting_place() -> dist.Store:
    """Room in the process group's store for one pipeline; every rank loads the same pipelines in the same order."""
    return dist.PrefixStore(f"distrifusion/cancel/{next(_pipelines)}", _get_default_store())


def _followed(cls: type, arguments: Mapping[str, Any], clock: StepClock, boundaries: Boundaries) -> dict[str, Any]:
    """Arguments that make the pipeline tell of every step: the clock before the caller's own callback."""
    if not source.takes_step_callback(cls):
        return {}
    callback = arguments.get("callback_on_step_end")

    def step_ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        clock.step_ended(step + 1 == getattr(pipe, "num_timesteps", None), tensors)
        answer = tensors if callback is None else callback(pipe, step, timestep, tensors)
        boundaries.step_ends(step)
        return answer

    names = list(timed_tensors(cls) if callback is None else tensor_inputs(arguments))
    return {"callback_on_step_end": step_ended, "callback_on_step_end_tensor_inputs": names}


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """CPU threads for one call; None keeps the process's own setting."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
