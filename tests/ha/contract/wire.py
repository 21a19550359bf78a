"""Ways between the nodes of a test: endpoints of the in-memory network, and a book of addresses by node id."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from srengine import errors
from srengine.transport import Reply
from srengine.types import NodeId

Book = dict[NodeId, dict[str, str]]
"""Address of each port of each node that runs."""


class BookWire:
    """See `srengine.ha.backends.Wire`."""

    def __init__(self, endpoint, book: Book) -> None:
        self.endpoint = endpoint
        self.book = book
        self.known: dict[NodeId, str] = {}
        self._channels = {}
        self._closing = set()

    def _channel(self, node: NodeId, port: str):
        address = self.book.get(node, {}).get(port)
        if address is None:
            return None
        known = self._channels.get((node, port))
        if known is not None and known.address == address:
            return known
        if known is not None:
            task = asyncio.ensure_future(known.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._channels[node, port] = channel = self.endpoint.channel(address, port=port)
        return channel

    def channel(self, node: NodeId):
        return self._channel(node, "peer")

    async def request(self, target: NodeId, message, *, timeout_s: float):
        channel = self._channel(target, "peer")
        if channel is None:
            raise errors.Unreachable(f"no address of {target} is known", sent=False)
        reply = await channel.request(message, timeout_s=timeout_s)
        return reply.message, reply.attachments

    async def stream(self, target: NodeId, message, *, timeout_s: float) -> AsyncGenerator[memoryview, None]:
        channel = self._channel(target, "bulk")
        if channel is None:
            raise errors.Unreachable(f"no address of {target} is known", sent=False)
        async with contextlib.aclosing(channel.stream(message, timeout_s=timeout_s)) as items:
            async for item in items:
                yield item

    def serve(self, message_type, handler) -> None:
        async def answer(peer, message, attachments):
            return Reply(*await handler(NodeId(peer.node_id), message, attachments))

        self.endpoint.serve(message_type, answer, ports=("peer",))

    def serve_stream(self, message_type, handler) -> None:
        async def answer(peer, message):
            async with contextlib.aclosing(handler(NodeId(peer.node_id), message)) as items:
                async for item in items:
                    yield item

        self.endpoint.serve_stream(message_type, answer)

    def serve_posts(self, message_type, handler) -> None:
        self.endpoint.serve_posts(message_type, handler)

    def know(self, node_id: NodeId, name: str, address: str, public_key: str) -> None:
        self.known[node_id] = address

    def forget(self, node_id: NodeId) -> None:
        self.known.pop(node_id, None)
