"""The routes on a pipeline without a model: what is answered, and in which form."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import replace
from typing import Any

import pytest
from asgi import DRAW, Answer, ask, begin, until
from fastapi import FastAPI
from PIL import Image
from stub import StubPipeline

from distrifusion import OutOfMemory, PoolTooLarge, RankFailed, StepTimeout
from distrifusion.serve.engine import Engine
from distrifusion.serve.http import Settings, app


def generate(api: FastAPI, **body: Any) -> Answer:
    return asyncio.run(ask(api, *DRAW, {"prompt": "a lake", **body}))


def pictures(answer: Answer) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) for data in answer.json["data"]]


def test_pictures_in_the_openai_form(api: FastAPI) -> None:
    answer = generate(api, n=2, size="72x64", seed=5, user="someone", model="stub", response_format="b64_json")
    assert answer.status == 200 and answer.headers["x-request-id"].startswith("img-")
    said = answer.json
    assert said.keys() == {"created", "data", "plan", "seconds"} and said["plan"] == "cfg2"
    assert [data["seed"] for data in said["data"]] == [5, 6]
    assert [(p.size, p.format, p.getpixel((0, 0))) for p in pictures(answer)] == [
        ((72, 64), "PNG", (5, 0, 0)),
        ((72, 64), "PNG", (6, 0, 0)),
    ]


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_other_files(api: FastAPI, output_format: str) -> None:
    (picture,) = pictures(generate(api, output_format=output_format, seed=200, size="auto"))
    assert picture.format == output_format.upper() and picture.size == (64, 64)
    assert abs(picture.getpixel((9, 9))[0] - 200) <= (0 if output_format == "webp" else 3)


def test_a_seed_is_made_and_told(api: FastAPI) -> None:
    first, second = generate(api), generate(api)
    seed = first.json["data"][0]["seed"]
    assert seed != second.json["data"][0]["seed"]
    assert generate(api, seed=seed).json["data"] == first.json["data"]


@pytest.mark.parametrize(
    ("body", "code", "param", "says"),
    [
        (b"{", "invalid_json", None, "the body is not JSON"),
        (None, "missing_field", None, "the body is missing"),
        ([], "invalid_value", None, "the body must be a JSON object"),
        ({}, "missing_field", "prompt", "prompt is missing"),
        ({"prompt": ""}, "invalid_value", "prompt", "at least 1 character"),
        ({"prompt": ["a"]}, "invalid_value", "prompt", "prompt=['a']: should be a valid string"),
        ({"promt": "a", "prompt": "a"}, "unknown_field", "promt", "did you mean 'prompt'?"),
        ({"prompt": "a", "quality": "hd"}, "unknown_field", "quality", "there are prompt, model, n, "),
        ({"prompt": "a", "size": "abc"}, "invalid_value", "size", "size 'abc' is not of the form WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "70x64"}, "invalid_value", "size", "width=70 must be a multiple of 8; the nearest is"),
        ({"prompt": "a", "size": "4096x4096"}, "invalid_value", "size", "a request may have 65536"),
        ({"prompt": "a", "n": 10, "size": "128x128"}, "invalid_value", "size", "n=10 has 163840 pixels"),
        ({"prompt": "a", "size": "9" * 40 + "x1"}, "invalid_value", "size", "at most 32 characters"),
        ({"prompt": "a", "n": 0}, "invalid_value", "n", "n=0: should be greater than or equal to 1"),
        ({"prompt": "a", "n": "2"}, "invalid_value", "n", "n='2': should be a valid integer"),
        ({"prompt": "a", "num_inference_steps": -1}, "invalid_value", "num_inference_steps", "greater than or equal"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "invalid_value", "guidance_scale", "finite number"),
        ({"prompt": "a", "seed": -1}, "invalid_value", "seed", "seed=-1"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "invalid_value", "seed", "use a smaller seed"),
        ({"prompt": "a", "response_format": "url"}, "invalid_value", "response_format", "or say 'b64_json'"),
        ({"prompt": "a", "output_format": "gif"}, "invalid_value", "output_format", "'png', 'webp' or 'jpeg'"),
        ({"prompt": "a", "sampler": "pikard"}, "invalid_value", "sampler", "did you mean 'picard'?"),
        ({"prompt": "a", "window": 4}, "invalid_value", "window", "add one, or leave window= out"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    api: FastAPI, pipe: StubPipeline, body: Any, code: str, param: str | None, says: str
) -> None:
    answer = asyncio.run(ask(api, *DRAW, body))
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error", answer.body
    assert (answer.error["code"], answer.error["param"]) == (code, param), answer.body
    assert says in answer.error["message"]
    assert pipe.drawn == []


def test_other_refusals(api: FastAPI) -> None:
    async def talk() -> None:
        wrong = await ask(api, *DRAW, {"prompt": "a", "model": "dall-e-3"})
        assert wrong.status == 404 and wrong.error["code"] == "model_not_found" and "'stub'" in wrong.error["message"]
        assert (await ask(api, "GET", "/v1/image")).error["code"] == "not_found"
        assert (await ask(api, "GET", DRAW[1])).status == 405
        large = await ask(api, *DRAW, b" " * (1 << 20) + b"{}")
        assert large.status == 413 and large.error["code"] == "too_large"
        announced = await ask(api, *DRAW, b"{}", {"content-length": str(1 << 40)})
        assert announced.status == 413
        form = await ask(api, *DRAW, {"prompt": "a"}, {"content-type": "application/x-www-form-urlencoded"})
        assert form.status == 400 and "Content-Type: application/json" in form.error["message"]
        bad = await ask(api, *DRAW, {"prompt": "a"}, {"X-Request-Id": "a b"})
        assert bad.status == 400 and bad.error["param"] == "x-request-id"

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RankFailed("rank 1 was ended by SIGKILL", rank=1), 503, "rank_failed"),
        (StepTimeout("no rank moved on"), 503, "step_timeout"),
        (OutOfMemory("rank 0 ran out"), 503, "out_of_memory"),
        (PoolTooLarge("patch2 fits"), 400, "too_large"),
        (ValueError("`eta` is wrong"), 400, "invalid_value"),
        (ZeroDivisionError("of a layer"), 500, "internal_error"),
    ],
)
def test_a_call_that_fails_is_answered_and_the_next_one_works(
    api: FastAPI, pipe: StubPipeline, error: Exception, status: int, code: str
) -> None:
    pipe.__dict__["fails"] = error
    answer = generate(api)
    assert answer.status == status and answer.error["code"] == code and str(error) in answer.error["message"]
    assert (answer.headers.get("retry-after") == "1") == (code in ("rank_failed", "step_timeout"))
    assert generate(api).status == 200
    ready = asyncio.run(ask(api, "GET", "/ready"))
    last = ready.json["last_failure"]
    assert ready.status == 200 and (last is None if code == "invalid_value" else str(error) in last["message"])


def test_in_order_of_arrival_and_no_more_than_the_queue_holds(api: FastAPI, pipe: StubPipeline, engine: Engine) -> None:
    async def talk() -> None:
        assert (await ask(api, *DRAW, {"prompt": "before"})).status == 200
        pipe.go.clear()
        begun = []
        for name in "abc":
            begun.append(begin(api, *DRAW, {"prompt": name}))
            await until(lambda: len(pipe.drawn) == 2)
        await until(lambda: (engine.num_waiting, engine.num_drawn) == (2, 1))
        full = await ask(api, *DRAW, {"prompt": "d"})
        assert full.status == 429 and full.error["type"] == "rate_limit_error" and full.error["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        text = (await ask(api, "GET", "/metrics")).body.decode()
        assert "distrifusion_queue_length 2.0" in text and "distrifusion_drawing 1.0" in text
        pipe.go.set()
        await asyncio.gather(*(task for task, _ in begun))
        assert [answer.status for _, answer in begun] == [200] * 3
        assert pipe.drawn == ["before", "a", "b", "c"]

    asyncio.run(talk())


def test_one_that_passes_its_limit_is_cancelled(engine: Engine, pipe: StubPipeline, settings: Settings) -> None:
    hurried = app(engine, replace(settings, request_timeout=0.2))
    pipe.go.clear()
    answer = generate(hurried)
    assert answer.status == 504 and answer.error["code"] == "timeout" and "--request-timeout" in answer.error["message"]
    patient = app(engine, settings)

    async def talk() -> None:
        await until(lambda: engine.num_drawn == 0)
        pipe.go.set()
        assert (await ask(patient, *DRAW, {"prompt": "next"})).status == 200

    asyncio.run(talk())
    assert pipe.drawn == ["a lake", "next"]


def test_requests_are_cancelled_by_their_id(api: FastAPI, pipe: StubPipeline, engine: Engine) -> None:
    async def talk() -> None:
        pipe.go.clear()
        drawn = begin(api, *DRAW, {"prompt": "drawn"}, {"X-Request-Id": "one"})
        await until(lambda: pipe.drawn == ["drawn"])
        waits = begin(api, *DRAW, {"prompt": "waits"}, {"X-Request-Id": "two"})
        await until(lambda: engine.num_waiting == 1)
        twice = await ask(api, *DRAW, {"prompt": "a"}, {"X-Request-Id": "two"})
        assert twice.status == 400 and "choose another" in twice.error["message"]
        for name, (task, answer) in (("two", waits), ("one", drawn)):
            gone = await ask(api, "DELETE", f"/v1/requests/{name}")
            assert gone.status == 200 and gone.json == {"id": name, "cancelled": True}
            await task
            assert answer.status == 499 and answer.error["code"] == "cancelled"
            assert answer.headers["x-request-id"] == name
        late = await ask(api, "DELETE", "/v1/requests/one")
        assert late.status == 404 and late.error["code"] == "request_not_found"
        pipe.go.set()
        assert (await ask(api, *DRAW, {"prompt": "next"})).status == 200

    asyncio.run(talk())
    assert pipe.drawn == ["drawn", "next"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_request(api: FastAPI, pipe: StubPipeline, engine: Engine, stream: bool) -> None:
    async def talk() -> None:
        pipe.go.clear()
        drawn, first = begin(api, *DRAW, {"prompt": "drawn", "stream": stream})
        await until(lambda: pipe.drawn == ["drawn"])
        waits, second = begin(api, *DRAW, {"prompt": "waits", "stream": stream})
        await until(lambda: engine.num_waiting == 1)
        second.hangs_up.set()
        first.hangs_up.set()
        await asyncio.gather(drawn, waits)
        await until(lambda: (engine.num_waiting, engine.num_drawn) == (0, 0))
        pipe.go.set()
        assert (await ask(api, *DRAW, {"prompt": "next"})).status == 200
        text = (await ask(api, "GET", "/metrics")).body.decode()
        assert 'distrifusion_requests_total{outcome="cancelled"} 2.0' in text

    asyncio.run(talk())
    assert pipe.drawn == ["drawn", "next"]


def test_the_key(engine: Engine, settings: Settings) -> None:
    api = app(engine, replace(settings, api_key="secret"))

    async def talk() -> None:
        for headers, says in (({}, "missing"), ({"Authorization": "Bearer secre"}, "wrong")):
            for method, path in (DRAW, ("GET", "/v1/models"), ("DELETE", "/v1/requests/a")):
                answer = await ask(api, method, path, {"prompt": "a"}, headers)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.error["type"] == "authentication_error" and says in answer.error["message"]
        assert (await ask(api, *DRAW, {"prompt": "a"}, {"Authorization": "Bearer secret"})).status == 200
        assert (await ask(api, "GET", "/health")).status == 200

    asyncio.run(talk())


def test_what_a_monitor_and_a_program_may_ask(api: FastAPI) -> None:
    async def talk() -> None:
        assert (await ask(api, "GET", "/health")).json == {"status": "ok"}
        ready = (await ask(api, "GET", "/ready")).json
        assert ready == {
            "ready": True,
            "model": "stub",
            "plan": "cfg2",
            "devices": ["cpu", "cpu"],
            "waiting": 0,
            "drawing": 0,
            "last_failure": None,
        }
        assert [model["id"] for model in (await ask(api, "GET", "/v1/models")).json["data"]] == ["stub"]
        await ask(api, *DRAW, {"prompt": "a", "n": 2})
        await ask(api, *DRAW, {"prompt": ""})
        text = (await ask(api, "GET", "/metrics")).body.decode()
        for line in (
            'distrifusion_requests_total{outcome="ok"} 1.0',
            'distrifusion_requests_total{outcome="invalid_value"} 1.0',
            "distrifusion_pictures_total 2.0",
            "distrifusion_step_seconds_count 2.0",
            "distrifusion_step_seconds_sum 1.0",
            "distrifusion_request_seconds_count 1.0",
            'distrifusion_plan_info{devices="cpu,cpu",model="stub",plan="cfg2"} 1.0',
        ):
            assert line in text, line

    asyncio.run(talk())


def test_every_field_is_described(api: FastAPI) -> None:
    schemas = asyncio.run(ask(api, "GET", "/openapi.json")).json["components"]["schemas"]
    assert schemas["ImageRequest"]["additionalProperties"] is False
    assert all("description" in field for field in schemas["ImageRequest"]["properties"].values())


def test_a_server_that_stops_takes_nothing_and_lets_the_running_one_end(
    api: FastAPI, pipe: StubPipeline, engine: Engine
) -> None:
    async def talk() -> None:
        pipe.go.clear()
        drawn, first = begin(api, *DRAW, {"prompt": "drawn"})
        await until(lambda: pipe.drawn == ["drawn"])
        waits, second = begin(api, *DRAW, {"prompt": "waits"})
        await until(lambda: engine.num_waiting == 1)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, 60))
        await waits
        assert second.status == 503 and second.error["code"] == "shutting_down"
        late = await ask(api, *DRAW, {"prompt": "late"})
        assert late.status == 503 and late.headers["retry-after"]
        assert (await ask(api, "GET", "/ready")).status == 503
        pipe.go.set()
        assert await closing
        await drawn
        assert first.status == 200

    asyncio.run(talk())


def test_a_server_that_stops_at_once_cancels_the_running_one(api: FastAPI, pipe: StubPipeline, engine: Engine) -> None:
    async def talk() -> None:
        pipe.go.clear()
        task, answer = begin(api, *DRAW, {"prompt": "drawn"})
        await until(lambda: pipe.drawn == ["drawn"])
        assert await asyncio.to_thread(engine.close, 0)
        await task
        assert answer.status == 503 and answer.error["code"] == "shutting_down"

    asyncio.run(talk())
