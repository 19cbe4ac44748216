"""Server-sent events of a request: place, steps, pictures or the error."""

from __future__ import annotations

import asyncio
from typing import Any

from asgi import DRAW, ask, begin, until
from fastapi import FastAPI
from stub import StubPipeline

from distrifusion import RankFailed
from distrifusion.serve.engine import Engine


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "stream": True, **more}


def test_place_steps_and_pictures(api: FastAPI, pipe: StubPipeline) -> None:
    async def talk() -> None:
        pipe.go.clear()
        first = begin(api, *DRAW, body("first"), {"X-Request-Id": "one"})
        await until(lambda: first[1].events[1:])
        second = begin(api, *DRAW, body("second", seed=7, num_inference_steps=4))
        await until(lambda: second[1].events)
        assert first[1].headers["content-type"].startswith("text/event-stream")
        assert first[1].headers["x-request-id"] == "one"
        kinds = [kind for kind, _ in first[1].events]
        assert kinds == ["image_generation.queued", "image_generation.progress"]
        assert first[1].events[1][1] == {"type": kinds[1], "id": "one", "step": 0, "of": 3}
        assert second[1].events[0][1]["ahead"] == 1
        pipe.go.set()
        await asyncio.gather(first[0], second[0])
        for _, answer in (first, second):
            steps = [content["step"] for kind, content in answer.events if kind.endswith("progress")]
            assert steps == sorted(set(steps))
            assert answer.events[-1][0] == "image_generation.completed"
        last = second[1].events[-1][1]
        assert last["data"][0]["seed"] == 7 and last["plan"] == "cfg2"
        alone = (await ask(api, *DRAW, {"prompt": "second", "seed": 7, "num_inference_steps": 4})).json
        assert alone["data"] == last["data"]

    asyncio.run(talk())


def test_an_error_is_the_last_event(api: FastAPI, pipe: StubPipeline, engine: Engine) -> None:
    async def talk() -> None:
        pipe.__dict__["fails"] = RankFailed("rank 1 was ended")
        answer = await ask(api, *DRAW, body("a"))
        assert answer.status == 200
        kind, content = answer.events[-1]
        assert kind == "error" and content["error"]["code"] == "rank_failed"
        pipe.go.clear()
        task, answer = begin(api, *DRAW, body("b"), {"X-Request-Id": "b"})
        await until(lambda: engine.num_drawn)
        await ask(api, "DELETE", "/v1/requests/b")
        await task
        assert answer.events[-1][1]["error"]["code"] == "cancelled"

    asyncio.run(talk())


def test_what_is_refused_has_its_own_status(api: FastAPI) -> None:
    answer = asyncio.run(ask(api, *DRAW, body("a", size="70x64")))
    assert answer.status == 400 and answer.error["param"] == "size"
