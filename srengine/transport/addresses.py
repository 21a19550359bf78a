"""Addresses: ``tcp://host:port`` and ``ipc://path``, and which of them stay on this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final

from srengine import errors

_TCP: Final = re.compile(
    r"^tcp://(?P<host>\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._*-]{1,253}):(?P<port>\d{1,5}|\*)$", re.ASCII
)
_IPC: Final = re.compile(r"^ipc://[^\x00-\x1f]{1,100}$")


def check(address: str) -> str:
    """Return ``address`` if it can be meant; `InvalidValue` otherwise."""
    found = _TCP.fullmatch(address)
    if found is not None and (found["port"] == "*" or int(found["port"]) <= 65535):
        return address
    if _IPC.fullmatch(address) is not None:
        return address
    raise errors.InvalidValue(f"{address[:100]!r} is no address: tcp://host:port or ipc://path", address=address[:100])


def stays_on_this_machine(address: str) -> bool:
    """Return whether only processes of this machine can connect to ``address``: ipc, or loopback."""
    found = _TCP.fullmatch(check(address))
    if found is None:
        return True
    host = found["host"].strip("[]").partition("%")[0]
    if host in {"*", ""}:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        resolved = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise errors.InvalidValue(f"the host {host!r} cannot be resolved: {error}", address=address) from error
    return bool(resolved) and all(ipaddress.ip_address(text).is_loopback for text in resolved)
