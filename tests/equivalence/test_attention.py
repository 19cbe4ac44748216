"""Attention in blocks: the kernel's sums are those of the definition, and merged blocks equal the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distrifusion.strategies.attention import attend_plainly, attend_with_sum, merge_
from models import relative_error


def qkv(num_queries: int, num_keys: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_queries + 100 * num_keys)
    query, key, value = (size * torch.randn(2, 3, n, 8, generator=generator) for n in (num_queries, num_keys, num_keys))
    return query, key, value


def bias(num_keys: int, masked: range) -> torch.Tensor:
    """Whole words masked away, the others weighed."""
    added = torch.linspace(-1, 1, num_keys).expand(2, 1, 1, -1).clone()
    added[..., list(masked)] = torch.finfo(added.dtype).min
    return added


@pytest.mark.parametrize("added", [None, bias(9, range(2, 5))], ids=["plain", "masked"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kernel_gives_what_the_definition_says(
    added: torch.Tensor | None, scale: float | None, dtype: torch.dtype
) -> None:
    query, key, value = (x.to(dtype) for x in qkv(5, 9))
    added = None if added is None else added.to(dtype)
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-6
    plain, plain_sum = attend_plainly(query, key, value, added, scale)
    given_out, given_sum = attend_with_sum(query, key, value, added, scale)
    reference = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    assert relative_error(given_out, reference) <= bound and relative_error(plain, reference) <= bound
    assert relative_error(given_sum, plain_sum) <= bound


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from([1.0, 30.0]))
def test_blocks_merged_in_any_number_equal_the_whole(lengths: list[int], num_queries: int, size: float) -> None:
    query, key, value = qkv(num_queries, sum(lengths), size)
    out = torch.zeros_like(query)
    lse = out.new_full(out.shape[:3], -torch.inf)
    for keys, values in zip(key.split(lengths, 2), value.split(lengths, 2), strict=True):
        merge_(out, lse, *attend_with_sum(query, keys, values, None, None))
    assert relative_error(out, F.scaled_dot_product_attention(query, key, value)) <= 1e-5


@pytest.mark.parametrize("masked", [range(3), range(3, 6), range(6, 9)])
def test_a_block_that_is_all_masked_adds_nothing(masked: range) -> None:
    query, key, value = qkv(4, 9)
    added = bias(9, masked)
    out = torch.zeros_like(query)
    lse = out.new_full(out.shape[:3], -torch.inf)
    for a in (0, 3, 6):
        block = slice(a, a + 3)
        merge_(out, lse, *attend_with_sum(query, key[:, :, block], value[:, :, block], added[..., block], None))
    reference = F.scaled_dot_product_attention(query, key, value, attn_mask=added)
    assert torch.isfinite(out).all()
    assert relative_error(out, reference) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [8, 12, 64, 72, 128])
@pytest.mark.parametrize("num_queries", [1, 31, 96])
def test_the_kernels_of_a_gpu_give_what_the_definition_says(
    dtype: torch.dtype, channels: int, num_queries: int
) -> None:
    """Keys and values lie as a ring gets them: tokens first, then batch, then heads."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, num_queries, channels, generator=generator).to("cuda", dtype)
    block = torch.randn(77, 2, 2, 3, channels, generator=generator).to("cuda", dtype)
    key, value = (x.permute(1, 2, 0, 3) for x in block.unbind(2))
    for bias in (None, torch.zeros(2, 1, 1, 77, device="cuda", dtype=dtype)):
        out, lse = attend_with_sum(query, key, value, bias, None)
        wanted, wanted_lse = attend_plainly(query.double(), key.double(), value.double(), None, None)
        assert out.shape == wanted.shape and lse.shape == wanted_lse.shape
        assert lse.dtype is torch.float32
        bound = 1e-5 if dtype is torch.float32 else 2e-2
        assert relative_error(out, wanted) <= bound and relative_error(lse, wanted_lse) <= bound
