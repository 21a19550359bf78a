"""Whole nodes of the etcd backend in one process: real etcd, real metadata stores, and a wire of function calls."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from srengine import errors
from srengine.ha.backends import HAOptions, Surroundings
from srengine.ha.backends.etcd import EtcdBackend
from srengine.ha.backends.etcd_client import EtcdOptions
from srengine.ha.backends.etcd_settings import found_cluster
from srengine.ha.epochs import EpochsApplier
from srengine.ha.fencing import FencingOptions
from srengine.ha.members import Bootstrap, Cluster, Member, MembersApplier
from srengine.ha.metadata import MetadataMachine
from srengine.ha.protocol import Observed, Role
from srengine.ha.registers import RegistersApplier, put_register, read_register
from srengine.metrics import Metrics
from srengine.storage import MetadataStore
from srengine.types import NodeId
from tests.ha.etcd.parts import FakeClock, until


class Wires:
    """All wires of one test, by node id; a message is msgpack on the way."""

    def __init__(self) -> None:
        self.nodes: dict[str, Wire] = {}

    def add(self, node_id: str) -> Wire:
        self.nodes[node_id] = Wire(self, node_id)
        return self.nodes[node_id]


class Wire:
    def __init__(self, wires: Wires, node_id: str) -> None:
        self.wires = wires
        self.node_id = node_id
        self.handlers: dict[type, Any] = {}
        self.streams: dict[type, Any] = {}
        self.known: dict[str, str] = {}
        self.cut = False

    def _other(self, target: str) -> Wire:
        other = self.wires.nodes.get(target)
        if target not in self.known or other is None or other.cut or self.cut:
            raise errors.Unreachable(f"{target} is not there")
        return other

    async def request(self, target: NodeId, message: msgspec.Struct, *, timeout_s: float):
        handler = self._other(target).handlers[type(message)]
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
        try:
            async with asyncio.timeout(timeout_s):
                return await handler(NodeId(self.node_id), copy, ())
        except TimeoutError:
            raise errors.TimedOut("no answer") from None

    async def stream(self, target: NodeId, message: msgspec.Struct, *, timeout_s: float):
        async for item in self._other(target).streams[type(message)](NodeId(self.node_id), message):
            yield memoryview(item)

    def serve(self, message_type: type, handler: Any) -> None:
        self.handlers[message_type] = handler

    def serve_stream(self, message_type: type, handler: Any) -> None:
        self.streams[message_type] = handler

    def know(self, node_id: NodeId, name: str, address: str, public_key: str) -> None:
        self.known[node_id] = address

    def forget(self, node_id: NodeId) -> None:
        self.known.pop(node_id, None)


class Node:
    """One node. Like node/ will: fences when it is elected, resigns when it may not lead."""

    def __init__(self, cluster: Nodes, number: int) -> None:
        self.cluster = cluster
        self.name = f"n{number}"
        self.node_id = NodeId(f"{number:032x}")
        self.address = f"tcp://127.0.0.1:{7000 + 10 * number}"
        self.data = cluster.directory / self.name
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.alarms: list[tuple[str, str]] = []
        self.seen: list[Observed] = []
        self.faults: list[BaseException] = []
        self.fences = True
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []

    async def start(self, **settings: Any) -> Node:
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.store = self._stack.enter_context(MetadataStore(self.data / "meta"))
        machine = MetadataMachine(self.store, [MembersApplier(), EpochsApplier(), RegistersApplier()])
        self.wire = self.cluster.wires.add(self.node_id)
        options = {"servers": self.cluster.servers, "cluster_id": self.cluster.cluster_id, "lease_s": 2, **settings}
        self.backend = EtcdBackend(
            Surroundings(
                name=self.name,
                node_id=self.node_id,
                address=self.address,
                data_dir=self.data,
                machine=machine,
                wire=self.wire,
                clock=self.clock,
                spawn=self._spawn,
                alarm=lambda event, text: self.alarms.append((event, text)),
                metrics=self.metrics,
                options=HAOptions(fencing=FencingOptions(tries=3, delay_s=0.2), settings=options),
            )
        )
        await self.backend.start()
        self._spawn(self._follow(), "test: follow")
        return self

    def _spawn(self, work: Any, _: str) -> asyncio.Task[Any]:
        async def watched() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self.faults.append(error)
                raise

        task = asyncio.create_task(watched())
        self._tasks.append(task)
        return task

    async def _follow(self) -> None:
        with contextlib.suppress(errors.Closed):
            async for observed in self.backend.observe():
                self.seen.append(observed)
                if observed.role is Role.LEADER and self.fences and not await self.backend.fencing():
                    await self.backend.resign("fencing failed")

    async def stop(self) -> None:
        await self.backend.stop()
        await self._end()

    async def crash(self) -> None:
        """Stop without a word to anybody: the lease stays until it ends."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.backend._leading.end_leadership("crash")
        self.backend._client.close()
        self.wire.cut = True
        await self._end()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    @property
    def leads(self) -> bool:
        return self.backend.epoch > 0

    async def put(self, name: str, value: bytes, *, timeout_s: float = 20.0, **more: Any) -> int:
        return await self.backend.propose(put_register(name, value, **more), timeout_s=timeout_s)

    async def get(self, name: str) -> bytes | None:
        await self.backend.read_barrier()
        found = read_register(self.store, name)
        return None if found is None else found.value


class Nodes:
    """A cluster; ``numbers`` are its first members."""

    def __init__(self, directory: Path, servers: Sequence[str], numbers: Sequence[int] = (1, 2, 3)) -> None:
        directory.chmod(0o700)
        self.directory = directory
        self.servers = tuple(servers)
        self.cluster_id = secrets.token_hex(16)
        self.wires = Wires()
        self.numbers = numbers
        self.nodes: dict[int, Node] = {}

    async def found(self) -> None:
        members = tuple(
            Member(f"n{number}", f"tcp://127.0.0.1:{7000 + 10 * number}", place, node_id=f"{number:032x}")
            for place, number in enumerate(self.numbers)
        )
        bootstrap = Bootstrap(Cluster(self.cluster_id, f"c{self.cluster_id[:8]}"), members)
        assert await found_cluster(EtcdOptions(self.servers), bootstrap) == self.cluster_id

    async def start(self, number: int, **settings: Any) -> Node:
        node = self.nodes[number] = Node(self, number)
        return await node.start(**settings)

    async def leader(self, timeout_s: float = 30.0) -> Node:
        """Return the one that leads, once everybody says so."""

        def found() -> Node | None:
            leading = [node for node in self.nodes.values() if node.leads]
            names = {node.backend.observed.leader for node in self.nodes.values()}
            return leading[0] if len(leading) == 1 and names == {leading[0].name} else None

        return await until(found, "one leader", timeout_s)

    def others(self, leader: Node) -> list[Node]:
        return [node for node in self.nodes.values() if node is not leader]


@contextlib.asynccontextmanager
async def cluster(
    directory: Path, servers: Sequence[str], numbers: Sequence[int] = (1, 2, 3), **settings: Any
) -> AsyncIterator[Nodes]:
    nodes = Nodes(directory, servers, numbers)
    try:
        await nodes.found()
        for number in numbers:
            await nodes.start(number, **settings)
        yield nodes
    finally:
        for node in nodes.nodes.values():
            await node.stop()
    for node in nodes.nodes.values():
        assert not node.faults, (node.name, node.faults)
