"""What components send in a call, against the shapes of what they take; and the gates, which see what is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks
from listening import traffic

from distrifusion import Plan, UnsupportedModel
from distrifusion.anatomy import anatomy_of
from distrifusion.exchange.relay import Relay
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.depth import divide
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.components import ComponentStrategy
from distrifusion.strategies.watching import Seen, Watch
from models import moved, unet_inputs
from transformers_tiny import FAMILIES

Break = Callable[[pytest.MonkeyPatch], None]
FP32, FAR_OVER = 4, 1e-3


def watched(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Seen]:
    """The layers of a chain, as one call shows them."""
    watch, attachment = Watch(), Attachment()

    def layer(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: watch.run(name, forward, args, kwargs)

    for site in anatomy_of(model).links(model):
        attachment.replace(site.module, "forward", lambda forward, name=site.name: layer(name, forward))
    with torch.no_grad(), watch:
        model(**inputs)
    attachment.detach()
    return watch.seen


def expected(seen: Sequence[Seen], plan: Plan, component: int, prediction: int, runs: bool) -> Counter[str]:
    """Bytes by kind: what others read to each that does, the prediction to all, and a byte that says one is here."""
    depth = divide([use.layer for use in seen], plan.components, plan.stride)
    others = plan.num_ranks - 1
    hidden = 0
    for place, use in enumerate(seen):
        tensors = use.output if isinstance(use.output, tuple) else (use.output,)
        size = FP32 * sum(tensor.numel() for tensor in tensors if tensor is not None)
        hidden += size * len(depth.takers(place)) if depth.owner[place] == component else 0
    last = component == plan.components - 1
    return Counter(exit=others * (1 + (FP32 * prediction if last else 0)), hidden=hidden if runs else 0)


@pytest.mark.parametrize("text", ["async2.sync", "async2.w0", "async3.w0", "async4.forecast.w0", "async2.stride2.w0"])
def test_a_call_of_a_unet_sends_what_the_shapes_say_and_nothing_twice(sdxl: UNet2DConditionModel, text: str) -> None:
    plan, x = Plan.parse(text), unet_inputs(sdxl, 2, 25, 17)
    seen = watched(sdxl, x)
    # With stride 2 the third call is one in which the last component runs alone.
    for num_calls, runs in ((2, True), (3, plan.stride == 1)):
        for component, sent in enumerate(traffic(sdxl, plan, num_calls * [x])):
            last = component == plan.components - 1
            assert Counter(sent.by_kind) == expected(seen, plan, component, 2 * 4 * 25 * 17, runs or last)
            assert sum(message.tensor.nbytes for message in sent.messages) == sum(sent.by_kind.values())


@pytest.mark.parametrize(("family", "prediction"), [("FLUX.1 dev", 2 * 35 * 16), ("SD3", 2 * 4 * 14 * 10)])
def test_a_call_of_a_transformer_sends_the_streams_once(family: str, prediction: int) -> None:
    model, x = FAMILIES[family].make(), FAMILIES[family].inputs(2, *FAMILIES[family].size)
    plan, seen = Plan.parse("async3.w0"), watched(model, x)
    for component, sent in enumerate(traffic(model, plan, [x, x])):
        assert Counter(sent.by_kind) == expected(seen, plan, component, prediction, True)
    streams = FP32 * 2 * (7 + 35) * 24
    assert expected(seen, plan, 0, prediction, True)["hidden"] == streams


def test_the_first_call_of_a_kind_sends_what_all_others_do(sdxl: UNet2DConditionModel) -> None:
    plan, x = Plan.parse("async3.w0"), unet_inputs(sdxl, 1, 17, 9)
    seen = watched(sdxl, x)
    for component, sent in enumerate(traffic(sdxl, plan, [x])):
        assert Counter(sent.by_kind) == expected(seen, plan, component, 4 * 17 * 9, True)


def test_a_call_that_runs_whole_sends_nothing_but_presence(sdxl: UNet2DConditionModel) -> None:
    for sent in traffic(sdxl, Plan.parse("async3.timed.w3"), [unet_inputs(sdxl, 1, 17, 9)]):
        assert sent.by_kind == {"exit": 2}


def test_what_reads_what_is_seen_through_what_lies_between(sdxl: UNet2DConditionModel) -> None:
    seen = watched(sdxl, unet_inputs(sdxl, 1, 17, 9))
    reads = {use.name: {seen[place].name for place in use.layer.reads} for use in seen}
    assert reads["conv_in"] == set()
    assert reads["up_blocks.2.resnets.1"] == {"up_blocks.2.resnets.0", "conv_in"}
    assert reads["up_blocks.0.resnets.0"] == {"mid_block.resnets.1", "down_blocks.2.attentions.0"}
    assert reads["conv_out"] == {"conv_norm_out"}
    assert all(use.layer.cost > 0 for use in seen)
    convolution = seen[0].layer.cost
    assert convolution == 17 * 9 * 16 * 2 * 4 * 9


# Broken on purpose


def nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Relay.read
    monkeypatch.setattr(Relay, "read", lambda self, weight: [torch.zeros_like(t) for t in intact(self, weight)])


def nothing_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Exchange.give
    first: dict[str, list[torch.Tensor]] = {}

    def give(self: Exchange, site: str, value: Sequence[torch.Tensor], takers: Sequence[int]) -> None:
        intact(self, site, first.setdefault(site, [tensor.clone() for tensor in value]), takers)

    monkeypatch.setattr(Exchange, "give", give)


def a_read_is_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers that one reads, only the latest is seen: skip connections are not."""
    intact = Watch._sources

    def sources(self: Watch, value: Any) -> frozenset[int]:
        found = intact(self, value)
        return frozenset((max(found),)) if found and self._cost is None else found

    monkeypatch.setattr(Watch, "_sources", sources)


def what_is_added_lies_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = ComponentStrategy._of_stream

    def of_stream(self: ComponentStrategy, output: Any, sign: int) -> list[torch.Tensor]:
        return intact(self, output, sign) if sign < 0 else list(output)

    monkeypatch.setattr(ComponentStrategy, "_of_stream", of_stream)


@pytest.mark.parametrize(
    ("spoil", "plan"),
    [
        (nothing_arrives, "async2.sync"),
        (nothing_arrives, "async3.w0"),
        (nothing_is_renewed, "async2.sync"),
        (nothing_is_renewed, "async3.w1"),
        (a_read_is_overlooked, "async3.sync"),
        (a_read_is_overlooked, "async3.w0"),
    ],
)
def test_the_gates_of_a_unet_see(
    sdxl: UNet2DConditionModel, spoil: Break, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x, 0.5)
    steps = [x, x, *4 * [y]]
    assert errors(sdxl, plan, steps)[-1] <= EXACT
    spoil(monkeypatch)
    assert errors(sdxl, plan, steps)[-1] > FAR_OVER


@pytest.mark.parametrize("spoil", [nothing_arrives, nothing_is_renewed, what_is_added_lies_on_nothing])
@pytest.mark.parametrize("plan", ["async2.sync", "async2.w1"])
def test_the_gates_of_transformers_see(spoil: Break, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = FAMILIES["SD3"].make(), FAMILIES["SD3"].inputs(1, *FAMILIES["SD3"].size)
    y = moved(x, 0.5)
    spoil(monkeypatch)
    assert errors(model, plan, [x, x, y, y, y, y])[-1] > FAR_OVER


def test_a_layer_that_ran_otherwise_than_it_was_seen_is_named(sdxl: UNet2DConditionModel) -> None:
    """No word about it would be a picture made of zeros."""
    x = unet_inputs(sdxl, 1, 17, 9)

    def work(model: Any, denoiser: Any) -> None:
        model(**x)
        model.mid_block.attentions = torch.nn.ModuleList()
        model(**x)

    with pytest.raises(UnsupportedModel, match="what a model runs must not change"):
        on_ranks(sdxl, "async2.sync", work)
