"""A client that speaks ASGI to an application in this loop: it hears parts as they are sent, and it may hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

DRAW = ("POST", "/v1/images/generations")


@dataclass
class Answer:
    """What came back, as far as it has come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hangs_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The one form of all errors, held here for every test."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Server-sent events."""
        blocks = [block for block in self.body.decode().split("\n\n") if block.startswith("event: ")]
        lines = [block.split("\n", 1) for block in blocks]
        return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in lines]


def begin(
    app: FastAPI, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[asyncio.Task[None], Answer]:
    """Send a request; `body` is JSON, or bytes as they are."""
    answer = Answer()
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent = {"content-type": "application/json", **(headers or {})}
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await answer.hangs_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    async def talk() -> None:
        await app(scope, receive, send)

    return asyncio.create_task(talk()), answer


async def ask(app: FastAPI, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """Send a request and wait for all of its answer."""
    task, answer = begin(app, method, path, body, headers)
    await asyncio.wait_for(task, 60)
    return answer


async def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until something holds; fail if it never does."""
    for _ in range(round(seconds / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")
