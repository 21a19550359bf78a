"""`connect`: the usual way to a `Client`."""

from __future__ import annotations

from collections.abc import Iterable

from srengine.client import routing
from srengine.client.asynchronous import TIMEOUT_S_DEFAULT
from srengine.client.blocking import Client


def connect(
    endpoints: str | Iterable[str] = routing.DEFAULT_ENDPOINT,
    *,
    token: str | None = None,
    key_file: str | None = None,
    server_key: str | None = None,
    timeout_s: float = TIMEOUT_S_DEFAULT,
) -> Client:
    """Return a `Client` of the cluster at ``endpoints`` (``"tcp://host:port[,…]"`` or several such texts).

    ``timeout_s``: seconds that one call may take, failover included. Nothing is sent before the first call, which
    raises `Unreachable` when nobody answers. `InvalidValue` for endpoints or keys that are none.

    >>> cluster = connect("tcp://127.0.0.1:7400")
    >>> cluster.table("shop.orders")
    <Table shop.orders>
    >>> cluster.close()
    """
    return Client(endpoints, token=token, key_file=key_file, server_key=server_key, timeout_s=timeout_s)
