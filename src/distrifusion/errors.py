"""The errors a caller can meet, each a value for a person: what was wrong, and what to do instead."""

from __future__ import annotations


class DistrifusionError(Exception):
    """Base of every error that this library raises on purpose."""


class PlanError(DistrifusionError, ValueError):
    """A plan has an unknown word, clashing words, or does not fit the devices."""


class ConfigError(DistrifusionError, ValueError):
    """An argument other than the plan has a value that cannot work."""


class UnsupportedModel(DistrifusionError, TypeError):
    """A layer mixes positions of the picture and no rule says how to split it; the layer is named."""


class _RankError(DistrifusionError):
    """What is known of where a call went wrong."""

    def __init__(
        self, message: str, *, rank: int | None = None, step: int | None = None, exchange: str | None = None
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.step = step
        self.exchange = exchange


class RankFailed(_RankError, RuntimeError):
    """One rank failed or went away while the others were working.

    Attributes:
        rank: the rank that failed, or None if it is not known which.
        step: the denoising step (from 0) it was in, or None outside the loop.
        exchange: what another rank waited for, as "halo of layer 'conv_out'", or None if it is not known.
    """


class StepTimeout(_RankError, TimeoutError):
    """A wait for other ranks passed its limit.

    Attributes:
        rank: the rank that waited, or None if it is not known.
        step: the denoising step (from 0) it was in, or None outside the loop.
        exchange: what it waited for, as "halo of layer 'conv_out'", or None if it is not known.
    """


class Cancelled(DistrifusionError):
    """A call was ended by `cancel()`, by all ranks after the same denoising step; the pipeline is ready for the next.

    Attributes:
        step: the last denoising step (from 0) that was finished, or None if there was none.
    """

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class OutOfMemory(_RankError, MemoryError):
    """A rank had not enough memory for the call.

    Attributes:
        rank: the rank that ran out of memory, or None if it is not known which.
        step: the denoising step (from 0) it was in, or None outside the loop.
    """


class PoolTooLarge(OutOfMemory):
    """What a plan would keep between denoiser calls does not fit; found before the first step, on all ranks alike.

    Attributes:
        needed: bytes, of all ranks that share one memory.
        free: bytes that are free there.
        fits: text of the nearest plan that fits.
    """

    def __init__(self, message: str, *, needed: int = 0, free: int = 0, fits: str = "") -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free
        self.fits = fits
