"""A request as server-sent events: its place in the queue, its steps, and its pictures or its error."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from distrifusion.serve.answers import ImageResponse
from distrifusion.serve.engine import Drawn, Engine
from distrifusion.serve.faults import Fault, fault_of
from distrifusion.serve.following import Following
from distrifusion.serve.metrics import Metrics

# Seconds between two looks at a request, and without an event after which a comment keeps the connection.
_LOOK = 0.05
_SILENCE = 15.0


async def events(
    engine: Engine, following: Following, answer: Callable[[Drawn], Awaitable[ImageResponse]], metrics: Metrics
) -> AsyncIterator[str]:
    """The events of a request. One that is left before its end cancels the request.

    Args:
        answer: makes the last event of what was drawn.
    """
    try:
        with metrics.request():
            async with following:
                async for event in _progress(engine, following):
                    yield event
            response = await answer(following.drawn())
        yield _event("image_generation.completed", response.model_dump())
    except Fault as fault:
        yield _event("error", fault.body)
    except Exception as error:
        # The status has been sent: the answer has no other place to say it.
        yield _event("error", fault_of(error).body)
        raise


async def _progress(engine: Engine, following: Following) -> AsyncIterator[str]:
    job = following.job
    of = job.order.arguments.get("num_inference_steps")
    said: tuple[int, int | None] | None = None
    at = time.monotonic()
    while not await following.settle(0 if said is None else _LOOK):
        ahead, step = engine.ahead(job), engine.step(job)
        if said is None or ((ahead, step) != said and (ahead or step is not None)):
            if said is None or ahead or step is None:  # the first event tells the request's id, also if nobody waits
                said = ahead, None
                yield _event("image_generation.queued", {"id": job.id, "ahead": ahead})
            else:
                said = ahead, step
                yield _event("image_generation.progress", {"id": job.id, "step": step, "of": of})
            at = time.monotonic()
        elif time.monotonic() - at > _SILENCE:
            yield ": still here\n\n"
            at = time.monotonic()


def _event(kind: str, content: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n"
