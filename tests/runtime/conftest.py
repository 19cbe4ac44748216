"""Tiny pipelines in a folder, and one pair of workers that most tests here share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest

from distrifusion import load
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.tiny import write_sd, write_sdxl


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No bars of loading between the dots of tests."""
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def one(sdxl_folder: Path) -> diffusers.StableDiffusionXLPipeline:
    """Plain diffusers on one device: what every other way must equal."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shared_two(sdxl_folder: Path) -> Iterator[SpawnedPipeline]:
    with load(sdxl_folder, devices=2, plan="patch2") as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        yield pipe


@pytest.fixture
def two(shared_two: SpawnedPipeline) -> Iterator[SpawnedPipeline]:
    """The same pipeline in two workers, as it was loaded."""
    scheduler = shared_two.scheduler
    shared_two.set_progress_bar_config(disable=True)
    yield shared_two
    shared_two.scheduler = scheduler
