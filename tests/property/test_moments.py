"""Norm statistics merged from parts are those of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrifusion.strategies.moments import KnownNorm, corrected_moments, correcting, local_moments, merge_moments

GROUPS = 2
heights = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def whole_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each group in double precision, [B, G]."""
    variance, mean = torch.var_mean(x.double().reshape(x.shape[0], GROUPS, -1), dim=2, correction=0)
    return mean, variance


def merged_from_parts(x: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of x [B, C, H, W] merged from those of its blocks of rows."""
    moments = torch.stack([local_moments(part, GROUPS) for part in x.split(rows, dim=2)])
    return merge_moments(moments, shares(rows))


def corrected(
    moments: torch.Tensor, weights: torch.Tensor, index: int, previous: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected moments of parts [n, 2, B, G] that have these shares of the values [n]."""
    return corrected_moments(torch.cat([moments, previous[None]]), correcting(weights, index), index)


def shares(rows: list[int]) -> torch.Tensor:
    """Share of each block in all rows."""
    return torch.tensor(rows, dtype=torch.float32) / sum(rows)


def picture(rows: list[int], seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(2, 4, sum(rows), 5, generator=generator)


@given(heights, st.integers(0, 10**6), st.floats(-30, 30), st.floats(0.1, 50))
def test_merged_moments_are_those_of_the_whole(rows: list[int], seed: int, mean: float, std: float) -> None:
    x = picture(rows, seed, mean, std)
    got, expected = merged_from_parts(x, rows), whole_moments(x)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5 * std)
    # The rounding of a mean enters the variance with (eps * mean)^2, far below eps * variance here.
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-4, atol=0)


@given(heights, st.integers(0, 10**6))
def test_a_small_spread_about_a_large_mean_survives_in_fp32(rows: list[int], seed: int) -> None:
    """At mean 1e4 the squares are 1e8 with a rounding of 8: their difference would lose a variance of 1e-4 wholly.

    The tolerance is what the native kernel of one device has there: up to 8 % on the smallest pictures.
    """
    x = picture(rows, seed, mean=1e4, std=1e-2)
    mean, variance = merged_from_parts(x, rows)
    expected_mean, expected_variance = whole_moments(x)
    spacing = 2.0**-10  # of fp32 numbers about 1e4
    torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=4 * spacing)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=0.12, atol=0)


@given(heights, st.integers(0, 10**6), st.sampled_from((torch.float16, torch.bfloat16)))
def test_half_precision_inputs_are_accumulated_in_fp32(rows: list[int], seed: int, dtype: torch.dtype) -> None:
    x = picture(rows, seed, mean=100.0, std=5.0).to(dtype)
    mean, variance = merged_from_parts(x, rows)
    assert mean.dtype == variance.dtype == torch.float32
    expected_mean, expected_variance = whole_moments(x)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-3, atol=0)


@given(heights, st.floats(-1e4, 1e4, width=32))
def test_a_constant_picture_has_variance_zero(rows: list[int], value: float) -> None:
    _, variance = merged_from_parts(torch.full((2, 4, sum(rows), 5), value), rows)
    assert variance.abs().max() <= (abs(value) * 2.0**-22) ** 2


@given(heights, st.integers(0, 10**6), st.data())
def test_corrected_moments_of_unchanged_values_are_the_merged_ones(
    rows: list[int], seed: int, data: st.DataObject
) -> None:
    x = picture(rows, seed, mean=3.0)
    moments = torch.stack([local_moments(part, GROUPS) for part in x.split(rows, dim=2)])
    weights = shares(rows)
    index = data.draw(st.integers(0, len(rows) - 1))
    got = corrected(moments, weights, index, previous=moments[index])
    for moment, merged in zip(got, merge_moments(moments, weights), strict=True):
        torch.testing.assert_close(moment, merged, rtol=1e-5, atol=1e-6)


@given(heights, st.integers(0, 10**6), st.floats(0.3, 3.0), st.floats(-2.0, 2.0))
def test_corrected_variance_is_never_negative(rows: list[int], seed: int, scale: float, shift: float) -> None:
    x = picture(rows, seed)
    moments = torch.stack([local_moments(part, GROUPS) for part in x.split(rows, dim=2)])
    previous = local_moments(scale * picture(rows[:1], seed + 1) + shift, GROUPS)
    _, variance = corrected(moments, shares(rows), 0, previous)
    assert (variance >= 0).all()


@given(heights, st.integers(0, 10**6), st.floats(0.3, 3.0), st.floats(-2.0, 2.0))
def test_corrected_moments_are_the_published_formula(rows: list[int], seed: int, scale: float, shift: float) -> None:
    """DistriFusion, section 3.3, as written there: raw moments, stale mean of all plus own fresh minus own stale."""
    stale = torch.stack([local_moments(part, GROUPS) for part in picture(rows, seed).split(rows, dim=2)])
    fresh = local_moments(scale * picture(rows[:1], seed + 1) + shift, GROUPS)
    seen = torch.cat([fresh[None], stale[1:]])
    mean, variance = corrected(seen, shares(rows), 0, previous=stale[0])

    weights = shares(rows).double().view(-1, 1, 1)
    raw = torch.stack([stale[:, 0], stale[:, 1] + stale[:, 0].double().square()])  # [2, n, B, G]
    change = torch.stack([fresh[0] - stale[0, 0], fresh[1] + fresh[0].double().square() - raw[1, 0]])
    first, second = (weights * raw).sum(1) + change
    torch.testing.assert_close(mean.double(), first, rtol=1e-5, atol=1e-5)
    published = second - first.square()
    clear = published.abs() > 1e-4  # rounding alone decides the sign of a smaller one
    expected = torch.where(published < 0, fresh[1].double(), published)
    torch.testing.assert_close(variance.double()[clear], expected[clear], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("differentiable", [True, False])
def test_normalising_with_the_wholes_moments_is_group_norm(layout: str, affine: bool, differentiable: bool) -> None:
    norm = nn.GroupNorm(GROUPS, 4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    x = picture([7, 4], seed=5, mean=2.0)
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "tokens": x.flatten(2)}[layout]
    mean, variance = (moment.float() for moment in whole_moments(x.reshape(2, 4, -1)))
    with torch.set_grad_enabled(differentiable):
        torch.testing.assert_close(KnownNorm(norm, mean, variance)(x), norm(x), rtol=1e-5, atol=1e-5)


def test_a_gradient_finds_the_moments() -> None:
    norm, x = nn.GroupNorm(GROUPS, 4), picture([7, 4], seed=5, mean=2.0).requires_grad_()
    weights = torch.arange(x.numel()).view(x.shape).sin()
    (expected,) = torch.autograd.grad((norm(x) * weights).sum(), x)
    (got,) = torch.autograd.grad((KnownNorm(norm, *local_moments(x, GROUPS))(x) * weights).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
