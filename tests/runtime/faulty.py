"""A pipeline in workers whose ranks fail on order, and the ways and places in which they can."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

# Where a rank of the faulty pipeline looks for its order, in the sequence of a call: "loop" is the begin of a denoiser
# call and "middle" its middle block. "setting" is a method by itself.
PLACES = ("text", "loop", "middle", "vae", "setting")


@dataclass(frozen=True)
class Order:
    """What one rank is to do.

    Attributes:
        fault: "raise", "memory", "kill", "stop" or "hang".
        place: one of PLACES.
        rank: the rank that does it, None for all.
        passed: how often the place is passed before.
    """

    fault: str
    place: str
    rank: int | None = 1
    passed: int = 0


def faulty(folder: Path, order: Path) -> Callable[[], Any]:
    """A factory of a pipeline whose ranks do what the file `order` says, an `Order` as JSON."""

    def build() -> Any:
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        passed = dict.fromkeys(PLACES, 0)
        text = [""]

        def obey(place: str) -> None:
            found = order.read_text() if order.exists() else ""
            if found != text[0]:
                text[0] = found
                passed.update(dict.fromkeys(PLACES, 0))
            passed[place] += 1
            if not found:
                return
            wanted = json.loads(found)
            here = wanted["place"] == place and wanted["rank"] in (None, torch.distributed.get_rank())
            if here and passed[place] == wanted["passed"] + 1:
                fail(wanted["fault"])

        def fail(fault: str) -> None:
            match fault:
                case "raise":
                    raise LookupError("of this rank")
                case "memory":
                    torch.empty(1 << 60, dtype=torch.uint8)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hang":
                    time.sleep(1000)

        decode = pipe.vae.decode

        def decode_or_fail(*args: Any, **kwargs: Any) -> Any:
            obey("vae")
            return decode(*args, **kwargs)

        pipe.text_encoder.register_forward_pre_hook(lambda *_: obey("text"))
        pipe.unet.register_forward_pre_hook(lambda *_: obey("loop"))
        pipe.unet.mid_block.register_forward_pre_hook(lambda *_: obey("middle"))
        pipe.vae.decode = decode_or_fail
        pipe.vae.enable_tiling = lambda: obey("setting")
        return pipe

    return build


def give(order: Path, what: Order) -> None:
    """Let the ranks find an order, whole."""
    fresh = order.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(what)))
    fresh.replace(order)


def hit(pid: int, fault: str) -> None:
    """Kill or stop a process from outside."""
    os.kill(pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def outcome(call: Callable[[], Any], limit: float = 100.0) -> Any:
    """What `call` returns or raises; a call that takes `limit` seconds is taken for one that never ends."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(call())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    assert box, f"no answer after {limit:g} s"
    return box[0]


def is_alive(pid: int) -> bool:
    """True if a thread of the process runs; a zombie does not."""
    states = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return any(state not in "ZX" for state in states)


def parent_of(pid: int) -> int:
    """The process that started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone_within(pids: Any, seconds: float) -> bool:
    """True if all processes are gone by then."""
    until = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
