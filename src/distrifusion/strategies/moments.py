"""Group-norm statistics over a picture that several ranks hold: local moments, exact merge, corrected stale merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def local_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean and biased variance of each group, in fp32: [2, B, G] of x [B, C, ...], B batch, G groups."""
    batch, channels = x.shape[:2]
    flat = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if flat.device.type != "cpu" or not flat.is_contiguous(memory_format=torch.channels_last):
        flat = flat.contiguous()  # the kernel refuses other strides; only on CPU does it take channels-last
    positions = flat[0, 0].numel()
    # The native kernel's own statistics: Welford on CPU, 25 times faster there than var_mean. With eps 0 its
    # reciprocal standard deviation is the variance to the power -1/2.
    _, mean, rstd = torch.native_group_norm(flat, None, None, batch, channels, positions, num_groups, 0.0)
    return torch.stack([mean, rstd.square().reciprocal()]).view(2, batch, num_groups).float()


def merge_moments(moments: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the whole from those of its parts (Chan, Golub and LeVeque 1979), biased, over the global count.

    Args:
        moments: mean and variance of each part [n, 2, B, G].
        counts: number of values in each part [n].
    """
    weights = (counts / counts.sum()).view(-1, 1, 1)
    means, variances = moments.unbind(1)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def corrected_moments(
    moments: torch.Tensor, counts: torch.Tensor, index: int, previous: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected asynchronous group norm (DistriFusion, section 3.3): stale statistics of all, plus the own change.

    First and second moments are those of the stale whole plus (own fresh - own stale): the others are taken to have
    moved alike. They are taken about the stale mean, so no large squares cancel. Where the variance comes out negative,
    the own fresh one is used.

    Args:
        moments: stale moments of the others and the fresh own ones [n, 2, B, G].
        counts: number of values in each part [n].
        index: the own part.
        previous: the own moments that belong to the stale ones [2, B, G].
    """
    fresh_mean, fresh_variance = moments[index]
    stale_mean, stale_variance = previous
    stale = moments.clone()
    stale[index] = previous
    mean, variance = merge_moments(stale, counts)
    change = fresh_mean - stale_mean
    fresh_square = fresh_variance + (fresh_mean - mean).square()
    stale_square = stale_variance + (stale_mean - mean).square()
    corrected = variance + fresh_square - stale_square - change.square()
    return mean + change, torch.where(corrected < 0, fresh_variance, corrected)


def normalise(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group norm of x [B, C, ...] with given moments [B, G], computed in fp32, returned in x's type."""
    batch, channels = x.shape[:2]
    per_channel = channels // norm.num_groups
    mean, variance = (t.repeat_interleave(per_channel, dim=1) for t in (mean, variance))
    weight = norm.weight.float() if norm.affine else torch.ones_like(mean[0])
    bias = norm.bias.float() if norm.affine else torch.zeros_like(mean[0])
    if x.is_contiguous():
        rows = (1, batch * channels, *x.shape[2:])
        stats = mean.flatten(), variance.flatten(), weight.repeat(batch), bias.repeat(batch)
        return F.batch_norm(x.view(rows), *stats, training=False, eps=norm.eps).view(x.shape)
    scale = weight * torch.rsqrt(variance + norm.eps)
    ones = (1,) * (x.dim() - 2)
    scaled = torch.addcmul((bias - mean * scale).view(batch, channels, *ones), x, scale.view(batch, channels, *ones))
    return scaled.to(x.dtype)
