"""Pictures of real processes: decoded together, on all ranks or on the first; prompts encoded once."""

from __future__ import annotations

import pytest
import torch
from small_pipelines import PIPELINES, Call
from work import encode_noise, paint
from world import GlooWorld

from models import relative_error

EXACT = 1e-5
CALL = Call({"height": 200, "width": 136, "num_inference_steps": 2})


@pytest.fixture(scope="module")
def plain_picture() -> torch.Tensor:
    generator = torch.Generator().manual_seed(CALL.seed)
    return PIPELINES["sdxl"]("euler")("a calm lake", **CALL.arguments, output_type="pt", generator=generator).images


@pytest.mark.supports("feature", "pictures on the first rank only")
@pytest.mark.parametrize("plan", ["patch3", "cfg2.patch2"])
@pytest.mark.parametrize("pictures", ["all", "first"])
def test_a_picture_equals_the_plain_pipelines(
    gloo: GlooWorld, plain_picture: torch.Tensor, plan: str, pictures: str
) -> None:
    first, *others = gloo.run(paint, plan, pictures, CALL, ranks=3 if plan == "patch3" else 4)
    assert relative_error(first, plain_picture) <= EXACT
    assert all(other is None if pictures == "first" else torch.equal(other, first) for other in others)


def test_random_numbers_that_encoding_draws_are_drawn_by_all(gloo: GlooWorld) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3), torch.rand(3)
    for answer in gloo.run(encode_noise, ranks=3):
        assert all(torch.equal(got, wanted) for got, wanted in zip(answer, expected, strict=True))
