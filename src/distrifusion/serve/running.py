"""The process around the application: where it listens, and how it comes to its end."""

from __future__ import annotations

import math
import signal
import socket
import threading
from types import FrameType

import uvicorn

from distrifusion.errors import ConfigError
from distrifusion.serve.engine import FAREWELL, Engine
from distrifusion.serve.http import Settings, app


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; it does not listen yet, so that nobody waits for a server that is still loading.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
        return bound
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port") from error


def run(engine: Engine, settings: Settings, bound: socket.socket, grace: float) -> bool:
    """Serve until SIGINT or SIGTERM; called in the main thread.

    Args:
        bound: where to listen; it is closed.
        grace: seconds that the running request gets to end; a second signal ends it after its step.

    Returns:
        False if the pipeline still draws.
    """
    # The engine sees to it that requests end; uvicorn's own limit is for clients that do not read their answers.
    limit = math.ceil(grace + FAREWELL)
    config = uvicorn.Config(app(engine, settings), log_level="info", timeout_graceful_shutdown=limit)
    _Server(config, engine, grace).run([bound])
    return engine.close(0)


class _Server(uvicorn.Server):
    """Stops the engine, too, on a signal, which is not raised again afterwards: the pipeline is still to be closed."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the running request end; the next one cancels it, and Ctrl-C waits for nobody."""
        grace = 0.0 if self.should_exit else self._grace
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        # In a thread: the engine's lock may be held by the code that the signal interrupted.
        threading.Thread(target=self._engine.close, args=(grace,), daemon=True).start()
