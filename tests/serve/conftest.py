"""An application on a pipeline without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from stub import StubPipeline

from distrifusion.serve.engine import Engine
from distrifusion.serve.http import Settings, app


@pytest.fixture
def pipe() -> StubPipeline:
    return StubPipeline()


@pytest.fixture
def engine(pipe: StubPipeline) -> Iterator[Engine]:
    engine = Engine(pipe, max_queue=2)
    yield engine
    pipe.go.set()
    assert engine.close(10)


@pytest.fixture
def settings() -> Settings:
    defaults = {"num_inference_steps": 3, "width": 64, "height": 64}
    return Settings("stub", defaults, max_pixels=256 * 256, request_timeout=60)


@pytest.fixture
def api(engine: Engine, settings: Settings) -> FastAPI:
    return app(engine, settings)
