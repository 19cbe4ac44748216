"""Every U-Net pipeline of diffusers with its denoiser calls captured and replayed: the bits of plain calls."""

from __future__ import annotations

import pytest
import torch
from families import IMAGE_PROMPTS, PIPELINES
from ranks import own_copy

from distrifusion import parallelize
from distrifusion.exchange.transport import SingleTransport

CASES = {**PIPELINES, **IMAGE_PROMPTS}


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_run_gives_the_bits_of_a_plain_one(name: str) -> None:
    case, pipe = CASES[name], CASES[name].make()
    plain = case(own_copy(pipe), num_inference_steps=5)
    replayed = parallelize(own_copy(pipe), "patch1", SingleTransport(), graphs=True)
    assert torch.equal(case(replayed, num_inference_steps=5), plain)
    graphs = [denoiser.graphs for denoiser in replayed._distrifusion.denoisers]
    assert all(found.num_captured and found.num_replayed for found in graphs)
