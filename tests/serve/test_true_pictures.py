"""The server on the embedded model and two worker processes: the same pictures, and nothing is lost with a rank."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from asgi import DRAW, Answer, ask, begin, until
from fastapi import FastAPI
from PIL import Image

from distrifusion import load
from distrifusion.runtime.spawned import SpawnedPipeline
from distrifusion.serve.engine import Engine
from distrifusion.serve.http import Settings, app

DEFAULTS = {"num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> Iterator[SpawnedPipeline]:
    with load("demo", devices=2, plan="patch2") as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


@pytest.fixture
def engine(pipe: SpawnedPipeline) -> Iterator[Engine]:
    engine = Engine(pipe)
    yield engine
    assert engine.close(60)


@pytest.fixture
def api(engine: Engine) -> FastAPI:
    return app(engine, Settings("demo", DEFAULTS))


def pixels(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json["data"][0]["b64_json"]))))


def drawn(pipe: SpawnedPipeline, prompt: str, seed: int, **more: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, **{**DEFAULTS, **more}, generator=generator).images[0])


@pytest.mark.supports("server", "pictures are those of the pipeline, bit for bit")
def test_the_picture_of_a_request_is_the_pipelines(pipe: SpawnedPipeline, api: FastAPI) -> None:
    expected = drawn(pipe, "a lake", 7), drawn(pipe, "a lake", 7, width=72)
    answers = [
        asyncio.run(ask(api, *DRAW, {"prompt": "a lake", "seed": 7, **more})) for more in ({}, {"size": "72x64"})
    ]
    assert all(np.array_equal(pixels(got), one) for got, one in zip(answers, expected, strict=True))
    assert not np.array_equal(pixels(asyncio.run(ask(api, *DRAW, {"prompt": "a lake", "seed": 8}))), expected[0])


@pytest.mark.supports("server", "a rank that dies fails its request alone")
@pytest.mark.supports("server", "a client that hangs up cancels its request")
def test_after_a_lost_rank_and_a_lost_client_the_next_picture_is_right(pipe: SpawnedPipeline, api: FastAPI) -> None:
    long = {"prompt": "a lake", "num_inference_steps": 900, "stream": True}

    async def talk() -> None:
        expected = pixels(await ask(api, *DRAW, {"prompt": "a lake", "seed": 7}))
        task, answer = begin(api, *DRAW, long)
        await until(lambda: any(content.get("step", 0) > 1 for _, content in answer.events))
        os.kill(pipe.pids[1], signal.SIGKILL)
        await task
        error = answer.events[-1][1]["error"]
        assert error["code"] == "rank_failed" and "SIGKILL" in error["message"]
        assert np.array_equal(pixels(await ask(api, *DRAW, {"prompt": "a lake", "seed": 7})), expected)
        assert "SIGKILL" in (await ask(api, "GET", "/ready")).json["last_failure"]["message"]
        pids = pipe.pids
        task, answer = begin(api, *DRAW, long)
        await until(lambda: any(content.get("step", 0) > 1 for _, content in answer.events))
        answer.hangs_up.set()
        await task
        assert np.array_equal(pixels(await ask(api, *DRAW, {"prompt": "a lake", "seed": 7})), expected)
        assert pipe.pids == pids

    asyncio.run(talk())
