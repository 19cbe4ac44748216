"""What to do on which devices: the plan, its text form, and the one table of what is legal."""

from distrifusion.plan.kinds import (
    ALL_KINDS,
    CODED_BITS,
    DEFAULT_FORECAST,
    DEFAULT_STALE,
    DEFAULT_WARMUP,
    DELTA_BITS,
    Norms,
    SiteKind,
    Split,
)
from distrifusion.plan.plan import Plan

__all__ = [
    "ALL_KINDS",
    "CODED_BITS",
    "DEFAULT_FORECAST",
    "DEFAULT_STALE",
    "DEFAULT_WARMUP",
    "DELTA_BITS",
    "Norms",
    "Plan",
    "SiteKind",
    "Split",
]
