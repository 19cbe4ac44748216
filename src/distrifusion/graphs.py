"""A denoiser's calls captured once for each kind of call of a request, then replayed: CUDA graphs, or on CPU a tape.

Replaying runs no layer's code; on CUDA the host launches no kernel and no message either. In return every tensor that
was there before must stay where it is, and nothing that the host decides may differ. So what was captured is replayed
for a call with the same kinds of arguments, the same plain values among them, in the same phase of the plan, that reads
the same one of each pair of kept buffers. What differs otherwise (latents, timesteps, the weight of a forecast) is
copied into the captured tensors before. All graphs end with their request: a run sees the model as it is at its start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from distrifusion.errors import ConfigError
from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.verbs import Exchange
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.tape import TapeBackend

Work = Callable[[Any, CallPolicy], Any]
Replay = Callable[[], None]


def check_device(device: torch.device) -> None:
    """Raise ConfigError where calls cannot be captured."""
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"graphs takes CUDA devices or CPU, and these are {device.type}; leave it out")


def check_plan(plan: Plan) -> None:
    """Raise ConfigError if a plan's calls cannot be captured."""
    if plan.late or plan.stages > 1:
        raise ConfigError(
            f"plan '{plan}' has messages under way between two calls, which a captured call can wait for in "
            "neither; leave out graphs"
        )
    if plan.resync is not None:
        raise ConfigError(
            f"plan '{plan}' decides between calls how values moved, which a captured call cannot wait for; leave "
            f"out resync{plan.resync} or graphs"
        )


def backend_for(device: torch.device) -> Backend:
    """What captures calls on a device."""
    return CudaBackend() if device.type == "cuda" else TapeBackend()


class Backend(Protocol):
    """Records the device's work of a call, so that it can be done again without the code that asked for it."""

    captures_first: bool
    """Whether a call may be captured that is the first of its kind, if the calls before it have made all it needs."""

    def carrying(self, transport: Transport) -> Transport:
        """The same ranks, by messages that are captured.

        Raises:
            ConfigError: if messages of this kind cannot be.
        """

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Replay]:
        """Do some work once; its result, and what does the same again with the same tensors.

        Raises:
            RuntimeError: if the work waits for the device, or decides by values that the device has.
        """


class CudaBackend:
    """CUDA graphs. Each has its own memory, which it keeps as long as it lives."""

    captures_first = False  # a kernel's first call may make what a graph cannot

    def carrying(self, transport: Transport) -> Transport:
        """The transport itself, if its messages are work of the device."""
        if not getattr(transport, "can_be_captured", False):
            raise ConfigError(
                "graphs on CUDA take messages of NCCL, and these ranks send others; initialise the process group with "
                "backend 'nccl', or leave it out"
            )
        return transport

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Replay]:
        """Capture on a stream of its own, into which the process group's streams are joined, and run once."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a watchdog of the process group) may go on asking the device about their own events.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        graph.replay()  # what is captured is not done
        return result, graph.replay


@dataclass
class _Graph:
    """One captured call.

    Attributes:
        inputs: the tensors that it reads, in the order of the call's.
        output: what it gives, in the tensors that it writes.
        turned: kept values that let their two buffers change places.
        sent, num_posts: what it sends.
    """

    inputs: list[torch.Tensor]
    output: Any
    replay: Replay
    turned: list[GatherBuffer]
    sent: Counter[str]
    num_posts: int


class Graphs:
    """The captured calls of one denoiser in the request at hand.

    The first call of a kind runs as ever: it makes what later ones find made (kept buffers, connections, numbers of
    tokens that ranks tell each other). The second is captured, those after it are replayed. On CPU the first call
    that reads old values is captured at once if two have been sent: the warm-up has made all that it finds.

    Args:
        plan: how the denoiser is divided.
        exchange: the denoiser's.
        backend: what captures.

    Attributes:
        num_captured, num_replayed: calls, since the denoiser was divided.

    Raises:
        ConfigError: if the plan lets the host decide by values, or messages cannot be captured.
    """

    def __init__(self, plan: Plan, exchange: Exchange, backend: Backend) -> None:
        check_plan(plan)
        self.num_captured = self.num_replayed = 0
        self._exchange = exchange
        self._backend = backend
        self._transport = exchange.transport = backend.carrying(exchange.transport)
        self._found: dict[Hashable, _Graph | None] = {}
        # A message that is under way between two graphs could be waited for in neither.
        exchange.settles = True

    def forget(self) -> None:
        """Let go of all captured calls: their kept values are another request's."""
        self._found.clear()

    def run(self, call: Any, policy: CallPolicy, steady: Hashable | None, work: Work) -> Any:
        """The output of a denoiser call. Every rank calls it.

        Args:
            call: its arguments, a DenoiserCall.
            policy: how values are exchanged.
            steady: what the plan does in this call and in others like it; None in calls that are unlike later ones.
            work: the call itself, `work(call, policy)`.
        """
        traced = self._exchange.transport is not self._transport
        if steady is None or traced or torch.is_grad_enabled():  # a replay leaves no gradient
            return work(call, policy)
        key = (steady, _kind_of(call, policy), id(policy.state), _buffers(policy))
        if key not in self._found:
            self._found[key] = None
            if not self._finds_all_made(policy):
                return work(call, policy)
        if self._found[key] is None and not _is_steady(policy):
            return work(call, policy)
        tensors = _tensors(call, policy)
        graph = self._found[key]
        if graph is None:
            before = _kept(policy)
            graph = self._capture(call, policy, work)
            # A call that made something to keep will not make it again.
            self._found[key] = graph if _kept(policy) == before else None
        else:
            self._replay(graph, tensors, policy)
        # The next replay writes into the same tensors.
        return map_tensors(graph.output, torch.clone)

    def _finds_all_made(self, policy: CallPolicy) -> bool:
        """Whether already the first call of its kind makes nothing that later ones would find."""
        state = policy.state
        if not self._backend.captures_first or state is None or not policy.stale or state.calls < 2:
            return False
        state.pack()
        return True

    def _capture(self, call: Any, policy: CallPolicy, work: Work) -> _Graph:
        device = call.sample.device
        inputs: list[torch.Tensor] = []

        def fixed(tensor: torch.Tensor) -> torch.Tensor:
            # On the device: a number in the host's memory would be captured as it is now.
            inputs.append(tensor.to(device, copy=True))
            return inputs[-1]

        call, policy = call.map(fixed), replace(policy, forecast=map_tensors(policy.forecast, fixed))
        gathers = list(policy.state.gathers.values()) if policy.state else []
        read = [entry.buffer for entry in gathers]
        sent, num_posts = Counter(self._exchange.bytes_sent), self._exchange.num_posts
        try:
            output, again = self._backend.capture(lambda: work(call, policy))
        except RuntimeError as error:
            raise ConfigError(f"this denoiser cannot be captured; leave out graphs: {error}") from error
        self.num_captured += 1
        turned = [entry for entry, before in zip(gathers, read, strict=True) if entry.buffer is not before]
        return _Graph(
            inputs, output, again, turned, self._exchange.bytes_sent - sent, self._exchange.num_posts - num_posts
        )

    def _replay(self, graph: _Graph, tensors: list[torch.Tensor], policy: CallPolicy) -> None:
        for fixed, tensor in zip(graph.inputs, tensors, strict=True):
            fixed.copy_(tensor)
        graph.replay()
        self.num_replayed += 1
        for entry in graph.turned:
            entry.turn()
        self._exchange.repeated(policy, graph.sent, graph.num_posts)


def _kind_of(call: Any, policy: CallPolicy) -> str:
    """Everything that the host reads of a call's arguments, and which tensors there are."""
    kind = call.map(lambda tensor: (tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
    return repr((kind, policy.forecast if isinstance(policy.forecast, float) else "a tensor"))


def _buffers(policy: CallPolicy) -> tuple[int, ...]:
    """Which of two buffers each kept value is read from."""
    return tuple(entry.buffer.data_ptr() for entry in policy.state.gathers.values()) if policy.state else ()


def _is_steady(policy: CallPolicy) -> bool:
    """Whether later calls treat every kept value as this one does."""
    return policy.state is None or all(entry.is_steady for entry in policy.state.gathers.values())


def _kept(policy: CallPolicy) -> set[int]:
    """Everything that is kept between calls."""
    return {id(posted) for posted in policy.state.posted()} if policy.state else set()


def _tensors(call: Any, policy: CallPolicy) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    call.map(found.append)
    map_tensors(policy.forecast, found.append)
    return found
