"""The second model's training: its loss, and that it sees of a caption exactly what the SD3 pipeline sees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from distrifusion import demo
from distrifusion.demo.folder import export_flow_pipeline
from distrifusion.demo.repeated_token import RepeatedTokenAttention
from distrifusion.demo.transformer import FlowCaptionEncoder, build_transformer, flow_loss
from distrifusion.runtime import source

CAPTIONS = ["", "a lake with reflections at night with pine trees"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    """A pipeline as it is exported, with a denoiser that has learnt nothing and has no zeros."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    model = build_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "transformer")
    export_flow_pipeline(demo.path(), folder / "transformer", folder / "pipeline")
    return source.find(folder / "pipeline", {}).open(torch.device("cpu"))


def test_training_reads_captions_as_the_pipeline_does(pipe: StableDiffusion3Pipeline) -> None:
    expected, _, expected_pooled, _ = pipe.encode_prompt(CAPTIONS, None, None)
    tokens, pooled = FlowCaptionEncoder.from_folder(demo.path())(CAPTIONS)
    num_tokens = pipe.tokenizer.model_max_length
    assert torch.equal(tokens[:, :num_tokens], expected[:, :num_tokens])
    assert torch.equal(pooled, expected_pooled)
    assert tokens.shape[1] == num_tokens + 1
    assert not tokens[:, num_tokens:].any() and not expected[:, num_tokens:].any()


def test_one_token_of_zeros_stands_for_all_of_them(pipe: StableDiffusion3Pipeline) -> None:
    text, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None)
    given = torch.randn(2, 4, 10, 14), text, pooled, torch.tensor([300.0, 900.0])
    short = given[0], text[:, : pipe.tokenizer.model_max_length + 1], *given[2:]
    model, attention = build_transformer(), RepeatedTokenAttention()
    model.load_state_dict(pipe.transformer.state_dict())
    with torch.no_grad():
        expected = model(*given, return_dict=False)[0]
        model.set_attn_processor(attention)
        uncounted = model(*short, return_dict=False)[0]
        attention.repeats = text.shape[1] - pipe.tokenizer.model_max_length
        counted = model(*short, return_dict=False)[0]
    assert (counted - expected).norm() / expected.norm() < 1e-5
    assert (uncounted - expected).norm() / expected.norm() > 1e-2


class _Oracle(nn.Module):
    """Knows the clean latents and answers with the true velocity."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, noisy: Tensor, _tokens: Tensor, _pooled: Tensor, t: Tensor, **_: object) -> tuple[Tensor]:
        return ((noisy - self.clean) / (t / 1000)[:, None, None, None],)


def test_the_velocity_of_the_truth_costs_nothing() -> None:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = (torch.zeros(4, 33, 256), torch.zeros(4, 256))
    assert flow_loss(_Oracle(x), x, text, np.random.default_rng(0)) < 1e-6
    assert flow_loss(_Oracle(x + 1), x, text, np.random.default_rng(0)) > 1e-3


def test_an_untrained_model_predicts_nothing() -> None:
    model: SD3Transformer2DModel = build_transformer()
    with torch.no_grad():
        velocity = model(torch.randn(1, 4, 8, 8), torch.randn(1, 3, 256), torch.randn(1, 256), torch.ones(1)).sample
    assert not velocity.any()


def test_embedded_models_are_found_by_name_and_folder(tmp_path: Path) -> None:
    assert set(demo.MODELS) == {"demo", "demo-dit"}
    for name, model in demo.MODELS.items():
        assert demo.path(name) == model.folder and demo.find(name) is demo.find(model.folder) is model
    assert demo.path() == demo.path("demo")
    assert demo.find(tmp_path) is demo.find("demo-dti") is None
    assert [demo.near(word) for word in ("dmeo", "demo_dit", "demo-dti", "elephant")] == [
        *("demo", "demo-dit", "demo-dit"),
        None,
    ]
