"""What a cut by tokens cannot do is refused by name, before or in the first call."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, SanaTransformer2DModel, UNet2DConditionModel
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.attention_processor import AttnProcessor
from division import EXACT, errors, on_ranks
from torch import nn

from distrifusion import ConfigError, Plan, PlanError, UnsupportedModel, anatomy
from distrifusion.anatomy.tokens import Cut, Join, TokenAnatomy
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import sdxl_unet
from transformers_tiny import flux, flux_inputs, hunyuan, pixart, pixart_inputs, sd3, sd3_inputs, wan

TWO = Plan(patch=2)


def divide(model: nn.Module, plan: str = "patch2") -> ParallelDenoiser:
    parsed = Plan.parse(plan)
    denoiser = ParallelDenoiser(model, parsed, VirtualTransport(VirtualWorld(parsed.num_ranks), 0))
    denoiser.attach()
    return denoiser


# Plans


@pytest.mark.parametrize(
    ("plan", "remedy"),
    [
        ("patch2.columns", "use 'patch2'"),
        ("cfg2.patch2.columns.displaced", r"use 'cfg2.patch2.displaced.w4'"),
        ("patch2.naive.alternating", "use 'patch2.naive.w0'"),
        ("patch2.displaced.halo", "use 'patch2'"),
        ("patch2.displaced.kv.norm", r"use 'patch2.displaced.w4'"),
        ("patch2.displaced.all.stalenorm", r"use 'patch2.displaced.all.w4'"),
    ],
)
def test_words_that_say_nothing_to_a_transformer_are_refused_with_a_plan_that_works(plan: str, remedy: str) -> None:
    with pytest.raises(PlanError, match=rf"SD3Transformer2DModel is cut by tokens.*{remedy}"):
        divide(sd3(), plan)


@pytest.mark.parametrize(
    ("plan", "remedy"), [("ulysses2", "patch2"), ("ring3", "patch3"), ("cfg2.ulysses2.ring2", "cfg2.patch4")]
)
def test_a_unet_has_more_than_attention(plan: str, remedy: str) -> None:
    with pytest.raises(PlanError, match=rf"UNet2DConditionModel has convolutions too; use '{remedy}'"):
        divide(sdxl_unet(), plan)


# Layers


def test_a_processor_without_a_rule_is_named() -> None:
    model = pixart()
    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with pytest.raises(UnsupportedModel, match=r"'transformer_blocks.1.attn1'.*AttnProcessor has no rule"):
        divide(model)
    other = flux()
    other.single_transformer_blocks[0].attn.processor = AttnProcessor()
    with pytest.raises(UnsupportedModel, match=r"'single_transformer_blocks.0.attn'.*AttnProcessor has no rule"):
        divide(other)


def test_a_processor_put_on_between_runs_is_found_when_the_next_begins() -> None:
    model = pixart()
    denoiser = divide(model, "patch1")
    denoiser.open("first")
    model(**pixart_inputs(1, 6, 6))
    denoiser.close()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    denoiser.open("second")
    with pytest.raises(UnsupportedModel, match="AttnProcessor"):
        model(**pixart_inputs(1, 6, 6))


def test_attention_by_another_kernel_is_named_in_the_first_call() -> None:
    """Its queries would see the own keys alone, and nothing would say so."""
    model = flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor = type("FluxAttnProcessor", (type(block.attn.processor),), {"__call__": _by_hand})()
    with pytest.raises(UnsupportedModel, match=r"'transformer_blocks.0.attn' called scaled_dot_product_attention 0 "):
        errors(model, "patch2", [flux_inputs(1, 3, 3)])


def _by_hand(self: Any, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *_: Any) -> Any:
    return (hidden_states, encoder_hidden_states) if encoder_hidden_states is not None else hidden_states


def test_a_layer_that_may_mix_positions_is_named() -> None:
    model = sd3()
    model.transformer_blocks[1].ff.net.append(nn.Conv1d(24, 24, 3, padding=1))
    with pytest.raises(UnsupportedModel, match=r"'transformer_blocks.1.ff.net.3' \(Conv1d\).*may mix positions"):
        divide(model)


def test_a_compiled_block_is_named() -> None:
    model = wan()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"'blocks.0' .*compiled"):
        divide(model)


def test_a_family_without_anatomy_is_refused_by_its_name() -> None:
    with torch.device("meta"):
        model = SanaTransformer2DModel(num_layers=1)
    with pytest.raises(UnsupportedModel, match=r"SanaTransformer2DModel has no anatomy here.*adding-a-model.md"):
        divide(model)


def test_a_plan_of_diffusers_that_says_more_than_is_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {**wan()._cp_plan, "blocks.0": {"hidden_states": [ContextParallelInput(split_dim=1)]}}
    monkeypatch.setattr(type(wan()), "_cp_plan", plan)
    with pytest.raises(UnsupportedModel, match=r"WanTransformer3DModel: .* says of 'blocks.0' what has no rule"):
        divide(wan())


def test_a_module_that_an_anatomy_tells_of_must_be_there() -> None:
    tale = TokenAnatomy((Cut("pos_embed", 0, 1), Cut("words", 0, 1)), (Join("proj_out", 1),), ())
    with pytest.raises(UnsupportedModel, match="SD3Transformer2DModel has no module 'words'"):
        tale.sites(sd3())


# Arguments


@pytest.mark.parametrize(
    ("make", "inputs", "more", "named"),
    [
        (pixart, pixart_inputs, {"attention_mask": torch.ones(1, 9)}, "attention_mask over picture positions"),
        (
            sd3,
            sd3_inputs,
            {"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.ones(1, 2, 4)}},
            "ip_adapter_image_embeds: image prompts",
        ),
        (
            flux,
            flux_inputs,
            {"joint_attention_kwargs": {"ip_hidden_states": [torch.ones(1, 2, 4)]}},
            "ip_hidden_states",
        ),
    ],
)
def test_an_argument_without_a_rule_is_named(make: Any, inputs: Any, more: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        on_ranks(make(), "patch2", lambda model, _: model(**inputs(1, 6, 6), **more))


def test_the_scale_of_an_adapter_is_no_argument_to_refuse() -> None:
    assert max(errors(sd3(), "patch2", [{**sd3_inputs(1, 6, 6), "joint_attention_kwargs": {"scale": 1.0}}])) <= EXACT


# Detaching


@pytest.mark.parametrize("make", [sd3, flux, pixart, hunyuan, wan])
def test_detaching_restores_every_attribute(make: Any) -> None:
    model = make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    parameters = dict(model.state_dict(keep_vars=True))
    denoiser = divide(model, "patch2.displaced")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} != before
    assert all(tensor is parameters[name] for name, tensor in model.state_dict(keep_vars=True).items())
    denoiser.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_detached_model_gives_the_bits_it_gave_before() -> None:
    inputs = sd3_inputs(2, 14, 10)
    with torch.no_grad():
        reference = sd3()(**inputs).sample

    def work(model: Any, denoiser: ParallelDenoiser) -> torch.Tensor:
        model(**inputs)
        denoiser.detach()
        return model(**inputs).sample

    assert all(torch.equal(output, reference) for output in on_ranks(sd3(), "ulysses2", work))


# Families of other packages

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place on the path for another package, whose entry points are looked for anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    anatomy._outside.cache_clear()
    yield tmp_path
    anatomy._outside.cache_clear()
    sys.modules.pop("auraflow_bands", None)


def install(folder: Path, entry: str) -> None:
    """What pip leaves of a package: its metadata."""
    info = folder / "auraflow_bands-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: auraflow-bands\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{anatomy.ENTRY_POINTS}]\n{entry}\n")


def auraflow() -> AuraFlowTransformer2DModel:
    torch.manual_seed(0)
    return AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, out_channels=4, pos_embed_max_size=16,
    ).eval()  # fmt: skip


def test_an_anatomy_of_another_package_is_found_by_its_entry_point(outside: Path) -> None:
    with pytest.raises(UnsupportedModel, match="AuraFlowTransformer2DModel has no anatomy here"):
        divide(auraflow())
    anatomy._outside.cache_clear()
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code, "the document shows an anatomy"
    (outside / "auraflow_bands.py").write_text(code[1])
    install(outside, "AuraFlowTransformer2DModel = auraflow_bands:anatomy")
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([0.5]),
    }
    anatomy.check_family(AuraFlowTransformer2DModel)
    assert max(errors(auraflow(), "patch2", [inputs])) <= EXACT


@pytest.mark.parametrize("entry", ["no_such_module:anatomy", "json:no_such_name"])
def test_an_entry_point_that_cannot_be_imported_is_named(outside: Path, entry: str) -> None:
    install(outside, f"AuraFlowTransformer2DModel = {entry}")
    with pytest.raises(UnsupportedModel, match=rf"AuraFlowTransformer2DModel is said to be '{entry}'"):
        divide(auraflow())


def test_unets_are_no_transformers() -> None:
    anatomy.check_family(UNet2DConditionModel)
    with pytest.raises(UnsupportedModel, match="AutoencoderKL has no anatomy"):
        anatomy.check_family(AutoencoderKL)
