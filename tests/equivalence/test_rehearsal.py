"""What is rehearsed without values and without peers is what ranks compute and send: counted, on tiny classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from division import on_ranks
from listening import traffic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.memory.prediction import pool_bytes
from distrifusion.nested import map_tensors
from distrifusion.planner.operations import Counting, LayerKind
from distrifusion.planner.rehearsal import Heard, rehearse
from models import UNETS, moved, sdxl_unet, share_weights, unet_inputs
from transformers_tiny import FAMILIES


def on_meta(value: Any) -> Any:
    return map_tensors(value, lambda x: x.to("meta"))


def operations_of(model: torch.nn.Module, inputs: dict[str, Any]) -> Counter[LayerKind]:
    with torch.no_grad(), Counting() as counting:
        model(**inputs)
    return counting.operations.flops


def asked(plan: Plan) -> Counter[str]:
    """Where something is kept, ranks first tell each other their place and what is free there: bytes by kind."""
    return Counter(exit=2 * 8 * (plan.num_ranks - 1)) if plan.kept else Counter[str]()


@pytest.mark.parametrize("name", UNETS)
def test_operations_of_a_unet_are_those_that_torch_counts(name: str) -> None:
    unet = UNETS[name]()
    inputs = unet_inputs(unet, 2, 20, 16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    real = operations_of(unet, inputs)
    assert real.total() == counter.get_total_flops()
    assert set(real) == set(LayerKind) and min(real.values()) > 0
    assert operations_of(share_weights(unet).to("meta"), on_meta(inputs)) == real


@pytest.mark.parametrize("name", ["SD3", "FLUX.1 dev", "PixArt-Sigma", "Hunyuan-DiT"])
def test_operations_of_a_transformer_are_those_that_torch_counts(name: str) -> None:
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs(2, 8, 6)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert operations_of(model, inputs).total() == counter.get_total_flops()
    assert operations_of(model.to("meta"), on_meta(inputs)).total() == counter.get_total_flops()


@pytest.mark.parametrize(
    "text",
    [
        "patch2",
        "patch3",
        "cfg2.patch2",
        "patch3.displaced.w0",
        "cfg2.patch2.displaced.all.w0",
        "patch2.displaced.forecast.w0",
        "patch3.delta4",
        "patch2.displaced.delta8.w0",
        "dp2",
    ],
)
def test_every_rank_of_a_unet_sends_the_bytes_that_it_rehearsed(text: str) -> None:
    plan = Plan.parse(text)
    unet = sdxl_unet()
    inputs = unet_inputs(unet, 2, 20, 16)
    first, later = traffic(unet, plan, [inputs]), traffic(unet, plan, [inputs, moved(inputs)])
    meta = share_weights(unet).to("meta")
    for rank in range(plan.num_ranks):
        rehearsed = rehearse(meta, plan, on_meta(inputs), rank)
        assert rehearsed.fresh.sent + asked(plan) == Counter(first[rank].by_kind)
        assert rehearsed.steady.sent == Counter(later[rank].by_kind)
        steady = rehearsed.steady
        assert steady.kept == pool_bytes(meta, plan, rank, inputs["sample"].shape, torch.float32).total()
        to_peers = sum((Counter(post.sent) for post in steady.posts), Counter[int]())
        really = Counter[int]()
        for message in later[rank].messages:
            really[message.peer] += message.tensor.nbytes
        assert to_peers == really


@pytest.mark.parametrize(
    ("family", "text"),
    [
        *(("FLUX.1 dev", text) for text in ("patch2.displaced.w0", "ring3", "ulysses2.ring2")),
        *(("SD3", text) for text in ("ulysses2", "patch3.displaced.w0")),
    ],
)
def test_every_rank_of_a_transformer_sends_the_bytes_that_it_rehearsed(family: str, text: str) -> None:
    """35 tokens and 7 words divide among none of these: each rank hears what the others have."""
    plan = Plan.parse(text)
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2, *FAMILIES[family].size)
    first, later = traffic(model, plan, [inputs]), traffic(model, plan, [inputs, moved(inputs)])
    meta = share_weights(model).to("meta")
    heard: Heard = {}
    for rank in range(plan.num_ranks):
        rehearsed = rehearse(meta, plan, on_meta(inputs), rank, heard)
        assert rehearsed.fresh.sent + asked(plan) == Counter(first[rank].by_kind)
        assert rehearsed.steady.sent == Counter(later[rank].by_kind)


IN_DEPTH = ["tp3", "cfg2.tp2", "async2.sync", "async3.forecast.w0", "async2.stride2.w0"]


def calls_of(model: torch.nn.Module, plan: Plan, inputs: dict[str, Any], num_calls: int) -> list[list[Counter[Any]]]:
    """Operations by kind of layer of every call, by rank, counted while ranks draw."""

    def work(own: Any, denoiser: ParallelDenoiser) -> list[Counter[Any]]:
        found = []
        if plan.components > 1:
            own(**inputs)  # foreseen without values, which would be counted too
        denoiser.open("request")
        for _ in range(num_calls):
            denoiser.slot = 0
            found.append(operations_of(own, inputs))
        denoiser.close()
        return found

    return on_ranks(model, str(plan), work)


def check_rehearsed(model: torch.nn.Module, text: str, inputs: dict[str, Any]) -> None:
    """Every rank computes and sends in each call what it rehearsed, exactly."""
    plan = Plan.parse(text)
    num_calls = 1 + plan.stride
    computed, weights = calls_of(model, plan, inputs, num_calls), weight_bytes(model, plan, inputs)
    sent = [traffic(model, plan, (n + 1) * [inputs]) for n in range(num_calls)]
    meta = share_weights(model).to("meta")
    for rank in range(plan.num_ranks):
        rehearsed = rehearse(meta, plan, on_meta(inputs), rank)
        calls = [rehearsed.fresh, *rehearsed.cycle]
        assert [call.operations.flops for call in calls] == computed[rank]
        for call, traffics in zip(calls, sent, strict=True):
            assert call.sent == Counter({kind: n for kind, n in traffics[rank].by_kind.items() if n})
        assert rehearsed.weights == weights[rank]


def weight_bytes(model: torch.nn.Module, plan: Plan, inputs: dict[str, Any]) -> list[int]:
    def work(own: Any, denoiser: ParallelDenoiser) -> int:
        own(**inputs)
        return denoiser.weight_bytes

    return on_ranks(model, str(plan), work)


@pytest.mark.parametrize("text", IN_DEPTH)
def test_ranks_of_a_unet_with_weights_of_their_own_do_what_they_rehearsed(text: str) -> None:
    unet = sdxl_unet()
    check_rehearsed(unet, text, unet_inputs(unet, 2, 20, 16))


@pytest.mark.usefixtures("unchecked")  # passes without values would be counted as operations of a call
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("FLUX.1 dev", "tp2"),
        ("FLUX.1 dev", "async2.w0"),
        ("FLUX.1 dev", "pipe2.m4.w0"),
        ("SD3", "pipe2.sync"),
        ("SD3", "cfg2.pipe2.m2.w0"),
        ("PixArt-Sigma", "tp3"),
        ("FLUX.1 dev", "pipe2.ulysses2.m2.w0"),
    ],
)
def test_ranks_of_a_transformer_with_weights_of_their_own_do_what_they_rehearsed(family: str, text: str) -> None:
    model = FAMILIES[family].make()
    check_rehearsed(model, text, FAMILIES[family].inputs(2, 8, 6))


def test_the_busiest_stage_or_component_is_rehearsed() -> None:
    meta, inputs = FAMILIES["SD3"].make().to("meta"), on_meta(FAMILIES["SD3"].inputs(2, 8, 6))
    for text in ("pipe2.m2", "pipe3.m3", "async2", "async3", "async2.stride2"):
        plan = Plan.parse(text)
        works = [rehearse(meta, plan, inputs, rank).work for rank in range(plan.num_ranks)]
        assert rehearse(meta, plan, inputs).work == max(works)


@pytest.mark.parametrize("size", [(7, 5), (8, 6)])
def test_what_was_heard_in_one_plan_holds_in_others(size: tuple[int, int]) -> None:
    meta, inputs = FAMILIES["SD3"].make().to("meta"), on_meta(FAMILIES["SD3"].inputs(2, 2 * size[0], 2 * size[1]))
    heard: Heard = {}
    for text in ("patch2", "ulysses2", "cfg2.patch2", "patch2.displaced", "tp2", "pipe2.m2"):
        assert rehearse(meta, Plan.parse(text), inputs, heard=heard) == rehearse(meta, Plan.parse(text), inputs)
    assert set(heard) == {(0, 1)}


def test_what_is_displaced_is_not_waited_for_in_its_call() -> None:
    meta, inputs = sdxl_unet().to("meta"), on_meta(unet_inputs(sdxl_unet(), 2, 20, 16))
    fresh, stale, last, everything = (
        rehearse(meta, Plan.parse(text), inputs).steady
        for text in ("patch2", "patch2.displaced", "patch2.displaced.fresh1", "patch2.displaced.all")
    )
    assert all(post.waited for post in fresh.posts)
    later = sum(sum(post.sent.values()) for post in stale.posts if not post.waited)
    assert later == stale.sent["kv"]
    assert [post.waited for post in everything.posts].count(True) == 1  # the prediction
    num_waits = [[post.waited for post in call.posts].count(True) for call in (stale, last)]
    assert num_waits[1] == num_waits[0] + 1 and last.sent == stale.sent and last.kept == stale.kept


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    meta, inputs = sdxl_unet().to("meta"), on_meta(unet_inputs(sdxl_unet(), 2, 20, 16))
    rehearse(meta, Plan.parse("patch2.displaced"), inputs)
    assert not any("forward" in vars(module) for module in meta.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in meta.modules())


def test_ranks_together_compute_what_one_does_and_little_more() -> None:
    meta, inputs = sdxl_unet().to("meta"), on_meta(unet_inputs(sdxl_unet(), 2, 20, 16))
    alone = operations_of(meta, inputs).total()
    for text in ("cfg2", "patch2", "cfg2.patch2"):
        plan = Plan.parse(text)
        ranks = [rehearse(meta, plan, inputs, r).fresh.operations.total for r in range(plan.num_ranks)]
        assert alone <= sum(ranks) <= 1.3 * alone
        assert max(ranks) < alone
