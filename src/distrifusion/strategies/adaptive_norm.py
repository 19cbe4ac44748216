"""Group norms whose scale and shift come from an embedding: the statistics are those of any group norm in bands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy.base import AdaptiveNormSite, NormSite
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStrategy


class AdaptiveNormStrategy:
    """Norms a band by a plain group norm that is divided itself, then scales and shifts it."""

    def __init__(self, patch: PatchStrategy) -> None:
        self._patch = patch

    def attach(self, sites: list[AdaptiveNormSite], attachment: Attachment) -> list[NormSite]:
        """Replace the forward of every site; the plain norms that they use are returned, to be divided."""
        norms = []
        for site in sites:
            adaptive: Any = site.module
            norm = nn.GroupNorm(adaptive.num_groups, adaptive.linear.out_features // 2, adaptive.eps, affine=False)
            attachment.replace(adaptive, "forward", partial(partial, self._run, site, norm))
            norms.append(NormSite(site.name, norm, site.level, site.level))
        return norms

    def _run(
        self, site: AdaptiveNormSite, norm: nn.Module, forward: Callable[..., Any], x: torch.Tensor, emb: torch.Tensor
    ) -> torch.Tensor:
        step, adaptive = self._patch.step, site.module
        if self._patch.is_whole(x.shape[step.dim], step.levels[site.level]):
            return forward(x, emb)
        activated = adaptive.act(emb) if adaptive.act else emb  # type: ignore[operator]
        scale, shift = adaptive.linear(activated)[:, :, None, None].chunk(2, dim=1)  # type: ignore[operator]
        return norm(x) * (1 + scale) + shift
