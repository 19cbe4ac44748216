"""What is sent once a call without waiting, and has arrived by the next one."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod

from distrifusion.exchange.transport import Message, Pending, Transport


def tag_of(name: str) -> int:
    """The message tag of a site: the same on every rank, whatever ran before."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


class Posted(ABC):
    """Something that is sent once a call and has arrived by the next one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tag = tag_of(name)
        self._pending: Pending | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether something was posted that nobody has waited for."""
        return self._pending is not None

    def settle(self) -> None:
        """Wait for what was posted; afterwards the tensors may be read and written."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def messages(self) -> tuple[list[Message], list[Message]]:
        """What to send and what to receive."""

    def post(self, transport: Transport) -> int:
        """Send and receive without waiting; returns the bytes sent."""
        sends, receives = self.messages()
        self._pending = transport.post(sends, receives)
        return sum(message.tensor.nbytes for message in sends)
