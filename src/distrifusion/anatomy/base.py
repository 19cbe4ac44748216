"""What a denoiser is made of, as facts: where positions mix, and at which resolution."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import nn

from distrifusion.nested import map_tensors


@dataclass(frozen=True)
class Site:
    """A layer at which a divided model differs from the whole one.

    Attributes:
        name: qualified name in the model.
        module: the layer.
    """

    name: str
    module: nn.Module

    def under(self, prefix: str) -> Self:
        """The same site by a name that begins with `prefix`: two models that run one after the other stay apart."""
        return replace(self, name=prefix + self.name)


class LinkSite(Site):
    """A layer of the chain that a model is: what lies between such layers adds, joins and reshapes, which costs little.

    Each gives tensors [B, ...], alone or in a tuple.
    """


@dataclass(frozen=True)
class BandSite(Site):
    """A layer that looks beyond one position of a picture with rows and columns.

    Attributes:
        level: resolution of its input; 0 is the finest, each next one is half.
        level_out: resolution of its output.
    """

    level: int
    level_out: int


@dataclass(frozen=True)
class ConvSite(BandSite):
    """A 2-D convolution with a kernel larger than one position, zero padding.

    Attributes:
        padded: rows and columns of zeros that stand after the last of its input already, put there by the layer that
            calls it.
    """

    padded: int = 0


class EntrySite(ConvSite):
    """The convolution that reads the model's input itself."""


@dataclass(frozen=True)
class NormSite(BandSite):
    """A group norm: statistics over all positions.

    Attributes:
        activation: pointwise layer that alone reads the norm's output, None if it is not known.
        conv: name of the convolution that alone reads the activation's output, None likewise.
    """

    activation: nn.Module | None = None
    conv: str | None = None

    def under(self, prefix: str) -> Self:
        return replace(super().under(prefix), conv=_under(prefix, self.conv))


class AttentionSite(BandSite):
    """Self-attention over all positions, with `to_q`, `to_k`, `to_v` called on the same hidden states in that order."""


@dataclass(frozen=True)
class UpsampleSite(BandSite):
    """Nearest upsampling to twice the resolution, `forward(hidden_states, output_size)`, maybe with a convolution.

    Attributes:
        conv: name of the convolution that does nothing but read the upsampled rows and give the result; None if there
            is more to it.
    """

    conv: str | None = None

    def under(self, prefix: str) -> Self:
        return replace(super().under(prefix), conv=_under(prefix, self.conv))


class AdaptiveNormSite(BandSite):
    """A group norm `forward(x, emb)` with `num_groups`, `eps`, and scale and shift from `linear(act(emb))`."""


@dataclass(frozen=True)
class ResampleSite(BandSite):
    """A fixed filter `forward(x)` that halves or doubles the resolution and pads its input by reflection.

    Attributes:
        margin: rows around some input rows that reach their output; even where the resolution is halved.
    """

    margin: int


@dataclass(frozen=True)
class FilterSite(BandSite):
    """A block that scales the lowest frequencies of its skip connections [B, C, h, w] before it reads them.

    It does so while all its `switches` are set: attributes of the block, as is `scale`, the name of the factor. The
    skip connections are its argument `res_hidden_states_tuple`.
    """

    scale: str
    switches: tuple[str, ...]


@dataclass(frozen=True)
class StackSite(BandSite):
    """Convolutions one after the other, pointwise layers between them, from an input of its own to level 0.

    Attributes:
        stages: the convolutions in the order they run; those of one stage read the same rows, and have one geometry.
    """

    stages: tuple[tuple[nn.Conv2d, ...], ...]


def _under(prefix: str, name: str | None) -> str | None:
    return None if name is None else prefix + name


@dataclass
class BoundCall:
    """The arguments of one denoiser call, sorted by how they are cut.

    Attributes:
        sample: the latents [B, C, H, W].
        batched: arguments whose tensors have the batch as first dimension, possibly nested.
        spatial: arguments whose tensors are [B, C, h, w] at one of the model's resolutions, possibly nested: whole, or
            this rank's part, as a model that was divided alike gives it.
        rest: everything else, the same for every rank.
    """

    sample: torch.Tensor
    batched: dict[str, Any]
    spatial: dict[str, Any]
    rest: dict[str, Any]

    @property
    def timestep(self) -> Any:
        """The timestep: a number or a tensor [] or [B]."""
        return self.batched.get("timestep", 0)

    @property
    def key(self) -> Hashable:
        """What must be alike in two calls that use the same kept values."""
        return tuple(self.sample.shape), self.sample.dtype

    def of_rows(self, take: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model's forward for some rows of the batch.

        Args:
            take: gives these rows of a tensor that has all, and a tensor that has no rows, or these alone, as it is.
        """
        cut = {**self.batched, **self.spatial}
        return (take(self.sample),), {**map_tensors(cut, take), **self.rest}

    def at(self, timestep: Any) -> BoundCall:
        """The call at another timestep."""
        return replace(self, batched={**self.batched, "timestep": timestep})

    def map(self, change: Callable[[torch.Tensor], Any]) -> BoundCall:
        """The call with every tensor changed."""
        parts = (map_tensors(part, change) for part in (self.sample, self.batched, self.spatial, self.rest))
        return BoundCall(*parts)


class Anatomy(Protocol):
    """Facts about one family of denoisers."""

    def num_levels(self, model: Any) -> int:
        """Number of resolutions."""

    def sites(self, model: nn.Module) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""

    def links(self, model: nn.Module) -> list[LinkSite]:
        """The layers of the chain, in any order; none where a model is not to be cut in depth."""

    def bind(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundCall:
        """Sort the arguments of a call; raises ConfigError on one that cannot be cut."""

    def exits(self, model: Any) -> tuple[int, ...]:
        """The resolution of every tensor that a call gives, in the order of `tensors`."""

    def tensors(self, result: Any) -> list[torch.Tensor]:
        """The tensors [B, C, h, w] in what the model's forward returns for `return_dict=False`."""

    def stays_cut(self, call: BoundCall) -> bool:
        """Whether each rank keeps its own part of the result, because the model that reads it is divided alike."""

    def output(self, tensors: list[torch.Tensor], call: BoundCall) -> Any:
        """The model's own output type around its tensors."""
