"""Ways between nodes by node id, for coordination: requests, streams, and posts; what `ha.backends.Wire` asks for.

`reach.Ways` knows members by name and address; configurations of groups know ids. This module keeps the two together,
as the table of members says, and gives the driver of groups its posts: one-way messages on the peer port, which need no
answer and may be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec

from srengine import errors
from srengine.node.reach import Ways
from srengine.transport import Channel, Endpoint, Peer, Reply
from srengine.types import NodeId

Attachments = Sequence[bytes | bytearray | memoryview]
FIND_AGAIN_S: Final = 0.1
"""A node that could not be asked who it is is left alone for so long."""


class Posts:
    """Posts to one node: `consensus.driver.PostChannel`. While its peer address is not known yet, what is posted is
    dropped and the node is asked who it is.
    """

    def __init__(self, ways: Ways, name: str, spawn: Callable[[Any, str], Any]) -> None:
        self.name = name
        self.on_down: Callable[[errors.Error], None] | None = None
        self._ways = ways
        self._spawn = spawn
        self._channel: Channel | None = None
        self._finding = False
        self._not_before = 0.0

    @property
    def connected(self) -> bool:
        """Whether a connection stands."""
        return self._channel is not None and self._channel.connected

    def post(self, message: msgspec.Struct) -> bool:
        """See `transport.Channel.post`."""
        if self._channel is None:
            self._find()
            return False
        return self._channel.post(message)

    def wake(self) -> None:
        """Try again at once: the node is there."""
        self._not_before = 0.0
        if self._channel is not None:
            self._channel.wake()
        else:
            self._find()

    def _find(self) -> None:
        if not self._finding and asyncio.get_running_loop().time() >= self._not_before:
            self._finding = True
            self._spawn(self._look(), f"find {self.name}")

    async def _look(self) -> None:
        try:
            channel = await self._ways[self.name].peer_channel()
        except errors.Error as error:
            self._not_before = asyncio.get_running_loop().time() + FIND_AGAIN_S
            if self.on_down is not None:
                self.on_down(error)
        else:
            self._channel = channel
            channel.on_down = self._down
        finally:
            self._finding = False

    def _down(self, error: errors.Error) -> None:
        # It may come back at another port: it is asked again who it is.
        self._channel = None
        self._ways[self.name].forget_introduction()
        if self.on_down is not None:
            self.on_down(error)


class NodeWire:
    """`ha.backends.Wire` over this node's endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        ways: Ways,
        spawn: Callable[[Any, str], Any],
        given: Callable[[str, str, str], tuple[str, str]],
    ) -> None:
        """``given(name, address, public_key)``: where the node really is, if the command line knows better."""
        self._endpoint = endpoint
        self._given = given
        self._ways = ways
        self._spawn = spawn
        self._names: dict[NodeId, str] = {}
        self._posts: dict[NodeId, Posts] = {}

    # --- who is where ------------------------------------------------------------------------------------------------

    def know(self, node_id: NodeId, name: str, address: str, public_key: str) -> None:
        """See `Wire.know`."""
        address, public_key = self._given(name, address, public_key)
        before = self._ways[name] if self._ways.knows(name) else None
        way = self._ways.know(name, address, public_key)
        posts = self._posts.get(node_id)
        if posts is not None and (posts.name != name or way is not before):
            del self._posts[node_id]
        self._names[node_id] = name

    def forget(self, node_id: NodeId) -> None:
        """See `Wire.forget`."""
        self._names.pop(node_id, None)
        self._posts.pop(node_id, None)

    def name_of(self, node_id: NodeId) -> str | None:
        """Return the name of a known node."""
        return self._names.get(node_id)

    def connected(self, name: str) -> bool:
        """Return whether posts reach the node of that name now."""
        return any(posts.name == name and posts.connected for posts in self._posts.values())

    def wake(self, name: str) -> None:
        """Try to reach the node of that name at once: it has just called."""
        for posts in self._posts.values():
            if posts.name == name:
                posts.wake()

    def _name(self, node_id: NodeId) -> str:
        name = self._names.get(node_id)
        if name is None:
            raise errors.Unreachable(f"no address of node {node_id} is known", sent=False)
        return name

    # --- saying ------------------------------------------------------------------------------------------------------

    def channel(self, node_id: NodeId) -> Posts | None:
        """Return the way of posts to a node; None for a stranger."""
        posts = self._posts.get(node_id)
        name = self._names.get(node_id)
        if posts is None and name is not None:
            posts = self._posts[node_id] = Posts(self._ways, name, self._spawn)
        return posts

    async def request(
        self, target: NodeId, message: msgspec.Struct, *, timeout_s: float
    ) -> tuple[msgspec.Struct, Attachments]:
        """See `Wire.request`."""
        reply = await self._ways[self._name(target)].request(message, timeout_s=timeout_s)
        return reply.message, reply.attachments

    async def stream(
        self, target: NodeId, message: msgspec.Struct, *, timeout_s: float
    ) -> AsyncGenerator[memoryview, None]:
        """See `Wire.stream`."""
        async with aclosing(self._ways[self._name(target)].stream(message, timeout_s=timeout_s)) as items:
            async for item in items:
                yield item

    # --- hearing -----------------------------------------------------------------------------------------------------

    def serve(
        self,
        message_type: type[msgspec.Struct],
        handler: Callable[[NodeId, Any, Attachments], Awaitable[tuple[msgspec.Struct, Attachments]]],
    ) -> None:
        """See `Wire.serve`."""

        async def answered(peer: Peer, message: msgspec.Struct, attachments: Sequence[memoryview]) -> Reply:
            reply, more = await handler(_sender(peer), message, attachments)
            return Reply(reply, tuple(more))

        self._endpoint.serve(message_type, answered, ports=("peer",))

    def serve_stream(
        self, message_type: type[msgspec.Struct], handler: Callable[[NodeId, Any], AsyncGenerator[bytes, None]]
    ) -> None:
        """See `Wire.serve_stream`."""

        async def streamed(peer: Peer, message: msgspec.Struct) -> AsyncGenerator[bytes, None]:
            async with aclosing(handler(_sender(peer), message)) as items:
                async for item in items:
                    yield item

        self._endpoint.serve_stream(message_type, streamed)

    def serve_posts(self, message_type: type[msgspec.Struct], handler: Callable[[Peer, Any], None]) -> None:
        """Hand posts of other nodes to ``handler``, in their order."""
        self._endpoint.serve_posts(message_type, handler, ports=("peer",))


def _sender(peer: Peer) -> NodeId:
    if not peer.node_id:
        raise errors.ForeignData("only nodes may ask this")
    return NodeId(peer.node_id)
