"""What words of a plan stand for, and the values that are taken where nothing is said."""

from __future__ import annotations

from enum import StrEnum


class SiteKind(StrEnum):
    """What an exchange inside a layer carries; the policy fresh or stale is chosen for each kind."""

    KV = "kv"
    HALO = "halo"
    NORM = "norm"


class Split(StrEnum):
    """The direction in which the picture is cut into bands."""

    ROWS = "rows"
    COLUMNS = "columns"
    ALTERNATING = "alternating"  # rows and columns by turns; only for bands that exchange nothing


class Norms(StrEnum):
    """What a group norm takes for statistics while those of the other bands are old (DistriFusion, section 4.3)."""

    CORRECTED = "correctednorm"  # the old whole plus the own change
    STALE = "stalenorm"  # the others' old ones and the own fresh ones
    SEPARATE = "separatenorm"  # the own ones alone


ALL_KINDS = frozenset(SiteKind)
DEFAULT_STALE = frozenset({SiteKind.KV})
DEFAULT_WARMUP = 4
DEFAULT_FORECAST = 50
MOST_FORECAST = 200
CODED_BITS = (1, 2, 4, 8)
DELTA_BITS = (*CODED_BITS, 32)
