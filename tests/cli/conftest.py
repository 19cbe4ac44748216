"""A tiny pipeline that the commands draw with."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.tiny import write_sdxl


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("cli"))
