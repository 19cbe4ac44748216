"""What every request passes first: it gets an id, and its body a limit."""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "X-Request-Id"
ID_FORM = r"^[A-Za-z0-9._-]{1,64}$"
_MAX_BYTES = 1 << 20


class Entrance:
    """Puts `request_id` into the scope's state, the client's own if it sent one, and into the answer's headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if re.match(ID_FORM, given) else f"img-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, _Limited(receive, headers.get("content-length")), send_with_id)


class _Limited:
    """A body that may have so many bytes and no more."""

    def __init__(self, receive: Receive, announced: str | None) -> None:
        self._receive = receive
        self._announced = int(announced) if announced is not None and announced.isdecimal() else 0
        self._came = 0

    async def __call__(self) -> Any:
        message = await self._receive()
        self._came += len(message.get("body", b""))
        if max(self._announced, self._came) > _MAX_BYTES:
            raise HTTPException(413, f"the body is larger than {_MAX_BYTES} bytes; send a smaller one")
        return message
