"""The transport of one process over ZeroMQ: ports that listen, channels that connect.

::

    Channel --- Caller --- DEALER ~~~ tcp, CURVE ~~~ ROUTER --- Callee --- handlers
                             |                          |
                          monitor                    monitor, ZAP handler

* A connection is one DEALER socket: it is made with a hello, and ends for good at the first doubt. The channel makes a
  new one, with back-off.
* A ROUTER's connections are told apart by the routing id that ZeroMQ mints for each; who the peer is, its hello and its
  CURVE key say. The monitor tells when a connection ends, so nothing waits for a peer that is gone.
* ZeroMQ cannot refuse, count or close single connections of a ROUTER. We can: events and frames carry the connection's
  descriptor, and shutting it down looks to ZeroMQ like a lost connection. So there is a cap on connections, a deadline
  for hello, and an end for peers that break the protocol.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from srengine import errors, limits
from srengine.metrics import Metrics
from srengine.transport import addresses, sockets
from srengine.transport.base import BaseEndpoint, Channel
from srengine.transport.callee import Callee
from srengine.transport.caller import Caller
from srengine.transport.peers import Authenticator, Buffer, Identity, Peer, Port
from srengine.transport.zap import ZapHandler

_logger = logging.getLogger(__name__)

_TICK_S: Final = 0.25
_CALLER_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)
_CALLEE_EVENTS: Final = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class _DealerWire:
    """The wire of a `Caller`: one DEALER with one connection."""

    def __init__(self, endpoint: Endpoint, channel: Channel) -> None:
        self.part_bytes_max = sockets.FRAME_BYTES_MAX[channel.port]
        self.address = channel.address
        self.caller: Caller | None = None
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when the handshake is; failed when it does."""
        socket = sockets.dealer(
            endpoint.context, channel.port, channel.address, keys=endpoint.identity.keys, server_key=channel.server_key
        )
        self._monitor = sockets.Monitor(socket, _CALLER_EVENTS, self._event)
        self._pump = sockets.Pump(socket, self._message)
        try:
            socket.connect(channel.address)
        except zmq.ZMQError as error:
            self.close(0)
            raise errors.Unreachable(
                f"cannot connect to {channel.address}: {error}", address=channel.address
            ) from error

    def send(self, parts: Sequence[Buffer]) -> bool:
        return self._pump.closed or self._pump.send(parts)

    def cut(self) -> None:
        # What was sent just before (a last Cancel) may still leave; the peer notices the end by itself.
        self.close(limits.LINGER_MS)

    def close(self, linger_ms: int) -> None:
        """Close the sockets. Idempotent."""
        self._monitor.close()
        self._pump.close(linger_ms)

    def _message(self, frames: list[sockets.Frame]) -> None:
        if self.caller is not None:
            self.caller.receive(frames)

    def _event(self, event: int, _value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if not self.ready.done():
                self.ready.set_result(None)
            return
        error: errors.Error
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            error = errors.NotAuthenticated(f"{self.address} does not admit this key", address=self.address)
        elif self.caller is not None:
            error = errors.Unreachable(f"the connection to {self.address} was lost", address=self.address)
        elif event in {zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL}:
            error = errors.Unreachable(
                f"{self.address} and this side do not agree on security (keys on one side only, or a wrong server key)",
                address=self.address,
                sent=False,
            )
        else:
            error = errors.Unreachable(f"nobody answers at {self.address}", address=self.address, sent=False)
        if not self.ready.done():
            self.ready.set_exception(error)
        if self.caller is not None:
            self.caller.fail(error)


@dataclass(slots=True)
class _Accepted:
    """One accepted TCP connection, hello said or not."""

    inode: int | None
    since: float
    callee: Callee | None = None
    """Who speaks on it, once it has said hello."""


class _RouterWire:
    """The wire of a `Callee`: one connection of a ROUTER."""

    def __init__(self, listener: _Listener, routing_id: bytes, descriptor: int) -> None:
        self.part_bytes_max = listener.part_bytes_max
        self.routing_id = routing_id
        self.descriptor = descriptor
        self.inode = sockets.inode_of(descriptor)
        self.callee: Callee | None = None
        self.has_met = False
        """Whether its hello was said, and the listener knows."""
        self.bytes_delivered = 0
        """Bytes of frames that have come to us."""
        self._listener = listener

    def send(self, parts: Sequence[Buffer]) -> bool:
        try:
            return self._listener.pump.closed or self._listener.pump.send([self.routing_id, *parts])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if self.callee is not None:
                self.callee.fail(errors.Unreachable("the peer is gone"))
            return True

    def cut(self) -> None:
        sockets.cut_connection(self.descriptor, self.inode)


class _Listener:
    """One port: a ROUTER and its connections."""

    def __init__(self, endpoint: Endpoint, port: Port, address: str) -> None:
        self.port: Port = port
        self.part_bytes_max = sockets.FRAME_BYTES_MAX[port]
        self._endpoint = endpoint
        self._metrics = endpoint.metrics
        self._loop = asyncio.get_running_loop()
        self.callees: dict[bytes, Callee] = {}
        self.accepted: dict[int, _Accepted] = {}
        socket = sockets.bind(endpoint.context, port, address, keys=endpoint.identity.keys, insecure=endpoint.insecure)
        last = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes), last
        self.address = last.rstrip(b"\0").decode()
        self._monitor = sockets.Monitor(socket, _CALLEE_EVENTS, self._event)
        self.pump = sockets.Pump(socket, self._message)

    def _message(self, frames: list[sockets.Frame]) -> None:
        routing_id = frames[0].bytes
        callee = self.callees.get(routing_id)
        if callee is None:
            callee = self._meet(routing_id, frames[-1])
            if callee is None:
                return
        wire = callee.wire
        assert isinstance(wire, _RouterWire), wire
        wire.bytes_delivered += sum(map(len, frames))
        callee.receive(frames[1:])
        if wire.has_met or (callee.peer is None and callee.closed is None):
            return
        # NB: looked up again: receiving may have ended it.
        accepted = self.accepted.get(wire.descriptor)
        if accepted is not None:
            accepted.callee = callee
            wire.has_met = True

    def _meet(self, routing_id: bytes, frame: sockets.Frame) -> Callee | None:
        """Return a new connection's callee; it still has to say hello."""
        # The end of an older connection with the same descriptor is reported before anything of a new one.
        self._monitor.drain()
        descriptor = _property(frame, zmq.SRCFD)
        user = _property(frame, "User-Id")
        address = _property(frame, "Peer-Address")
        if not isinstance(descriptor, int) or self.pump.closed:
            return None
        wire = _RouterWire(self, routing_id, descriptor)
        public_key = bytes.fromhex(user) if isinstance(user, str) and user not in {"", "-"} else None
        callee = Callee(
            wire,
            self._metrics,
            self._endpoint.budget,
            self.port,
            self._endpoint,
            str(address or ""),
            public_key,
            self._ended,
        )
        wire.callee = callee
        self.callees[routing_id] = callee
        accepted = self.accepted.get(descriptor)
        if accepted is None or accepted.inode != wire.inode:
            accepted = self.accepted[descriptor] = _Accepted(wire.inode, self._loop.time())
        return callee

    def _ended(self, callee: Callee) -> None:
        # It stays in `callees`, deaf, until ZeroMQ reports the end: frames that were read before the cut still come.
        self._endpoint.keep_tasks(callee)

    def _forget(self, descriptor: int) -> None:
        """Drop what belongs to a connection that is over."""
        self.accepted.pop(descriptor, None)
        for routing_id, callee in list(self.callees.items()):
            if _descriptor_of(callee) == descriptor:
                callee.fail(errors.Unreachable("the peer went away"))
                del self.callees[routing_id]

    def _event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            inode = sockets.inode_of(value)
            known = self.accepted.get(value)
            if known is None or inode is None or known.inode != inode:  # else its first frame was quicker
                self.accepted[value] = _Accepted(inode, self._loop.time())
            if len(self.accepted) > self._endpoint.connections_max:
                self._metrics.add("srengine_transport_connections_shed_total", port=self.port)
                sockets.cut_connection(value, inode)
        elif event == zmq.EVENT_DISCONNECTED:
            self._forget(value)
        elif event == zmq.EVENT_ACCEPT_FAILED:
            self._metrics.add("srengine_transport_accepts_failed_total", port=self.port)
        else:
            self._metrics.add("srengine_transport_handshakes_failed_total", port=self.port)

    def tick(self, now: float) -> None:
        """Close connections that never said hello, and those that owe bytes and stand still."""
        for descriptor, accepted in list(self.accepted.items()):
            if accepted.inode is None or sockets.inode_of(descriptor) != accepted.inode:
                self._forget(descriptor)
            elif accepted.callee is None and now - accepted.since > limits.HELLO_S_MAX:
                self._metrics.add("srengine_transport_hellos_missed_total", port=self.port)
                sockets.cut_connection(descriptor, accepted.inode)
            else:
                self._check_unread(descriptor, accepted)
        for callee in list(self.callees.values()):
            callee.check_progress(now)

    def _check_unread(self, descriptor: int, accepted: _Accepted) -> None:
        """Close a connection whose bytes never become a frame."""
        delivered = 0
        if accepted.callee is not None:
            assert isinstance(accepted.callee.wire, _RouterWire), accepted.callee.wire
            delivered = accepted.callee.wire.bytes_delivered
        received = sockets.received_bytes(descriptor)
        if received is not None and received - delivered > limits.UNREAD_BYTES_MAX:
            self._metrics.add("srengine_transport_frames_refused_total", port=self.port)
            sockets.cut_connection(descriptor, accepted.inode)

    def close(self) -> None:
        """End every connection and stop listening."""
        for callee in list(self.callees.values()):
            callee.flush()
            callee.fail(errors.Closed("the endpoint was closed"))
        self._monitor.close()
        self.pump.close(limits.LINGER_MS)


class Endpoint(BaseEndpoint):
    """The transport of one process over ZeroMQ. Made and used on one event loop; `close` it there."""

    def __init__(
        self,
        identity: Identity,
        *,
        authenticator: Authenticator | None = None,
        admit: Callable[[Peer], None] | None = None,
        insecure: bool = False,
        metrics: Metrics | None = None,
        connections_max: int = limits.CONNECTIONS_MAX,
    ) -> None:
        """``connections_max``: accepted connections of each port."""
        super().__init__(identity, authenticator=authenticator, admit=admit, insecure=insecure, metrics=metrics)
        self.connections_max = connections_max
        self.context = sockets.new_context()
        self._process = os.getpid()
        self._listeners: list[_Listener] = []
        self._zap: ZapHandler | None = None
        self._orphans: set[asyncio.Task[object]] = set()
        """Handlers whose connection has ended; they finish what they began."""
        self._ticker: asyncio.TimerHandle | None = None
        self._tick()

    async def listen(self, port: Port, address: str) -> str:
        """See `BaseEndpoint.listen`."""
        if self.closed:
            raise errors.Closed("the endpoint was closed")
        addresses.check(address)
        if self._zap is None:
            self._zap = ZapHandler(
                self.context, lambda: self.authenticator, lambda: self.identity.keys is not None, self.metrics
            )
        listener = _Listener(self, port, address)
        self._listeners.append(listener)
        return listener.address

    def check_address(self, address: str) -> None:
        """See `BaseEndpoint.check_address`."""
        addresses.check(address)

    def connections(self, port: Port) -> list[Peer]:
        """Return the peers that are connected to a port and have said hello."""
        return [
            callee.peer
            for listener in self._listeners
            if listener.port == port
            for callee in listener.callees.values()
            if callee.peer is not None and callee.closed is None
        ]

    def drop(self, public_key: bytes) -> int:
        """End the connections of a key that was revoked; return how many there were. The allow-list keeps it out."""
        found = [
            callee
            for listener in self._listeners
            for callee in listener.callees.values()
            if callee.peer is not None and callee.closed is None and callee.peer.public_key == public_key
        ]
        for callee in found:
            callee.fail(errors.NotAuthenticated("the key was revoked"))
        return len(found)

    async def open_caller(self, channel: Channel) -> Caller:
        """See `BaseEndpoint.open_caller`."""
        wire = _DealerWire(self, channel)
        try:
            async with asyncio.timeout((limits.CONNECT_MS_MAX + limits.HANDSHAKE_MS) / 1000):
                await wire.ready
        except TimeoutError as error:
            wire.close(0)
            raise errors.Unreachable(
                f"nobody answers at {channel.address}", address=channel.address, sent=False
            ) from error
        except (errors.Error, asyncio.CancelledError):
            wire.close(0)
            raise
        caller = Caller(wire, self.metrics, self.budget, channel.port)
        wire.caller = caller
        return await self.introduce(caller, channel)

    def keep_tasks(self, callee: Callee) -> None:
        """Remember the handlers of a connection that has ended, until they are done."""
        for task in callee.tasks():
            self._orphans.add(task)
            task.add_done_callback(self._orphans.discard)

    async def close(self) -> None:
        """End every connection, stop handlers, free the sockets. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        await self.close_channels()
        running: set[asyncio.Task[object]] = set()
        for listener in self._listeners:
            for callee in listener.callees.values():
                running.update(callee.tasks())
            listener.close()
        running |= self._orphans
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        if self._zap is not None:
            self._zap.close()
        # Waits at most LINGER for what was sent.
        await asyncio.get_running_loop().run_in_executor(None, self.context.term)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for listener in self._listeners:
            listener.tick(now)
        for channel in list(self._channels):
            channel.tick(now)
        self._ticker = loop.call_later(_TICK_S, self._tick)


def _descriptor_of(callee: Callee) -> int:
    wire = callee.wire
    assert isinstance(wire, _RouterWire), wire
    return wire.descriptor


def _property(frame: sockets.Frame, name: int | str) -> int | str | None:
    """Return what ZeroMQ knows about a received part's connection; None when it does not."""
    try:
        return frame.get(name)
    except zmq.ZMQError:
        return None
