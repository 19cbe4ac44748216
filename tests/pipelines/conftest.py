"""Tiny pipelines say the same few harmless words a thousand times; errors are still said."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)
