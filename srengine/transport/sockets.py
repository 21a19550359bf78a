"""ZeroMQ sockets on an event loop: made with every bound set, read without threads or futures.

One thread owns each socket: the loop's. ZeroMQ's own I/O threads do the rest, one for the client and peer ports,
another one for bulk, so that a snapshot does not delay a heartbeat.

`bind` is the only function of the package that makes bound sockets. Every one of them has a ZAP domain and enforces it:
without a domain ZeroMQ would skip authentication, without enforcing it would let everybody in while no handler runs.
(docs/decisions/0011-connections.md.)
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket as system_socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from srengine import errors, limits
from srengine.soon import Soon
from srengine.transport import addresses
from srengine.transport.peers import Buffer, KeyPair

ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
DOMAIN_PREFIX: Final = "srengine."
FRAME_BYTES_MAX: Final = {
    "client": limits.CLIENT_FRAME_BYTES_MAX,
    "peer": limits.PEER_FRAME_BYTES_MAX,
    "bulk": limits.BULK_FRAME_BYTES_MAX,
}
_COPY_BYTES_MAX: Final = 64 * limits.KIB
"""Smaller parts are copied into the queue: cheaper than to keep them until they have left."""
_PARTS_TAKEN: Final = limits.PARTS_MAX + 2
"""A routing id, the allowed parts, and one that proves there are too many."""
_TURN_FRAMES: Final = 64
"""Parts read in one turn of the loop before others have theirs."""
_TCP_INFO: Final = 11
_TCP_INFO_BYTES: Final = 136
"""struct tcp_info of Linux up to tcpi_bytes_received, its last 8 bytes."""
_AFFINITY: Final = {"client": 1, "peer": 1, "bulk": 2}

# Plain numbers, and the calls below pyzmq's own: its flags are enumerations, which compute in Python, and it builds an
# exception to say that there is nothing to read. Both are paid with every frame.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_raw_send: Final[Any] = zmq.backend.Socket.send
_raw_recv: Final[Any] = zmq.backend.Socket.recv
_raw_get: Final[Any] = zmq.backend.Socket.get

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]
Frame = zmq.Frame


def _keep_freed_memory() -> None:
    """Let the allocator keep what frames use.

    glibc gives the top of its heap back to the kernel when more than twice the largest block that it has ever mapped is
    free. A window of 1 MiB frames comes and goes all the time, and fresh pages cost more than the copy into them
    (measured: half of the throughput). Freeing one untouched block of a window's size, which costs nothing, moves that
    threshold.
    """
    block = bytes(limits.CREDIT_FRAMES * limits.MIB)
    del block


def new_context() -> Context:
    """Return a context with an I/O thread for messages and one for bulk."""
    _keep_freed_memory()
    context: Context = zmq.Context(io_threads=2)
    context.set(zmq.MAX_SOCKETS, 8192)
    return context


def new_key_pair() -> KeyPair:
    """Return a fresh CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(z85.decode(public), z85.decode(secret))


def public_key_of(secret: bytes) -> bytes:
    """Return the public key that belongs to a secret one (32 raw bytes each)."""
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def _common(socket: Socket, port: str, address: str) -> None:
    socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.setsockopt(zmq.LINGER, limits.LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX[port])
    socket.setsockopt(zmq.SNDHWM, limits.HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.RCVHWM, limits.HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, limits.HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, limits.HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, limits.HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_MAXRT, 2 * limits.RECONNECT_MS_MAX)
    socket.setsockopt(zmq.AFFINITY, _AFFINITY[port])


def bind(context: Context, port: str, address: str, *, keys: KeyPair | None, insecure: bool = False) -> Socket:
    """Return a socket that accepts connections: a ROUTER for a port, or the ZAP handler's socket for port "zap".

    Raises `InvalidValue` for a routable address without keys (unless ``insecure``) or an address that cannot be bound,
    `AddressInUse`.
    """
    socket = context.socket(zmq.REP if port == "zap" else zmq.ROUTER)
    try:
        if port == "zap":
            socket.setsockopt(zmq.LINGER, 0)
        else:
            if keys is None and not insecure and not addresses.stays_on_this_machine(address):
                raise errors.InvalidValue(
                    f"{address} can be reached from other machines: it needs keys (or --insecure)",
                    address=address,
                )
            _common(socket, port, address)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
            socket.setsockopt(zmq.ZAP_DOMAIN, (DOMAIN_PREFIX + port).encode())
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            if keys is not None:
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(0)
        if error.errno in {zmq.EADDRINUSE, errno.EADDRINUSE}:
            raise errors.AddressInUse(f"another process listens at {address}", address=address) from error
        raise errors.InvalidValue(f"cannot listen at {address}: {error}", address=address) from error
    except errors.Error:
        socket.close(0)
        raise
    return socket


def dealer(context: Context, port: str, address: str, *, keys: KeyPair | None, server_key: bytes | None) -> Socket:
    """Return an unconnected DEALER; with ``server_key`` it talks CURVE, as ``keys`` or as a stranger.

    It never reconnects by itself: a new connection is a new socket with a new hello, made by the channel.
    """
    socket = context.socket(zmq.DEALER)
    _common(socket, port, address)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, limits.CONNECT_MS_MAX)
    if server_key is not None:
        pair = keys if keys is not None else new_key_pair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    return socket


class Pump:
    """Read one socket on the event loop and hand on its messages.

    ZeroMQ's descriptor says "something changed", once; so the socket is read until it has nothing, and looked at again
    after each send, which may have swallowed the signal.
    """

    def __init__(self, socket: Socket, on_message: Callable[[list[Frame]], None]) -> None:
        self.socket = socket
        self.closed = False
        self._on_message = on_message
        self._parts: list[Frame] = []
        self._handed_on = False
        self._due = False
        self._loop = asyncio.get_running_loop()
        self._soon = Soon.of(self._loop)
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self.drain)
        self._schedule()

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Send a message; False when there is no room. Raises `zmq.ZMQError` (EHOSTUNREACH) when the peer is gone."""
        socket = self.socket
        left = len(parts)
        try:
            # NB: only the first part can meet a full queue or a lost peer; ZeroMQ takes the others with it.
            for part in parts:
                left -= 1
                _raw_send(socket, part, _MORE if left else _NOBLOCK, len(part) < _COPY_BYTES_MAX)
        except zmq.Again:
            return False
        finally:
            if not self._due and _raw_get(socket, _EVENTS) & _POLLIN:
                self._schedule()
        return True

    def drain(self) -> None:
        """Read what is there, at most a turn's worth; what is put off meanwhile (`Soon`) is called then."""
        self._due = False
        with self._soon:
            self._read()

    def _read(self) -> None:
        socket = self.socket
        more = True  # whoever calls was told that there is something: to ask first would cost as much as to look
        for _ in range(_TURN_FRAMES):
            if self.closed or not (more or _raw_get(socket, _EVENTS) & _POLLIN):
                return
            try:
                frame = _raw_recv(socket, _NOBLOCK, copy=False)
            except zmq.Again:
                return
            more = frame.more
            if not self._handed_on:  # else the rest is read and dropped
                parts = self._parts
                parts.append(frame)
                if not more or len(parts) == _PARTS_TAKEN:
                    self._handed_on = True
                    self._on_message(parts)
            if not more:
                self._parts = []
                self._handed_on = False
        self._schedule()

    def _schedule(self) -> None:
        if not self._due and not self.closed:
            self._due = True
            self._loop.call_soon(self.drain)

    def close(self, linger_ms: int) -> None:
        """Close the socket; what was sent has ``linger_ms`` to leave. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._descriptor)
        self._parts = []
        self.socket.close(linger_ms)


class Monitor:
    """Report the events of a socket: ``on_event(event, value)``; value is a descriptor or a reason."""

    def __init__(self, socket: Socket, events: int, on_event: Callable[[int, int], None]) -> None:
        self._watched = socket
        self._on_event = on_event
        self._pump = Pump(socket.get_monitor_socket(events), self._message)

    def drain(self) -> None:
        """Report what has happened by now, without waiting for the loop's next turn."""
        self._pump.drain()

    def close(self) -> None:
        """Stop watching; before the watched socket is closed."""
        if not self._pump.closed:
            # NB: in this order. An event that finds its reader gone would block ZeroMQ's thread, which holds the lock
            # that disabling needs: both would wait for ever.
            self._watched.disable_monitor()
            self._pump.close(0)

    def _message(self, parts: list[Frame]) -> None:
        event: dict[str, Any] = dict(parse_monitor_message([part.bytes for part in parts]))
        self._on_event(int(event["event"]), int(event["value"]))


def inode_of(descriptor: int) -> int | None:
    """Return the number of the open socket behind a descriptor; None when there is none.

    Numbers are not used again while the socket lives: with it a descriptor that was closed and reused is told apart.
    """
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def cut_connection(descriptor: int, inode: int | None) -> None:
    """Shut a TCP connection down under ZeroMQ, which has no call for it and reacts as to any lost connection."""
    if inode is None or inode_of(descriptor) != inode:
        return
    try:
        with system_socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.shutdown(system_socket.SHUT_RDWR)
    except OSError:
        pass  # it ended by itself meanwhile


def received_bytes(descriptor: int) -> int | None:
    """Return how many bytes the kernel has taken in for a TCP connection; None where it does not say (ipc, macOS)."""
    try:
        with system_socket.socket(fileno=os.dup(descriptor)) as connection:
            info = connection.getsockopt(system_socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if sys.platform != "linux" or len(info) < _TCP_INFO_BYTES:
        return None
    return int.from_bytes(info[-8:], sys.byteorder)
