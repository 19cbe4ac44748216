"""The line between two processes of a pipeline: whole messages over a socket pair, and waits that can be ended."""

from __future__ import annotations

import pickle
import select
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

# Seconds between two looks at what may end a wait.
_LOOK = 0.25
_LENGTH = struct.Struct("!Q")


class PeerGone(BaseException):
    """The other side of a line is gone; no error of a pipeline, so that none of its handlers takes it."""


class Line:
    """One end of a line.

    Attributes:
        idle: called with the seconds waited whenever nothing has moved for a moment; it may raise to end the wait.
    """

    def __init__(self, end: socket.socket, idle: Callable[[float], None] | None = None) -> None:
        end.setblocking(False)
        self._end = end
        self.idle = idle

    def send(self, message: object) -> None:
        """Send one message. Raises PeerGone if the other side is gone, and what `idle` raises while it waits."""
        data = pickle.dumps(message)
        for part in (_LENGTH.pack(len(data)), data):
            rest = memoryview(part)
            while rest:
                rest = rest[self._move(select.POLLOUT, partial(self._end.send, rest)) :]

    def receive(self) -> Any:
        """Wait for one message. Raises PeerGone if the other side is gone, and what `idle` raises meanwhile."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def send_fd(self, fd: int) -> None:
        """Send a file descriptor; the other side asks for it after the message that announces it."""
        self._move(select.POLLOUT, partial(socket.send_fds, self._end, [b"f"], [fd]))

    def receive_fd(self) -> int:
        """Take the file descriptor that follows."""
        _, fds, _, _ = self._move(select.POLLIN, partial(socket.recv_fds, self._end, 1, 1))
        if not fds:
            raise PeerGone("the other side left before it sent its file descriptor")
        return fds[0]

    @property
    def is_cut(self) -> bool:
        """True if the other side is gone."""
        poller = select.poll()
        poller.register(self._end, 0)
        return bool(poller.poll(0))

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._end.fileno()

    def close(self) -> None:
        """Close this end; the process at the other ends."""
        self._end.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            moved = self._move(select.POLLIN, partial(self._end.recv_into, rest))
            if moved == 0:
                raise PeerGone("the other side has closed the line")
            rest = rest[moved:]
        return data

    def _move(self, event: int, transfer: Callable[[], Any]) -> Any:
        while True:
            self._wait(event)
            try:
                return transfer()
            except BlockingIOError:  # there was room for less than it looked like
                continue
            except OSError as error:
                raise PeerGone(str(error)) from error

    def _wait(self, event: int) -> None:
        poller = select.poll()
        try:
            poller.register(self._end, event)
        except ValueError as error:
            raise PeerGone("this side has closed the line") from error
        waited = 0.0
        while not poller.poll(_LOOK * 1000):
            waited += _LOOK
            if self.idle is not None:
                self.idle(waited)
