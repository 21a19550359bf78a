"""One handshake against a socket made like the real ones; for the start-up self-test of `srengine.security`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq

from srengine import limits
from srengine.metrics import Metrics
from srengine.transport import sockets
from srengine.transport.peers import KeyPair
from srengine.transport.zap import ZapHandler

Admit = Callable[[str, str, bytes | None], bool]
_FINAL: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


class _Door:
    def __init__(self, admit: Admit) -> None:
        self.admit = admit


async def try_handshake(keys: KeyPair, admit: Admit | None) -> bool:
    """Return whether a peer with ``keys`` comes in; ``admit`` None: no handler answers ZeroMQ's question."""
    context = sockets.new_context()
    outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def event(kind: int, _value: int) -> None:
        if not outcome.done():
            outcome.set_result(kind == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    handler = None
    if admit is not None:
        door = _Door(admit)
        handler = ZapHandler(context, lambda: door, lambda: True, Metrics())
    server_keys = sockets.new_key_pair()
    server = sockets.bind(context, "client", "tcp://127.0.0.1:*", keys=server_keys)
    address = server.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes), address
    where = address.rstrip(b"\0").decode()
    client = sockets.dealer(context, "client", where, keys=keys, server_key=server_keys.public)
    monitor = sockets.Monitor(client, _FINAL, event)
    try:
        client.connect(where)
        async with asyncio.timeout(2 * limits.HANDSHAKE_MS / 1000):
            return await outcome
    except TimeoutError:
        return False
    finally:
        monitor.close()
        client.close(0)
        server.close(0)
        if handler is not None:
            handler.close()
        context.term()
