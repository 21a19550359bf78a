"""The transport without a network: the same channels, hello, credit and errors, and faults on demand.

::

    network = Network()
    node = network.endpoint(Identity(...))
    address = await node.listen("peer", "tcp://127.0.0.1:0")
    client = network.endpoint(Identity())
    channel = client.channel(address, port="peer")
    network.cut(client, node)  # nothing passes from client to node; the way back stays open
    network.heal()

Only the wire differs from `srengine.transport.endpoint`: frames are packed and checked as on a network, then handed
over in a later turn of the loop. A link has a delay, a rate of lost frames, and may be cut, for each direction by
itself. A lost frame stays lost, as if it had been eaten behind TCP: callers run into their time-outs. All randomness is
the network's.

Not simulated: CURVE and ZAP (a `server_key` is compared with the listener's public key), ports in use by other
processes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srengine import errors, limits
from srengine.metrics import Metrics
from srengine.transport import addresses
from srengine.transport.base import BaseEndpoint, Channel
from srengine.transport.callee import Callee
from srengine.transport.caller import Caller
from srengine.transport.connection import Connection
from srengine.transport.peers import Authenticator, Buffer, Identity, Peer, Port
from srengine.transport.sockets import FRAME_BYTES_MAX


@dataclass(slots=True)
class Link:
    """One direction between two endpoints. ``loss``: probability that a frame disappears."""

    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False


class Network:
    """Everything that endpoints can reach. Belongs to one event loop."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.listeners: dict[str, tuple[MemoryEndpoint, Port]] = {}
        self.frames = 0
        """Frames handed to a wire so far."""
        self._links: dict[tuple[MemoryEndpoint, MemoryEndpoint], Link] = {}
        self._wires: set[_MemoryWire] = set()
        self._next_port = 40_000

    def endpoint(
        self,
        identity: Identity,
        *,
        authenticator: Authenticator | None = None,
        admit: Callable[[Peer], None] | None = None,
        insecure: bool = False,
        metrics: Metrics | None = None,
    ) -> MemoryEndpoint:
        """Return an endpoint on this network; arguments as of `srengine.transport.Endpoint`."""
        return MemoryEndpoint(
            self, identity, authenticator=authenticator, admit=admit, insecure=insecure, metrics=metrics
        )

    def link(self, source: MemoryEndpoint, target: MemoryEndpoint) -> Link:
        """Return the direction from ``source`` to ``target``; change its fields to have faults."""
        return self._links.setdefault((source, target), Link())

    def cut(self, source: MemoryEndpoint, target: MemoryEndpoint, *, both: bool = False) -> None:
        """Let nothing pass from ``source`` to ``target`` (with ``both`` also back). Connections stay, silently."""
        self.link(source, target).cut = True
        if both:
            self.link(target, source).cut = True

    def partition(self, *groups: Sequence[MemoryEndpoint]) -> None:
        """Cut everything between endpoints of different groups, in both directions."""
        for group in groups:
            for other in groups:
                if other is not group:
                    for source in group:
                        for target in other:
                            self.cut(source, target)

    def heal(self) -> None:
        """End all cuts, losses and delays."""
        for link in self._links.values():
            link.cut = False
            link.loss = 0.0
            link.delay_s = 0.0

    def disconnect(self, one: MemoryEndpoint, other: MemoryEndpoint) -> None:
        """End every connection between two endpoints, as a reset would."""
        for wire in list(self._wires):
            if {wire.source, wire.target} == {one, other}:
                wire.cut()

    def free_port(self) -> int:
        """Return a port that was never used here."""
        self._next_port += 1
        return self._next_port

    def add_wire(self, wire: _MemoryWire) -> None:
        """Remember a wire until it is cut."""
        self._wires.add(wire)

    def drop_wire(self, wire: _MemoryWire) -> None:
        """Forget a wire that was cut."""
        self._wires.discard(wire)


class _MemoryWire:
    """One direction of one connection; `other` is the way back."""

    def __init__(self, network: Network, source: MemoryEndpoint, target: MemoryEndpoint, port: Port) -> None:
        self.part_bytes_max = FRAME_BYTES_MAX[port]
        self.network = network
        self.source = source
        self.target = target
        self.other: _MemoryWire | None = None
        self.connection: Connection | None = None
        """Whose frames leave here."""
        self.closed = False
        self._arrives_at = 0.0
        network.add_wire(self)

    def send(self, parts: Sequence[Buffer]) -> bool:
        if self.closed:
            return True
        self.network.frames += 1
        link = self.network.link(self.source, self.target)
        if link.cut or (link.loss and self.network.random.random() < link.loss):
            return True
        if any(len(part) > self.part_bytes_max for part in parts):
            self._end()
            return True
        loop = asyncio.get_running_loop()
        # As on TCP a later frame does not overtake an earlier one.
        self._arrives_at = max(self._arrives_at, loop.time() + link.delay_s)
        frame = [bytes(part) for part in parts]
        if self._arrives_at <= loop.time():
            loop.call_soon(self._deliver, frame)
        else:
            loop.call_at(self._arrives_at, self._deliver, frame)
        return True

    def _deliver(self, frame: list[bytes]) -> None:
        back = self.other
        if not self.closed and back is not None and back.connection is not None:
            back.connection.receive(frame)

    def cut(self) -> None:
        if self.closed:
            return
        asyncio.get_running_loop().call_soon(self._end)
        self._close()

    def _close(self) -> None:
        self.closed = True
        self.network.drop_wire(self)

    def _end(self) -> None:
        """Both sides notice that the connection is over, unless the way is cut: then nobody hears of it."""
        for wire in (self, self.other):
            if wire is None:
                continue
            wire._close()
            if wire.connection is not None:
                wire.connection.fail(errors.Unreachable("the connection was lost"))


class MemoryEndpoint(BaseEndpoint):
    """An endpoint on a `Network`."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        *,
        authenticator: Authenticator | None = None,
        admit: Callable[[Peer], None] | None = None,
        insecure: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(identity, authenticator=authenticator, admit=admit, insecure=insecure, metrics=metrics)
        self.network = network
        self._callees: set[Callee] = set()
        self._tasks: set[asyncio.Task[object]] = set()

    def check_address(self, address: str) -> None:
        """See `BaseEndpoint.check_address`."""
        addresses.check(address)

    async def listen(self, port: Port, address: str) -> str:
        """See `BaseEndpoint.listen`; a free port is one that was never used on this network."""
        if self.closed:
            raise errors.Closed("the endpoint was closed")
        addresses.check(address)
        if self.identity.keys is None and not self.insecure and not addresses.stays_on_this_machine(address):
            raise errors.InvalidValue(f"{address} can be reached from other machines: it needs keys", address=address)
        host, _, number = address.rpartition(":")
        if address.startswith("tcp://") and number in {"0", "*"}:
            address = f"{host}:{self.network.free_port()}"
        if address in self.network.listeners:
            raise errors.AddressInUse(f"another process listens at {address}", address=address)
        self.network.listeners[address] = (self, port)
        return address

    async def open_caller(self, channel: Channel) -> Caller:
        """See `BaseEndpoint.open_caller`."""
        found = self.network.listeners.get(channel.address)
        if found is None:
            raise errors.Unreachable(f"nobody answers at {channel.address}", address=channel.address, sent=False)
        target, port = found
        if self.network.link(self, target).cut or self.network.link(target, self).cut:
            await asyncio.sleep(limits.CONNECT_MS_MAX / 1000)
            raise errors.Unreachable(f"nobody answers at {channel.address}", address=channel.address, sent=False)
        target_key = target.identity.keys.public if target.identity.keys is not None else None
        if channel.server_key != target_key:
            raise errors.Unreachable(
                f"{channel.address} and this side do not agree on security", address=channel.address, sent=False
            )
        my_key = self.identity.keys.public if self.identity.keys is not None and target_key is not None else None
        if (target.authenticator is not None and not target.authenticator.admit(port, "127.0.0.1", my_key)) or (
            target.authenticator is None and target_key is not None
        ):
            raise errors.NotAuthenticated(f"{channel.address} does not admit this key", address=channel.address)
        forth = _MemoryWire(self.network, self, target, port)
        back = _MemoryWire(self.network, target, self, port)
        forth.other, back.other = back, forth
        caller = Caller(forth, self.metrics, self.budget, channel.port)
        back.connection = target.accept(back, port, my_key)
        forth.connection = caller
        return await self.introduce(caller, channel)

    def accept(self, wire: _MemoryWire, port: Port, public_key: bytes | None) -> Callee:
        """Return the answering side of a new connection."""
        callee = Callee(wire, self.metrics, self.budget, port, self, "127.0.0.1", public_key, self._forget)
        self._callees.add(callee)
        return callee

    def _forget(self, callee: Callee) -> None:
        self._callees.discard(callee)
        for task in callee.tasks():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def connections(self, port: Port) -> list[Peer]:
        """Return the peers that are connected to a port and have said hello."""
        return [callee.peer for callee in self._callees if callee.port == port and callee.peer is not None]

    async def close(self) -> None:
        """Vanish from the network. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for address in [address for address, (endpoint, _) in self.network.listeners.items() if endpoint is self]:
            del self.network.listeners[address]
        await self.close_channels()
        running = {task for callee in self._callees for task in callee.tasks()} | self._tasks
        for callee in list(self._callees):
            callee.flush()
            callee.fail(errors.Closed("the endpoint was closed"))
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        await asyncio.sleep(0)
