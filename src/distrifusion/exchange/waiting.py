"""Waits whose errors say what was waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.exchange.posted import Posted


def value_of(kind: str | None, site: str) -> str:
    """What a site's values are called in an error."""
    return f"{kind or 'values'} of layer '{site}'"


def settle(posted: Posted, what: str) -> None:
    """Wait until posted values have arrived."""
    if posted.is_under_way:
        with named(what):
            posted.settle()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Let the error of a wait say what was waited for."""
    try:
        yield
    except (RankFailed, StepTimeout) as error:
        if error.exchange is None:
            error.exchange = what
            error.args = (f"{error}; it was for the {what}",)
        raise
