"""The network as torch.distributed sees it: interfaces, this machine's name, and what the environment says."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass

import psutil

# Seconds; a name server that does not answer takes a minute to be given up.
_LIMIT = 5.0
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")


@dataclass(frozen=True)
class Network:
    """What ranks can meet by.

    Attributes:
        interfaces: IPv4 address of every interface that is up.
        hostname: this machine's name.
        address: what the name resolves to, None if it does not in a few seconds.
        interface: which interface has that address: the one that gloo takes unless told otherwise.
        settings: variables of the environment that name interfaces or addresses.
    """

    interfaces: dict[str, str]
    hostname: str
    address: str | None
    interface: str | None
    settings: dict[str, str]


def look() -> Network:
    """The network as it is now."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    interfaces = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == socket.AF_INET
    }
    hostname = socket.gethostname()
    address = _resolved(hostname)
    interface = next((name for name, own in interfaces.items() if own == address), None)
    settings = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return Network(interfaces, hostname, address, interface, settings)


def _resolved(hostname: str) -> str | None:
    found: list[str] = []

    def ask() -> None:
        try:
            found.append(socket.gethostbyname(hostname))
        except OSError:
            return

    # The resolver has no limit of its own, and a daemon may be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_LIMIT)
    return found[0] if found else None
