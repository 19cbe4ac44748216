"""Waiting for a request's outcome, as long as its client does and no longer than the limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from distrifusion.serve.engine import Drawn, Engine, Job
from distrifusion.serve.faults import Fault, fault_of

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Following:
    """Follows one request, made within the event loop; a client that goes, or a block that is left early, cancels it.

    Args:
        receive: of ASGI, the body read.
        limit: seconds from now.

    Attributes:
        job: the request.
    """

    def __init__(self, engine: Engine, job: Job, receive: Receive, limit: float) -> None:
        self.job = job
        self._engine = engine
        self._receive = receive
        self._limit = limit
        loop = asyncio.get_running_loop()
        self._until = loop.time() + limit
        self._settled = asyncio.Event()
        self._gone = False

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # a loop that was closed has nobody who waits
                loop.call_soon_threadsafe(self._settled.set)

        job.outcome.add_done_callback(tell)
        # From now on, because a client may go before anybody has begun to answer.
        self._watched = {asyncio.create_task(self._settled.wait()), asyncio.create_task(self._client_goes())}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._watched:
            task.cancel()
        self._give_up()

    async def settle(self, pause: float | None = None) -> bool:
        """Wait, at most `pause` seconds; True if the outcome is there.

        Raises:
            Fault: if the client has gone, or the limit has passed.
        """
        left = self._until - asyncio.get_running_loop().time()
        timeout = left if pause is None else min(left, pause)
        await asyncio.wait(self._watched, timeout=max(timeout, 0), return_when=asyncio.FIRST_COMPLETED)
        if self._gone:
            raise Fault(499, "cancelled", "the client has gone")
        if self.job.outcome.done():
            return True
        if timeout >= left:
            raise Fault(
                504,
                "timeout",
                f"the request was not drawn within {self._limit:g} s, and is cancelled; ask for fewer steps or a "
                "smaller size, or start the server with a larger --request-timeout",
            )
        return False

    def drawn(self) -> Drawn:
        """The outcome, once it is there.

        Raises:
            Fault: if it is an error.
        """
        error = self.job.outcome.exception()
        if error is not None:
            raise fault_of(error) from error
        return self.job.outcome.result()

    async def _client_goes(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._give_up()

    def _give_up(self) -> None:
        if not self.job.outcome.done():
            self._engine.cancel(self.job.id)
