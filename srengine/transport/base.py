"""What every endpoint does, whatever carries its frames: services, channels, the state of a connection that is made on
demand.

`srengine.transport.endpoint.Endpoint` does it over ZeroMQ, `srengine.transport.memory.MemoryEndpoint` in memory for
tests; both have the same errors, the same hello, the same credit, because only the `Wire` differs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec

from srengine import errors, limits
from srengine.codec import registry
from srengine.metrics import Metrics
from srengine.transport.caller import Caller
from srengine.transport.messages import Hello
from srengine.transport.peers import (
    Authenticator,
    Buffer,
    Handler,
    Identity,
    Peer,
    Port,
    PostHandler,
    Reply,
    StreamHandler,
    meet,
)
from srengine.transport.transfers import Budget

_PORTS: Final = ("client", "peer", "bulk")
_TICK_S: Final = 1.0

Message = TypeVar("Message", bound=msgspec.Struct)


class Channel:
    """A way to one address. Connects when first used, and again after a connection was lost, with back-off.

    A failed attempt fails every request that waits for it. During the back-off (100 ms doubling to 5 s, with jitter) a
    request fails with the reason of the last attempt instead of making a new one; `wake` ends the back-off.
    """

    def __init__(self, endpoint: BaseEndpoint, address: str, port: Port, server_key: bytes | None) -> None:
        self.endpoint = endpoint
        self.address = address
        self.port = port
        self.server_key = server_key
        self._caller: Caller | None = None
        self._attempt: asyncio.Task[Caller] | None = None
        self._failures = 0
        self._not_before = 0.0
        self._last_error: errors.Error | None = None
        self._closed = False
        self._held: list[msgspec.Struct] = []
        """Posts that wait for the attempt that is being made; at most `limits.POSTS_HELD_MAX`."""
        self.on_down: Callable[[errors.Error], None] | None = None
        """Told whenever a connection that stood has ended, and whenever an attempt failed (refused, hello included)."""

    @property
    def peer(self) -> Peer | None:
        """Who answered the last hello; None before the first."""
        return self._caller.peer if self._caller is not None else None

    @property
    def connected(self) -> bool:
        """Whether a connection stands now."""
        return self._caller is not None and self._caller.closed is None

    async def request(self, message: msgspec.Struct, attachments: Sequence[Buffer] = (), *, timeout_s: float) -> Reply:
        """Ask, and return the answer.

        Attachments travel as raw bytes beside the message, in parts when they are large; they must not change before
        the answer is there. Raises `Unreachable` (nobody there, or the connection was lost: ``sent`` says whether the
        request had left, then its effect is unknown), `TimedOut` (likewise), `NotAuthenticated`, `ForeignData` and
        `UnsupportedFeature` when hello fails, `InvalidValue` for what is too large, `Closed`, and whatever typed error
        the handler raised.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        caller = self._caller
        if caller is None or caller.closed is not None:
            caller = await self._connect(deadline)
        return await caller.request(message, attachments, deadline)

    def stream(
        self, message: msgspec.Struct, *, timeout_s: float, proved: bool = False
    ) -> AsyncGenerator[memoryview, None]:
        """Return a generator of the items of a stream, whole and in order.

        ``proved``: the items carry a digest that the caller verifies, so frames do not check them a second time; only
        then is damage on the way the caller's to find.

        ``timeout_s`` is how long it may bring nothing at all. Raises what `request` raises. Whoever stops early closes
        the generator (``aclose``), which tells the peer to stop.
        """
        caller = self._caller
        if caller is not None and caller.closed is None:
            return caller.stream(message, timeout_s, proved=proved)
        return self._connect_and_stream(message, timeout_s, proved=proved)

    async def _connect_and_stream(
        self, message: msgspec.Struct, timeout_s: float, *, proved: bool
    ) -> AsyncGenerator[memoryview, None]:
        caller = await self._connect(asyncio.get_running_loop().time() + timeout_s)
        async with aclosing(caller.stream(message, timeout_s, proved=proved)) as items:
            async for item in items:
                yield item

    def post(self, message: msgspec.Struct) -> bool:
        """Say a message that gets no answer and may be lost; return False when it is known to be dropped.

        It is encoded and handed to the connection before this returns. Without a connection one is begun, unless the
        back-off goes on, and the message waits for it; it is dropped when that fails, and when
        `limits.POSTS_BYTES_MAX` are on their way already. Each drop is counted. `InvalidValue` for a message that is
        larger than a part of the port, or than the port's frame.
        """
        caller = self._caller
        if caller is not None and caller.closed is None:
            return caller.post_message(message)
        if not self._closed and self._attempt is None:
            loop = asyncio.get_running_loop()
            if self._not_before <= loop.time():
                self._begin_attempt(loop)
        if self._attempt is None or len(self._held) >= limits.POSTS_HELD_MAX:
            self._drop_posts(1)
            return False
        self._held.append(message)
        return True

    def _drop_posts(self, count: int) -> None:
        self.endpoint.metrics.add("srengine_transport_posts_dropped_total", count, port=self.port)

    def wake(self) -> None:
        """End the back-off: the address is known to be there again (its node has just called us)."""
        self._failures = 0
        self._not_before = 0.0

    async def close(self) -> None:
        """End the connection; waiting requests fail with `Unreachable`. Idempotent."""
        self._closed = True
        self.endpoint.forget_channel(self)
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait([self._attempt])
        if self._caller is not None:
            self._caller.flush()
            self._caller.fail(errors.Closed("the channel was closed"))

    async def _connect(self, deadline: float) -> Caller:
        if self._closed:
            raise errors.Closed("the channel was closed")
        loop = asyncio.get_running_loop()
        if self._attempt is None:
            pause_s = self._not_before - loop.time()
            if pause_s > 0 and self._last_error is not None:
                # A short wait, so that a caller that tries again at once does not spin.
                await asyncio.sleep(min(pause_s, limits.RECONNECT_MS_MIN / 1000))
                if self._closed:
                    # NB: a socket made after the endpoint's end would keep its context from ending, for ever.
                    raise errors.Closed("the channel was closed")
                if self._not_before > loop.time():
                    raise _again(self._last_error)
                if self.connected:
                    assert self._caller is not None
                    return self._caller
        attempt = self._attempt if self._attempt is not None else self._begin_attempt(loop)
        # Others may wait for the same attempt: a caller that gives up does not end it.
        await asyncio.wait([attempt], timeout=max(0.0, deadline - loop.time()))
        if not attempt.done():
            raise errors.Unreachable(f"no connection to {self.address} in time", address=self.address, sent=False)
        if attempt.cancelled():
            raise errors.Closed("the channel was closed")
        error = attempt.exception()
        if isinstance(error, errors.Error):
            raise _again(error)
        return attempt.result()

    def _begin_attempt(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[Caller]:
        assert not self._closed, self.address
        self._attempt = attempt = loop.create_task(self.endpoint.open_caller(self))
        attempt.add_done_callback(self._attempted)
        return attempt

    def _attempted(self, attempt: asyncio.Task[Caller]) -> None:
        self._attempt = None
        held, self._held = self._held, []
        if attempt.cancelled():
            self._drop_posts(len(held))
            return
        error = attempt.exception()
        if error is None:
            self._caller = caller = attempt.result()
            self._failures = 0
            self._not_before = 0.0
            for message in held:
                caller.post_message(message)
            if caller.closed is None:
                caller.on_end = self._tell_down
            else:
                self._tell_down(caller.closed)
            return
        self._drop_posts(len(held))
        self._last_error = error if isinstance(error, errors.Error) else errors.Error(f"cannot connect: {error}")
        self._failures += 1
        pause_ms = min(limits.RECONNECT_MS_MIN * 2 ** min(self._failures - 1, 16), limits.RECONNECT_MS_MAX)
        self._not_before = asyncio.get_running_loop().time() + pause_ms / 1000 * random.uniform(0.5, 1.0)
        self._tell_down(self._last_error)

    def _tell_down(self, error: errors.Error) -> None:
        if self.on_down is not None and not self._closed:
            self.on_down(error)

    def tick(self, now: float) -> None:
        """Look after the connection; called by the endpoint about once a second."""
        if self._caller is not None:
            self._caller.check_progress(now)


class BaseEndpoint:
    """Services and channels of one process. Made and used on one event loop."""

    def __init__(
        self,
        identity: Identity,
        *,
        authenticator: Authenticator | None = None,
        admit: Callable[[Peer], None] | None = None,
        insecure: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """``admit`` looks at each peer after its hello and raises a typed error to refuse it.

        ``insecure`` allows to listen on routable addresses without keys.
        """
        self.identity = identity
        self.authenticator = authenticator
        self.admit = admit
        self.insecure = insecure
        self.metrics = metrics if metrics is not None else Metrics()
        self.budget = Budget(limits.ENDPOINT_BYTES_MAX)
        self.closed = False
        self._handlers: dict[tuple[str, type[msgspec.Struct]], Handler] = {}
        self._stream_handlers: dict[tuple[str, type[msgspec.Struct]], StreamHandler] = {}
        self._post_handlers: dict[tuple[str, type[msgspec.Struct]], PostHandler] = {}
        self._channels: set[Channel] = set()

    # --- services ----------------------------------------------------------------------------------------------------

    def serve(
        self, message_type: type[msgspec.Struct], handler: Any, *, ports: tuple[Port, ...] = ("client", "peer")
    ) -> None:
        """Answer messages of a registered type at these ports with ``handler(peer, message, attachments) -> Reply``."""
        registry.kind_of(message_type)
        for port in ports:
            assert port in _PORTS, port
            assert (port, message_type) not in self._handlers, (port, message_type)
            self._handlers[port, message_type] = handler

    def serve_stream(
        self, message_type: type[msgspec.Struct], handler: Any, *, ports: tuple[Port, ...] = ("bulk",)
    ) -> None:
        """Answer such a message with a stream: ``handler(peer, message)`` is an async generator of bytes."""
        registry.kind_of(message_type)
        for port in ports:
            assert port in _PORTS, port
            assert (port, message_type) not in self._stream_handlers, (port, message_type)
            self._stream_handlers[port, message_type] = handler

    def serve_posts(
        self, message_type: type[msgspec.Struct], handler: Any, *, ports: tuple[Port, ...] = ("peer",)
    ) -> None:
        """Hand on such posts to ``handler(peer, message)``, a plain function that does not block, in their order."""
        registry.kind_of(message_type)
        for port in ports:
            assert port in _PORTS, port
            assert (port, message_type) not in self._post_handlers, (port, message_type)
            self._post_handlers[port, message_type] = handler

    def handler(self, port: str, message_type: type[msgspec.Struct]) -> Handler | None:
        """Return who answers such a message at this port."""
        return self._handlers.get((port, message_type))

    def stream_handler(self, port: str, message_type: type[msgspec.Struct]) -> StreamHandler | None:
        """Return who serves such a stream at this port."""
        return self._stream_handlers.get((port, message_type))

    def post_handler(self, port: str, message_type: type[msgspec.Struct]) -> PostHandler | None:
        """Return who takes such posts at this port."""
        return self._post_handlers.get((port, message_type))

    def welcome(self, peer: Peer) -> None:
        """Let ``admit`` look at a peer that has just said hello."""
        if self.admit is not None:
            self.admit(peer)

    # --- channels ----------------------------------------------------------------------------------------------------

    def channel(self, address: str, *, port: Port = "client", server_key: bytes | None = None) -> Channel:
        """Return a way to ``address``; nothing is connected yet. ``server_key``: the peer's public CURVE key (32
        bytes).
        """
        if self.closed:
            raise errors.Closed("the endpoint was closed")
        assert port in _PORTS, port
        self.check_address(address)
        channel = Channel(self, address, port, server_key)
        self._channels.add(channel)
        return channel

    def forget_channel(self, channel: Channel) -> None:
        """Drop a channel that was closed."""
        self._channels.discard(channel)

    async def listen(self, port: Port, address: str) -> str:
        """Accept connections at ``address`` (port 0: the kernel chooses) and return the real one.

        Raises `InvalidValue` for an address that cannot be meant or may not be used without keys, `AddressInUse`.
        """
        raise NotImplementedError

    async def open_caller(self, channel: Channel) -> Caller:
        """Make a connection and say hello; used by `Channel`."""
        raise NotImplementedError

    def check_address(self, address: str) -> None:
        """Raise `InvalidValue` unless ``address`` can be connected to."""
        raise NotImplementedError

    async def introduce(self, caller: Caller, channel: Channel) -> Caller:
        """Say hello on a fresh connection, look at the answer, and return the caller; ends it when one side refuses."""
        loop = asyncio.get_running_loop()
        try:
            reply = await caller.request(self.identity.hello(), (), loop.time() + limits.HELLO_S_MAX)
            if not isinstance(reply.message, Hello):
                raise errors.FrameError("hello was not answered by hello")
            caller.peer = meet(self.identity, reply.message, channel.address, channel.port, channel.server_key)
        except errors.TimedOut as error:
            unreachable = errors.Unreachable(
                f"{channel.address} does not answer hello", address=channel.address, sent=False
            )
            caller.fail(unreachable)
            raise unreachable from error
        except errors.Error as error:
            caller.fail(error)
            if isinstance(error, errors.Unreachable):
                raise errors.Unreachable(error.message, address=channel.address, sent=False) from error
            raise
        except asyncio.CancelledError:
            caller.fail(errors.Closed("the channel was closed"))
            raise
        return caller

    async def close_channels(self) -> None:
        """Close every channel."""
        for channel in list(self._channels):
            await channel.close()


def _again(error: errors.Error) -> errors.Error:
    """Return a fresh exception like ``error``: several callers raise it, each with its own traceback."""
    return errors.from_code(error.code, error.message, {**error.details})
