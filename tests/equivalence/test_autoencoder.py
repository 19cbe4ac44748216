"""An autoencoder on any number of ranks equals the one on one device, and each rank holds its band alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autoencoders import VAES, attach, decoded, encoded, flux_vae, on_ranks, sd_vae
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor
from division import EXACT
from test_broken_variants import (
    Break,
    bands_joined_in_reverse,
    halo_from_the_wrong_side,
    halo_of_zeros,
    local_keys_and_values,
    local_norm,
    norm_that_counts_bands_not_rows,
)

from distrifusion.anatomy import vae as anatomy
from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.layout.partition import Interval
from distrifusion.plan import Split
from distrifusion.strategies import strips as strips_of
from models import relative_error, share_weights

Work = Callable[[AutoencoderKL], torch.Tensor]
FAR_OVER = 1e-3

# ranks, direction, batch, rows and columns of the latents, rows and columns that a picture has beyond 8 for each latent
SIZES = [
    (2, Split.ROWS, 1, 25, 17, 0, 0),
    (3, Split.ROWS, 2, 25, 17, 5, 3),
    (4, Split.COLUMNS, 1, 9, 13, 0, 7),
    (3, Split.COLUMNS, 1, 5, 2, 1, 0),  # too few columns to cut at the coarsest resolution
    (4, Split.ROWS, 1, 1, 6, 0, 0),
]


@pytest.fixture(scope="module")
def vaes() -> dict[str, AutoencoderKL]:
    return {name: make() for name, make in VAES.items()}


def works(vae: AutoencoderKL, batch: int, rows: int, columns: int, more: tuple[int, int] = (0, 0)) -> list[Work]:
    """Decoding of latents of a size, and encoding of a picture that gives latents of it."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    picture = (factor * rows + min(more[0], factor - 1), factor * columns + min(more[1], factor - 1))
    return [decoded(vae, batch, rows, columns), encoded(vae, batch, *picture)]


def errors(vae: AutoencoderKL, num_ranks: int, *each: Work, split: Split = Split.ROWS) -> list[float]:
    """The relative error of every work against one device, the worst rank's."""
    with torch.no_grad():
        references = [work(vae) for work in each]
    by_rank = on_ranks(vae, num_ranks, lambda model: [work(model) for work in each], split)
    return [max(relative_error(rank[i], reference) for rank in by_rank) for i, reference in enumerate(references)]


@pytest.mark.supports("feature", "VAE in bands: decode and encode")
@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize(("ranks", "split", "batch", "rows", "columns", "high", "wide"), SIZES)
def test_decoding_and_encoding_equal_one_device(
    vaes: dict[str, AutoencoderKL],
    name: str,
    ranks: int,
    split: Split,
    batch: int,
    rows: int,
    columns: int,
    high: int,
    wide: int,
) -> None:
    vae = vaes[name]
    assert max(errors(vae, ranks, *works(vae, batch, rows, columns, (high, wide)), split=split)) <= EXACT


def test_one_rank_alone_gives_the_bits_of_one_device(vaes: dict[str, AutoencoderKL]) -> None:
    vae = vaes["sd_vae"]
    assert max(errors(vae, 1, *works(vae, 1, 9, 5, (3, 1)))) == 0


def test_all_ranks_have_the_same_bits(vaes: dict[str, AutoencoderKL]) -> None:
    vae = vaes["flux_vae"]
    first, *others = on_ranks(vae, 3, lambda model: [work(model) for work in works(vae, 1, 10, 6)])
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("slicing", [False, True])
def test_tiles_and_slices_of_diffusers_are_divided_calls_of_their_own(slicing: bool) -> None:
    """Tiles of 8x8 latents with overlap, the last of a row one latent wide; diffusers cuts and blends them."""
    vae = sd_vae()
    whole = works(vae, 1 + slicing, 7, 13)
    with torch.no_grad():
        untiled = [work(vae) for work in whole]
        vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        assert all(relative_error(work(vae), plain) > FAR_OVER for work, plain in zip(whole, untiled, strict=True))
    assert max(errors(vae, 3, *whole)) <= EXACT


@pytest.mark.parametrize(
    "change",
    [lambda vae: vae.set_attn_processor(AttnProcessor()), lambda vae: vae.to(memory_format=torch.channels_last)],
)
def test_other_attention_and_memory_format_equal_one_device(change: Callable[[AutoencoderKL], Any]) -> None:
    vae = sd_vae()
    change(vae)
    assert max(errors(vae, 3, *works(vae, 1, 11, 6))) <= EXACT


@pytest.mark.parametrize("split", [Split.ROWS, Split.COLUMNS])
def test_convolutions_in_strips_equal_one_device(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at sizes that no test can afford; strips of one row are among them."""
    vae, lengths = sd_vae(), set()
    intact = strips_of.split_evenly

    def strips(total: int, parts: int) -> tuple[Interval, ...]:
        cut = intact(total, parts)
        lengths.update(map(len, cut))
        return cut

    monkeypatch.setattr(strips_of, "split_evenly", strips)
    monkeypatch.setattr(strips_of, "_STRIP_BYTES", 4096)
    assert max(errors(vae, 3, *works(vae, 1, 10, 6, (1, 3)), split=split)) <= EXACT
    assert {1, 2, 3} <= lengths


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_fp32_as_one_device(dtype: torch.dtype) -> None:
    """A quarter more than one device's own rounding is allowed: where bands meet, sums are taken in another order."""
    vae = flux_vae().to(dtype)
    full = flux_vae()
    full.load_state_dict(vae.state_dict())
    for half, exact in zip(works(vae, 1, 9, 6), works(full, 1, 9, 6), strict=True):
        with torch.no_grad():
            truth, alone = exact(full), half(vae)
        bound = 1.25 * max(relative_error(alone, truth), torch.finfo(dtype).eps)
        for result in on_ranks(vae, 2, half):
            assert result.dtype == dtype
            assert 0 < relative_error(result, truth) <= bound


def test_only_the_first_rank_gets_the_picture(vaes: dict[str, AutoencoderKL]) -> None:
    vae = vaes["sd_vae"]
    decode, encode = works(vae, 1, 9, 6)
    with torch.no_grad():
        picture, moments = decode(vae), encode(vae)

    def work(model: AutoencoderKL) -> tuple[torch.Tensor, int, bool]:
        coder = ParallelCoder.dividing(model.decoder)
        assert coder is not None
        result = decode(model)
        return result, coder.exchange.bytes_sent["exit"], coder.withheld

    first, *others = on_ranks(vae, 3, work, how=Calls.FIRST)
    assert relative_error(first[0], picture) <= EXACT and first[1] == 0
    band = 3 * 8 * picture[0, :, 0].numel() * 4
    for result, sent, withheld in others:
        assert result.shape == picture.shape and not result.any()
        assert sent == band and withheld
    assert max(relative_error(other, moments) for other in on_ranks(vae, 3, encode)) <= EXACT


def test_every_layer_of_a_rank_holds_its_band_alone(vaes: dict[str, AutoencoderKL]) -> None:
    """Nothing but the input and the joined result has all rows; the attention's queries are those of the band."""
    vae = vaes["sd_vae"]

    def work(model: AutoencoderKL) -> set[tuple[str, int]]:
        seen = set()

        def note(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: torch.Tensor) -> None:
                rows = output.shape[2] if output.dim() == 4 else output.shape[1] // 6
                seen.add((name, rows))

            return hook

        for name, layer in model.decoder.named_modules():
            if name and not name.endswith(("to_k", "to_v", "group_norm")):
                layer.register_forward_hook(note(name))
        decoded(vae, 1, 8, 6)(model)
        return seen

    for seen in on_ranks(vae, 4, work):
        assert len(seen) > 30
        # Two rows of latents each.
        assert max(rows for _, rows in seen) == 16
        assert {rows for name, rows in seen if name.startswith("mid_block")} == {2}


def test_outside_a_block_of_calls_each_rank_is_alone(vaes: dict[str, AutoencoderKL]) -> None:
    vae = vaes["sd_vae"]
    each = works(vae, 1, 9, 6)
    with torch.no_grad():
        references = [work(vae) for work in each]

    def body(transport: VirtualTransport) -> list[torch.Tensor]:
        model = share_weights(vae)
        attach(model, transport)
        if transport.rank:
            return references
        with torch.no_grad():
            return [work(model) for work in each]

    for results in VirtualWorld(3, timeout=5.0).run(body):
        assert all(torch.equal(a, b) for a, b in zip(results, references, strict=True))


def test_detaching_restores_every_attribute_and_the_bits() -> None:
    vae = sd_vae()
    decode, encode = works(vae, 1, 9, 6)
    with torch.no_grad():
        references = decode(vae), encode(vae)
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    coders = attach(vae, VirtualTransport(VirtualWorld(2), 0))
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} != before
    for coder in coders:
        coder.detach()
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before
    with torch.no_grad():
        assert torch.equal(decode(vae), references[0]) and torch.equal(encode(vae), references[1])


@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize(
    "spoil",
    [
        halo_of_zeros,
        halo_from_the_wrong_side,
        local_keys_and_values,
        local_norm,
        norm_that_counts_bands_not_rows,
        bands_joined_in_reverse,
    ],
)
def test_the_gate_sees(
    spoil: Break, half: str, vaes: dict[str, AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = vaes["sd_vae"]
    work = works(vae, 1, 10, 4)[half == "encode"]
    spoil(monkeypatch)
    assert errors(vae, 3, work)[0] > FAR_OVER


def test_the_zeros_below_the_picture_are_not_rows_of_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarsest resolution has one row here, so the way there gathers bands that have zeros below them."""
    work = encoded(sd_vae(), 1, 8, 16)
    assert errors(sd_vae(), 2, work)[0] <= EXACT
    intact = anatomy.replace
    monkeypatch.setattr(anatomy, "replace", lambda site, **_: intact(site, padded=0))
    with pytest.raises(RuntimeError, match="Kernel size"):
        errors(sd_vae(), 2, work)


def test_a_layer_without_a_rule_is_named() -> None:
    vae = sd_vae()
    vae.decoder.up_blocks[1].resnets[0].conv2.padding_mode = "circular"
    coder = ParallelCoder(vae.decoder, Split.ROWS, VirtualTransport(VirtualWorld(2), 0), "vae.decoder.")
    with pytest.raises(UnsupportedModel, match=r"vae\.decoder: layer 'up_blocks\.1\.resnets\.0\.conv2'"):
        coder.attach()
    assert not any("forward" in vars(module) for module in vae.modules())


def test_another_kind_of_autoencoder_has_no_anatomy() -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        decoder_block_out_channels=(4,),
        num_decoder_blocks=(1,),
    )
    with pytest.raises(UnsupportedModel, match="DecoderTiny has no anatomy here"):
        ParallelCoder(tiny.decoder, Split.ROWS, VirtualTransport(VirtualWorld(2), 0), "vae.decoder.")


def test_a_rank_that_raises_ends_the_others() -> None:
    vae = sd_vae()

    def work(model: AutoencoderKL) -> torch.Tensor:
        coder = ParallelCoder.dividing(model.decoder)
        assert coder is not None
        if coder.exchange.transport.rank == 1:
            model.decoder.mid_block.register_forward_hook(lambda *_: 1 / 0)
        return decoded(vae, 1, 8, 4)(model)

    with pytest.raises(ZeroDivisionError):
        on_ranks(vae, 3, work)
