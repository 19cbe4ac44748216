"""What the ranks do: every function here runs in each of them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from small_pipelines import PIPELINES, Call
from torch.distributed.device_mesh import DeviceMesh

from distrifusion import Plan, RankFailed, StepTimeout, parallelize, trace, unparallelize
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.shared_memory import SharedMemoryTransport
from distrifusion.exchange.transport import Message, ProcessGroupTransport, Transport
from distrifusion.once import encode_once
from distrifusion.timeline import Timeline
from models import run_request, sdxl_unet
from transformers_tiny import flux


def draw(mesh: DeviceMesh, family: str, scheduler: str, plan: str, *calls: Call) -> list[torch.Tensor]:
    """The latents of calls of one parallelized pipeline, one after the other."""
    pipe = parallelize(PIPELINES[family](scheduler), plan, mesh=mesh)
    return [call(pipe, rank=mesh.get_rank()) for call in calls]


def draw_fresh(mesh: DeviceMesh, family: str, scheduler: str, plan: str, *calls: Call) -> list[torch.Tensor]:
    """As `draw`, with a new pipeline for every call."""
    return [draw(mesh, family, scheduler, plan, call)[0] for call in calls]


def draw_replayed(
    mesh: DeviceMesh, family: str, scheduler: str, plan: str, *calls: Call
) -> tuple[bool, tuple[int, int]]:
    """Whether calls that are captured and replayed give the bits of plain ones; denoiser calls captured, replayed."""
    plain = draw(mesh, family, scheduler, plan, *calls)
    pipe = parallelize(PIPELINES[family](scheduler), plan, mesh=mesh, graphs=True)
    same = [torch.equal(call(pipe, rank=mesh.get_rank()), one) for call, one in zip(calls, plain, strict=True)]
    graphs = pipe._distrifusion.denoisers[0].graphs
    return all(same), (graphs.num_captured, graphs.num_replayed)


def draw_traced(mesh: DeviceMesh, family: str, scheduler: str, plan: str, call: Call) -> Timeline:
    """What the ranks did in a call of a parallelized pipeline."""
    pipe = parallelize(PIPELINES[family](scheduler), plan, mesh=mesh)
    with trace(pipe) as timeline:
        call(pipe, rank=mesh.get_rank())
    return timeline


def draw_unseeded(mesh: DeviceMesh, family: str, scheduler: str, plan: str) -> torch.Tensor:
    """The latents of a call that nobody seeded."""
    pipe = parallelize(PIPELINES[family](scheduler), plan, mesh=mesh)
    torch.seed()
    return pipe("a calm lake", height=136, width=72, num_inference_steps=2, output_type="latent").images


class StopAt:
    """A callback that raises at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == self.step:
            raise InterruptedError("stopped by the callback")
        return kwargs


def draw_after_a_stopped_run(mesh: DeviceMesh, family: str, scheduler: str, plan: str, call: Call) -> torch.Tensor:
    """The latents of a call after one that ended with an error in its third step."""
    pipe = parallelize(PIPELINES[family](scheduler), plan, mesh=mesh)
    with pytest.raises(InterruptedError):
        Call({"num_inference_steps": 4, "callback_on_step_end": StopAt(2)}, seed=1)(pipe, mesh.get_rank())
    return call(pipe, rank=mesh.get_rank())


def shrink_latents(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the latents of the second step."""
    return {"latents": kwargs["latents"] * (0.5 if step == 1 else 1.0)}


def draw_and_restore(mesh: DeviceMesh, family: str, scheduler: str, plan: str, call: Call) -> dict[str, bool]:
    """Whether a pipeline that was parallelized, used and restored is what it was after a plain call."""
    pipe = PIPELINES[family](scheduler)
    before = call(pipe)
    kind, parameters = type(pipe), dict(pipe.unet.state_dict(keep_vars=True))
    names = set(vars(pipe)), set(vars(pipe.scheduler))
    parallelize(pipe, plan, mesh=mesh)
    still_of_its_class = isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    call(pipe, rank=mesh.get_rank())
    unparallelize(pipe)
    after = dict(pipe.unet.state_dict(keep_vars=True))
    return {
        "still of its class": still_of_its_class,
        "class restored": type(pipe) is kind,
        "attributes restored": names == (set(vars(pipe)), set(vars(pipe.scheduler))),
        "forwards restored": not any("forward" in vars(module) for module in pipe.unet.modules()),
        "same parameters": list(after) == list(parameters) and all(after[n] is parameters[n] for n in after),
        "same bits": torch.equal(call(pipe), before),
    }


def draw_with_adapter(mesh: DeviceMesh, family: str, scheduler: str, plan: str | None, call: Call) -> torch.Tensor:
    """The latents with a LoRA that was added after the pipeline was parallelized; plan None is one device."""
    pipe = PIPELINES[family](scheduler)
    if plan is not None:
        parallelize(pipe, plan, mesh=mesh)
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    pipe.unet.eval()
    return call(pipe, rank=mesh.get_rank() if plan is not None else 0)


class Lose:
    """A callback in which the process ends in its second step, as one that is killed for its memory.

    Args:
        silence: seconds for which it says nothing before.
    """

    def __init__(self, silence: float) -> None:
        self.silence = silence

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            time.sleep(self.silence)
            os._exit(9)
        return kwargs


def transport_over(kind: str, group: dist.ProcessGroup) -> Transport:
    """The transport of a kind, "sockets" or "shared memory"."""
    if kind == "sockets":
        return ProcessGroupTransport(group)
    transport = transport_of(group, torch.device("cpu"))
    assert isinstance(transport, SharedMemoryTransport), "ranks of one machine share memory"
    return transport


def draw_until_lost(mesh: DeviceMesh, kind: str, plan: str, limit: float, lose: Lose) -> tuple[str, str]:
    """Rank 1 is lost; the type and text of the error that the others see, whose waits are limited to `limit` s."""
    pipe = PIPELINES["sd"]("ddim")
    parallelize(pipe, plan, mesh=transport_over(kind, dist.new_group(timeout=timedelta(seconds=limit))))
    own = {"callback_on_step_end": lose} if mesh.get_rank() == 1 else {}
    dist.barrier()
    try:
        Call({"num_inference_steps": 4, **own})(pipe, rank=mesh.get_rank())
    except (StepTimeout, RankFailed) as error:
        return type(error).__name__, str(error)
    return "", "no error"


def messages_of_one_tag(mesh: DeviceMesh, kind: str) -> list[float]:
    """What arrives from the other rank when three messages of one tag are waited for last to first."""
    transport = transport_over(kind, mesh.get_group())
    peer = 1 - transport.rank
    own = [torch.tensor([10.0 * transport.rank + i]) for i in range(3)]
    boxes = [torch.zeros(1) for _ in own]
    pending = [
        transport.post([Message(peer, tensor, 5)], [Message(peer, box, 5)])
        for tensor, box in zip(own, boxes, strict=True)
    ]
    for post in reversed(pending):
        post.wait()
    return [box.item() for box in boxes]


def broadcast_words(mesh: DeviceMesh, kind: str) -> list[str]:
    """What a broadcast gives, twice."""
    transport = transport_over(kind, mesh.get_group())
    return [transport.broadcast(f"{word} of {transport.rank}") for word in ("first", "second")]


def paint(mesh: DeviceMesh, plan: str, pictures: str, call: Call) -> Any:
    """The picture of a call, None on a rank that gets none."""
    pipe = parallelize(PIPELINES["sdxl"]("euler"), plan, mesh=mesh, pictures=pictures)
    given = {**call.arguments, "output_type": "pt", "generator": torch.Generator().manual_seed(call.seed)}
    output = pipe("a calm lake", **given)
    return None if output is None else output.images


def encode_noise(mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise drawn where prompts are encoded, and what is drawn next; every rank begins with a seed of its own."""
    torch.manual_seed(mesh.get_rank())
    transport = transport_of(mesh.get_group(), torch.device("cpu"))
    return encode_once(transport, torch.device("cpu"), lambda: torch.randn(3)), torch.rand(3)


def predict(mesh: DeviceMesh, kind: str, plan: str, steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The predictions of one request of a denoiser, one call per step."""
    unet = sdxl_unet()
    denoiser = ParallelDenoiser(unet, Plan.parse(plan), transport_over(kind, mesh.get_group()))
    denoiser.attach()
    with torch.no_grad():
        return run_request(unet, denoiser, steps)


def predict_tokens(mesh: DeviceMesh, kind: str, plans: list[str], steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The last prediction of a request of a transformer, one for every plan."""
    found = []
    for plan in plans:
        model = flux()
        denoiser = ParallelDenoiser(model, Plan.parse(plan), transport_over(kind, mesh.get_group()))
        denoiser.attach()
        with torch.no_grad():
            found.append(run_request(model, denoiser, steps)[-1])
    return found
