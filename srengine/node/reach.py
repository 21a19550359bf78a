"""Ways to other nodes: from a member's name to channels, with one introduction in between.

Of another node only the client address is known (``--initial`` or the journal). The first request asks there who it is
and where its peer and bulk ports are; the answer is kept until the node cannot be reached, because it may come back
elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec

from srengine import errors
from srengine.ha.messages import Introduce, Introduction
from srengine.node.options import split_address
from srengine.transport import Channel, Endpoint, Reply
from srengine.transport.peers import Buffer, Port

INTRODUCE_TIMEOUT_S = 2.0


def on_host_of(known: str, told: str) -> str:
    """Return ``told`` with the host of ``known``: a node that listens on all interfaces cannot know how it is reached.

    >>> on_host_of("tcp://10.0.0.7:7400", "tcp://0.0.0.0:7401")
    'tcp://10.0.0.7:7401'
    """
    host, _ = split_address(known)
    _, port = split_address(told)
    return f"tcp://{host}:{port}"


class Way:
    """The way to one member. Channels are made when first used."""

    def __init__(
        self, endpoint: Endpoint, name: str, address: str, server_key: bytes | None, introduce: Callable[[], Introduce]
    ) -> None:
        self.name = name
        self.address = address
        self._endpoint = endpoint
        self._server_key = server_key
        self.public_key = "" if server_key is None else server_key.hex()
        self._introduce = introduce
        self._client: Channel | None = None
        self._channels: dict[str, tuple[str, Channel]] = {}
        self._introduction: Introduction | None = None
        self._attempt: asyncio.Future[Introduction] | None = None

    async def introduce(self, *, timeout_s: float = INTRODUCE_TIMEOUT_S) -> Introduction:
        """Ask who is there, at the client port."""
        if self._client is None:
            self._client = self._endpoint.channel(self.address, port="client", server_key=self._server_key)
        reply = await self._client.request(self._introduce(), timeout_s=timeout_s)
        if not isinstance(reply.message, Introduction):
            raise errors.FrameError(f"{self.address} answered an introduction with {type(reply.message).__name__}")
        if reply.message.name != self.name:
            raise errors.ForeignData(
                f"at {self.address} {self.name} was expected, and {reply.message.name} answers", name=reply.message.name
            )
        self._introduction = reply.message
        return reply.message

    async def _introduced(self) -> Introduction:
        """Return the introduction; who asks while one is on its way shares its end."""
        if self._introduction is not None:
            return self._introduction
        if self._attempt is None:
            self._attempt = asyncio.ensure_future(self.introduce())
            self._attempt.add_done_callback(self._attempted)
        attempt = self._attempt
        await asyncio.wait([attempt])
        if attempt.cancelled():
            raise errors.Closed("the node stops")
        error = attempt.exception()
        if isinstance(error, errors.Error):
            # A fresh one for each who waited: each has its own trace.
            raise errors.from_code(error.code, error.message, error.details)
        return attempt.result()

    def _attempted(self, attempt: asyncio.Future[Introduction]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()

    async def _channel(self, port: Port) -> Channel:
        told = await self._introduced()
        address = on_host_of(self.address, told.peer_address if port == "peer" else told.bulk_address)
        known = self._channels.get(port)
        if known is not None and known[0] == address:
            return known[1]
        channel = self._endpoint.channel(address, port=port, server_key=self._server_key)
        self._channels[port] = (address, channel)
        if known is not None:
            await known[1].close()
        return channel

    async def peer_channel(self) -> Channel:
        """Return the channel to the peer port, after an introduction when its address is not known."""
        return await self._channel("peer")

    def forget_introduction(self) -> None:
        """Ask again who is there before the next channel is made: the node may come back at other ports."""
        self._introduction = None

    async def request(self, message: msgspec.Struct, attachments: Sequence[Buffer] = (), *, timeout_s: float) -> Reply:
        """Ask at the peer port; as `Channel.request`."""
        channel = await self._channel("peer")
        try:
            return await channel.request(message, attachments, timeout_s=timeout_s)
        except errors.Unreachable:
            self._introduction = None
            raise

    async def stream(
        self, message: msgspec.Struct, *, timeout_s: float, proved: bool = False
    ) -> AsyncGenerator[memoryview, None]:
        """Read a stream from the bulk port; as `Channel.stream`."""
        channel = await self._channel("bulk")
        try:
            async with aclosing(channel.stream(message, timeout_s=timeout_s, proved=proved)) as items:
                async for item in items:
                    yield item
        except errors.Unreachable:
            self._introduction = None
            raise

    def wake(self) -> None:
        """Try again at once: the node has just called us."""
        if self._client is not None:
            self._client.wake()
        for _, channel in self._channels.values():
            channel.wake()


class Ways:
    """The ways to all members."""

    def __init__(self, endpoint: Endpoint, introduce: Callable[[], Introduce]) -> None:
        self._endpoint = endpoint
        self._introduce = introduce
        self._ways: dict[str, Way] = {}

    def know(self, name: str, address: str, public_key: str = "") -> Way:
        """Note a member's address; return the way to it."""
        way = self._ways.get(name)
        if way is None or way.address != address:
            key = bytes.fromhex(public_key) if public_key else None
            way = self._ways[name] = Way(self._endpoint, name, address, key, self._introduce)
        return way

    def __getitem__(self, name: str) -> Way:
        way = self._ways.get(name)
        if way is None:
            raise errors.Unreachable(f"no address of {name} is known")
        return way

    def knows(self, name: str) -> bool:
        """Return whether an address of the member is known."""
        return name in self._ways

    async def reach(self, name: str) -> Way:
        """Return the way to a member, for its requests and its streams; `Unreachable` for a stranger."""
        return self[name]

    def wake(self, name: str) -> None:
        """See `Way.wake`."""
        if name in self._ways:
            self._ways[name].wake()
