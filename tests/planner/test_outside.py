"""What a picture takes outside the denoiser is counted too, and is what ranks really compute and send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blueprints import FAST, SLOW, SPEED
from diffusers import AutoencoderTiny
from transformers import T5Config, T5Model

from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.plan import Plan, Split
from distrifusion.planner.blueprint import open_blueprint
from distrifusion.planner.costs import Costs
from distrifusion.planner.operations import Counting
from distrifusion.planner.outside import rehearse_decoding
from distrifusion.planner.prediction import predict
from equivalence.autoencoders import sd_vae
from models import share_weights
from runtime.tiny import write_sdxl

LATENTS = (1, 4, 13, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("outside"))


@pytest.mark.parametrize(("text", "split"), [("patch1", Split.ROWS), ("cfg2", Split.ROWS), ("patch3", Split.ROWS)])
def test_decoding_is_what_the_rank_that_gets_the_picture_does(text: str, split: Split) -> None:
    vae, plan = sd_vae(), Plan.parse(text)

    def work(transport: VirtualTransport) -> tuple[object, int]:
        own = share_weights(vae)
        coder = ParallelCoder(own.decoder, split, transport, "vae.decoder.")
        coder.attach()
        with torch.no_grad(), coder.calls(Calls.FIRST), Counting() as counting:
            own.decode(torch.zeros(LATENTS))
        return counting.operations.flops, sum(coder.exchange.bytes_sent.values())

    flops, sent = VirtualWorld(plan.num_ranks).run(work)[0]
    rehearsed = rehearse_decoding(share_weights(vae).to("meta"), plan, torch.empty(LATENTS, device="meta"))
    assert rehearsed is not None and rehearsed.operations.flops == flops
    assert sum(sum(post.sent.values()) for post in rehearsed.posts) == sent


def test_an_autoencoder_of_another_kind_is_not_priced() -> None:
    assert rehearse_decoding(AutoencoderTiny(), Plan(), torch.empty(LATENTS, device="meta")) is None


def test_a_picture_takes_its_prompt_and_its_decoding_too(folder: Path) -> None:
    blueprint = open_blueprint(str(folder), torch.float32)
    costs = Costs.of_size(blueprint, 64, 64)
    assert len(costs.encoding()) == 2 and all(work.total > 0 for work in costs.encoding())
    alone, divided = (predict(costs, Plan.parse(text), SPEED, FAST, 4) for text in ("patch1", "patch2"))
    decoding = costs.decoding(Plan())
    assert decoding is not None
    text = sum(SPEED.seconds(work) for work in costs.encoding())
    assert alone.outside == pytest.approx(text + SPEED.seconds(decoding.operations))
    assert text < divided.outside < alone.outside
    assert alone.per_picture == pytest.approx(4 * alone.per_step + alone.outside)
    assert predict(costs, Plan.parse("patch2"), SPEED, SLOW, 4).outside > divided.outside


def test_what_cannot_be_rehearsed_is_left_out_and_said(folder: Path) -> None:
    known = open_blueprint(str(folder), torch.float32)
    costs = Costs.of_size(known, 64, 64)
    assert costs.left_out() == ()
    with torch.device("meta"):
        translator = T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
        tiny = AutoencoderTiny()
    odd = replace(known, encoders={**known.encoders, "text_encoder_3": translator}, unknown={"text_encoder_4": "why"})
    asked = Costs.of_size(odd, 64, 64)
    reasons = {left.part: left.reason for left in asked.left_out()}
    assert reasons.keys() == {"text_encoder_3", "text_encoder_4"} and reasons["text_encoder_4"] == "why"
    assert "T5Model" in reasons["text_encoder_3"] and "ValueError" in reasons["text_encoder_3"]
    assert [work.total for work in asked.encoding()] == [work.total for work in costs.encoding()]
    other = {left.part: left.reason for left in Costs.of_size(replace(known, vae=tiny), 64, 64).left_out()}
    assert "AutoencoderTiny" in other["vae"]
    nothing = Costs(known, known.arguments(64, 64)).left_out()
    assert [left.part for left in nothing] == ["text_encoder", "text_encoder_2", "vae"]


def test_memory_counts_the_decoding(folder: Path) -> None:
    costs = Costs.of_size(open_blueprint(str(folder), torch.float32), 64, 64)
    decoding = costs.decoding(Plan())
    assert decoding is not None
    assert predict(costs, Plan(), SPEED, FAST, 4).memory.activations >= decoding.operations.peak
