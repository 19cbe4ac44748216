"""Two network namespaces joined by a link of a chosen rate, to measure what a slow network does (Linux, as root)."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_INTERFACES = ("fusion0", "fusion1")
_CLONE_NEWNET = 0x40000000


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[str, str]]:
    """Make the two ends of a full-duplex link for the time of a `with`; gives the names of their namespaces.

    Args:
        rate: bits per second of either direction, as tc writes it, such as "1gbit".
    """
    names = tuple(f"fusion-{os.getpid()}-{end}" for end in (0, 1))
    try:
        for name in names:
            _ip("netns", "add", name)
        peer = ("peer", "name", _INTERFACES[1], "netns", names[1])
        _ip("-n", names[0], "link", "add", _INTERFACES[0], "type", "veth", *peer)
        for name, interface, address in zip(names, _INTERFACES, ADDRESSES, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms")
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", interface, *shape], check=True)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def enter(name: str, rank: int) -> str:
    """Move this process to one end of the link, for good, and have gloo use it; returns the address of rank 0."""
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {name} cannot be entered")
    os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACES[rank]
    return ADDRESSES[0]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
