"""What a sender codes is, to the bit, what a receiver adds; and what one call loses, the next ones make good."""

from __future__ import annotations

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrifusion import ConfigError
from distrifusion.exchange import codec as codec_module
from distrifusion.exchange.codec import Codec

BITS = (8, 4, 2, 1)
BLOCK = 128
Shape = tuple[int, int, int, int]

all_bits = pytest.mark.parametrize("bits", BITS)
shapes = st.tuples(st.sampled_from([0, 1, 2, 5, 127, 128, 129, 256, 301]), *[st.integers(1, 3)] * 2, st.integers(1, 9))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def normal(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pieces_of(value: torch.Tensor) -> list[torch.Tensor]:
    """The pieces [B, L, C] of a value [L, B, P, C]."""
    return [piece.transpose(0, 1) for piece in value.unbind(2)]


def encode(codec: Codec, value: torch.Tensor, base: torch.Tensor, rubbish: int = 0) -> torch.Tensor:
    """The wire of one exchange; `base` becomes what the receivers will hold."""
    wire = torch.full((codec.num_bytes(base.shape),), rubbish, dtype=torch.uint8)
    codec.encode_(pieces_of(value), base, wire)
    return wire


def error(value: torch.Tensor, base: torch.Tensor) -> float:
    return (value.double() - base.double()).norm().item()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), shapes, dtypes, st.integers(-4, 3), st.integers(0, 2**32), st.sampled_from([1, 1 << 20]))
def test_a_receiver_holds_what_the_sender_holds(
    bits: int, shape: Shape, dtype: torch.dtype, magnitude: int, seed: int, cached: int
) -> None:
    """Several calls, to the bit, also where one of the two takes its blocks one at a time and the other all at once."""
    codec = Codec.of(bits)
    sent = normal(shape, seed, dtype)
    received = sent.clone()
    for call in range(3):
        value = (sent.float() + 10.0**magnitude * normal(shape, seed + call)).to(dtype)
        with mock.patch.object(codec_module, "_CACHED", cached):
            wire = encode(codec, value, sent)
        codec.decode_(wire, received)
        assert torch.equal(sent, received)
        assert sent.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(BITS), shapes)
def test_every_byte_is_written_and_depends_on_the_difference_alone(bits: int, shape: Shape) -> None:
    codec, value = Codec.of(bits), normal(shape)
    first, second = (encode(codec, value, torch.zeros(shape), rubbish) for rubbish in (0, 255))
    assert torch.equal(first, second)


@all_bits
@pytest.mark.parametrize("shape", [(1024, 2, 2, 96), (300, 1, 2, 64)])
def test_bytes_are_bits_and_a_few_scales(bits: int, shape: Shape) -> None:
    num_tokens, batch, pieces, channels = shape
    per_value = 8 * Codec.of(bits).num_bytes(shape) / math.prod(shape)
    num_blocks = -(-num_tokens // BLOCK)
    assert per_value == bits + 16 / channels + 16 * num_blocks / num_tokens
    assert Codec.of(bits).num_bytes((0, batch, pieces, channels)) == 0


@all_bits
def test_codes_are_all_used(bits: int) -> None:
    shape = (BLOCK, 1, 2, 64)
    wire = encode(Codec.of(bits), normal(shape), torch.zeros(shape))
    codes = wire[-math.prod(shape) * bits // 8 :]
    fields = torch.stack([codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)])
    assert fields.unique().numel() == 2**bits
    assert all(row.unique().numel() == 2**bits for row in fields)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_error_is_at_most_half_a_step(bits: int) -> None:
    """The step of a token and channel: the channel's mean times the token's largest multiple of it, over 2^(bits-1)."""
    shape = (2 * BLOCK, 2, 2, 24)
    value, base = (
        normal(shape) * normal((1, 2, 2, 24), 1).exp() * normal((2 * BLOCK, 2, 2, 1), 2).exp(),
        torch.zeros(shape),
    )
    channel = value.abs().unflatten(0, (2, BLOCK)).mean(1, keepdim=True).expand(2, BLOCK, 2, 2, 24).reshape(shape)
    step = channel * (value.abs() / channel).amax(-1, keepdim=True) / 2 ** (bits - 1)
    encode(Codec.of(bits), value, base)
    excess = (value - base).abs() / (step / 2)
    assert 0.9 < excess.max() < 1.02


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.01), (4, 0.1), (2, 0.36), (1, 0.63)])
def test_the_error_of_normal_values_whatever_the_scale_of_tokens_and_channels(bits: int, loss: float) -> None:
    shape = (3 * BLOCK, 2, 2, 64)
    unit, base = normal(shape), torch.zeros(shape)
    scales = normal((1, 2, 2, 64), 1).exp() * normal((3 * BLOCK, 2, 2, 1), 2).exp()
    encode(Codec.of(bits), unit * scales, base)
    assert loss / 2 < error(unit, base / scales) / unit.norm() < loss


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), shapes, st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]), st.integers(0, 2**32))
def test_a_value_that_stays_is_reached(bits: int, shape: Shape, magnitude: float, seed: int) -> None:
    """Whatever the magnitude: no scale is too small or too large for the wire."""
    value, base = magnitude * normal(shape, seed), torch.zeros(shape)
    for _ in range(24 // bits):
        encode(Codec.of(bits), value, base)
    assert error(value, base) <= 1e-2 * value.double().norm().item()


@all_bits
def test_each_round_is_closer(bits: int) -> None:
    value, base = normal((200, 2, 2, 32)), torch.zeros(200, 2, 2, 32)
    errors = []
    for _ in range(4):
        encode(Codec.of(bits), value, base)
        errors.append(error(value, base) / value.norm().item())
    assert all(later < max(0.75 * earlier, 1e-7) for earlier, later in pairwise(errors))


@all_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_has_not_changed_stays_as_it_is(bits: int, dtype: torch.dtype) -> None:
    """A whole part, and single channels and tokens of one that changes elsewhere."""
    codec, value = Codec.of(bits), normal((200, 2, 2, 16), dtype=dtype)
    base = value.clone()
    encode(codec, value, base)
    assert torch.equal(base, value)
    changed = torch.ones(200, 2, 2, 16, dtype=torch.bool)
    changed[7] = changed[..., 3] = changed[:, 1, 0] = False
    encode(codec, torch.where(changed, value + 1, value), base)
    assert torch.equal(base[~changed], value[~changed])
    assert not torch.equal(base, value)


@all_bits
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_arrive_as_a_number(bits: int, bad: float) -> None:
    """NaN takes its block of its batch row and piece with it, infinity some of it; nothing else is touched."""
    codec, value, sent = Codec.of(bits), normal((300, 2, 2, 8)), torch.zeros(300, 2, 2, 8)
    value[130, 1, 0, 5] = bad
    received = sent.clone()
    codec.decode_(encode(codec, value, sent), received)
    block = torch.zeros_like(value, dtype=torch.bool)
    block[BLOCK : 2 * BLOCK, 1, 0] = True
    assert torch.allclose(sent, received, rtol=0, atol=0, equal_nan=True)
    assert not received[130, 1, 0, 5].isfinite()
    assert received[~block].isfinite().all()
    assert received[block].isnan().all() or math.isinf(bad)


@pytest.mark.parametrize("bits", [0, 3, 16, 32, -1, True, None, "4", 2.5, 8.0])
def test_other_bits_are_refused_by_name(bits: object) -> None:
    with pytest.raises(ConfigError, match=f"8, 4, 2 or 1 bits, not {bits!r}"):
        Codec.of(bits)  # type: ignore[arg-type]
