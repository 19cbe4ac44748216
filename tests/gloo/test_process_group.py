"""The transports between processes, by themselves: they keep the promises that the engine relies on."""

from __future__ import annotations

import pytest
import torch
from work import broadcast_words, messages_of_one_tag, predict, predict_tokens
from world import GlooWorld

from distrifusion import Plan
from models import moved, relative_error, sdxl_unet, unet_inputs
from transformers_tiny import flux, flux_inputs

EXACT = 1e-5
on_every_transport = pytest.mark.parametrize("kind", ["sockets", "shared memory"])


@on_every_transport
def test_messages_of_one_tag_meet_in_the_order_of_their_posts_whatever_the_order_of_the_waits(
    gloo: GlooWorld, kind: str
) -> None:
    assert gloo.run(messages_of_one_tag, kind, ranks=2) == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]


@on_every_transport
def test_a_broadcast_gives_rank_zeros_value_to_all(gloo: GlooWorld, kind: str) -> None:
    assert gloo.run(broadcast_words, kind, ranks=3) == 3 * [["first of 0", "second of 0"]]


@on_every_transport
def test_another_shape_within_a_request_starts_synchronously(gloo: GlooWorld, kind: str) -> None:
    """Messages of the first shape are still under way when the second shape's are posted under the same names."""
    unet = sdxl_unet()
    small, large = unet_inputs(unet, 1, 17, 9), unet_inputs(unet, 1, 25, 17)
    steps = [small, moved(small), large, large, small]
    with torch.no_grad():
        references = [unet(**inputs).sample for inputs in steps]
    for outputs in gloo.run(predict, kind, "patch3.displaced.all.w0", steps, ranks=3):
        first, second, third, fourth, _ = map(relative_error, outputs, references)
        assert max(first, third, fourth) <= EXACT
        assert second > 1e-3


@on_every_transport
@pytest.mark.parametrize(
    "plans", [["ulysses4", "ring4", "ulysses2.ring2", "cfg2.ulysses2", "patch4.displaced.w0"], ["ring3", "ulysses3"]]
)
def test_ways_to_divide_attention_run_between_processes(gloo: GlooWorld, kind: str, plans: list[str]) -> None:
    inputs = flux_inputs(2, 7, 5)
    with torch.no_grad():
        reference = flux()(**inputs).sample
    for outputs in gloo.run(predict_tokens, kind, plans, [inputs, inputs], ranks=Plan.parse(plans[0]).num_ranks):
        assert max(relative_error(output, reference) for output in outputs) <= EXACT
