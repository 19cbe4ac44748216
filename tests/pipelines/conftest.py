"""Tiny pipelines say the same few harmless words a thousand times; errors are still said."""

from __future__ import annotations

import diffusers
import pytest


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()
