"""What the caller can ask of a worker; each is pickled, sent and carried out by `worker.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distrifusion.memory.use import MemoryUse
from distrifusion.runtime.randomness import Randomness
from distrifusion.runtime.source import Source
from distrifusion.runtime.timing import RunTimes
from distrifusion.timeline import RankTimeline


@dataclass(frozen=True)
class Open:
    """Join the other ranks and open the pipeline. Answer: PipelineFacts.

    Attributes:
        device: this rank's device.
        port: of the caller's TCPStore on this machine.
        threads: CPU threads of this rank.
        limit: seconds after which a collective gives up.
        bars: this rank draws the bars of loading.
        argv: the caller's command line, which a factory of a script may read.
        graphs: as `parallelize` takes it.
    """

    device: str
    backend: str
    plan: str
    port: int
    threads: int
    limit: float
    source: Source
    bars: bool
    argv: tuple[str, ...]
    graphs: bool


@dataclass(frozen=True)
class Call:
    """Call the pipeline. Answer: CallResult.

    Attributes:
        number: of the call, as the caller counts them.
        tensor_inputs: names of tensors the caller's `callback_on_step_end` gets, None if there is none.
        traced: the answer tells what the rank did in the denoiser calls.
        weighed: the answer tells what the rank took of memory.
    """

    number: int
    arguments: Mapping[str, Any]
    randomness: Randomness
    tensor_inputs: tuple[str, ...] | None
    traced: bool
    weighed: bool


@dataclass(frozen=True)
class Get:
    """Read an attribute of the pipeline. Answer: Value, Method or Component."""

    path: str


@dataclass(frozen=True)
class Set:
    """Set an attribute that the pipeline has. Answer: None."""

    path: str
    value: Any


@dataclass(frozen=True)
class Invoke:
    """Call a method. Answer: Value, or Same if it returned the object it belongs to."""

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    randomness: Randomness


@dataclass(frozen=True)
class Value:
    """A plain value, copied to the caller."""

    value: Any


@dataclass(frozen=True)
class Method:
    """The attribute can be called."""


@dataclass(frozen=True)
class Component:
    """The attribute is a module of the pipeline, which stays where it is."""

    kind: str


@dataclass(frozen=True)
class Same:
    """The method returned its own object."""


@dataclass(frozen=True)
class CallResult:
    """What a call gives: rank 0 sends all of it, other ranks only that they are done, and what they did if asked."""

    output: Any = None
    randomness: Randomness | None = None
    times: RunTimes | None = None
    timeline: RankTimeline | None = None
    memory: MemoryUse | None = None
