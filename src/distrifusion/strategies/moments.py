"""Group-norm statistics over a picture that several ranks hold: local moments, exact merge, corrected stale merge."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

# Bytes of the groups that the kernel is given at once on CPU: it writes a normed tensor beside, which nobody reads.
_AT_ONCE_BYTES = 8 << 20


def local_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean and biased variance of each group, in fp32: [2, B, G] of x [B, C, ...], B batch, G groups."""
    if x.device.type != "cpu" or x.nbytes <= _AT_ONCE_BYTES:
        return _native_moments(x.contiguous(), num_groups)
    # Contiguous, a few groups at once: of channels-last tensors the kernel's moments are several times less exact.
    groups = x.unflatten(1, (num_groups, -1))
    at_once = max(torch.get_num_threads(), _AT_ONCE_BYTES // groups[:, 0].nbytes)
    return torch.cat([_native_moments(p.flatten(1, 2).contiguous(), p.shape[1]) for p in groups.split(at_once, 1)], 2)


def _native_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The moments [2, B, G] as the native kernel finds them: by Welford on CPU, 25 times faster there than var_mean.

    With eps 0 its reciprocal standard deviation is the variance to the power -1/2.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    batch, channels = x.shape[:2]
    size = x.numel() // (batch * channels)
    _, mean, rstd = torch.native_group_norm(x, None, None, batch, channels, size, num_groups, 0.0)
    return torch.stack((mean, rstd.pow(-2))).float()


def merge_moments(moments: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the whole from those of its parts (Chan, Golub and LeVeque 1979), biased, over the global count.

    Args:
        moments: mean and variance of each part [n, 2, B, G].
        weights: share of the values that is in each part [n].
    """
    shares = weights.view(-1, 1, 1)  # no product of matrices, which autocast would round
    means, variances = moments.unbind(1)
    mean = (shares * means).sum(0)
    away = means - mean
    return mean, (shares * torch.addcmul(variances, away, away)).sum(0)


def correcting(weights: torch.Tensor, index: int) -> torch.Tensor:
    """Weights [n + 1] for `corrected_moments` from the shares of the values that are in each part [n]."""
    corrected = torch.cat((weights, weights[index : index + 1] - 1))
    corrected[index] = 1
    return corrected


def corrected_moments(moments: torch.Tensor, weights: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected asynchronous group norm (DistriFusion, section 3.3): stale statistics of all, plus the own change.

    First and second moments are those of the stale whole plus (own fresh - own stale): the others are taken to have
    moved alike. That is a merge in which the own part counts once, less what was stale of it beyond its share; the
    weights add up to 1. Where the variance comes out negative, the own fresh one is used.

    Args:
        moments: stale moments of the others, the fresh own ones in their place, and at the end the own ones that
            belong to the stale ones [n + 1, 2, B, G].
        weights: of `correcting` [n + 1].
        index: the own part.
    """
    mean, variance = merge_moments(moments, weights)
    return mean, torch.where(variance < 0, moments[index, 1], variance)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _groups(num_groups: int, size: int, device: torch.device) -> torch.Tensor:
    """The group of every channel, of groups of so many channels, on the device once and for all."""
    return torch.arange(num_groups).repeat_interleave(size).to(device)


class KnownNorm:
    """A group norm whose moments are known.

    Args:
        norm: the layer.
        mean, variance: moments [B, G].
    """

    def __init__(self, norm: nn.GroupNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
        batch, groups = mean.shape
        group_of = _groups(batch * groups, norm.num_channels // groups, mean.device)
        self._mean, self._variance = (moment.flatten().index_select(0, group_of) for moment in (mean, variance))
        self._eps = norm.eps
        self._weight: torch.Tensor | None = norm.weight
        self._bias: torch.Tensor | None = norm.bias
        if norm.affine and (batch > 1 or norm.weight.dtype != mean.dtype):
            self._weight, self._bias = norm.weight.to(mean.dtype).repeat(batch), norm.bias.to(mean.dtype).repeat(batch)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x [B, C, ...], computed in fp32, in x's type."""
        if torch.is_grad_enabled() or (x.stride(1) == 1 and not x.is_contiguous()):
            return self._affine(x)
        # Batch norm of one sample with these moments: a third of the time of a product and a sum that are broadcast.
        rows = x.contiguous().view(1, self._mean.numel(), *x.shape[2:])
        moments = self._mean, self._variance
        return F.batch_norm(rows, *moments, self._weight, self._bias, training=False, eps=self._eps).view(x.shape)

    def _affine(self, x: torch.Tensor) -> torch.Tensor:
        """As x * scale + shift, in x's own layout, through which a gradient finds the moments."""
        scale = (self._variance + self._eps).rsqrt()
        scale = scale if self._weight is None else scale * self._weight
        shift = -self._mean * scale if self._bias is None else torch.addcmul(self._bias, self._mean, scale, value=-1)
        shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)
