"""The contract suite on the backend ``etcd``: a real etcd, and a gate before it for each node, which can be shut."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec

from srengine.ha.backends.etcd_client import EtcdOptions
from srengine.ha.backends.etcd_settings import found_cluster
from srengine.ha.members import Bootstrap
from srengine.transport import Identity
from srengine.transport.memory import Network
from srengine.types import NodeId
from tests.conftest import need_tool
from tests.etcd import Etcd
from tests.ha.agreed import CLUSTER, bootstrap, node_id
from tests.ha.contract.clusters import Cluster, Node
from tests.ha.contract.wire import Book, BookWire


class Gate:
    """A way to an address that can be shut: what is on its way is lost, and nobody is let in."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._shut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()

    async def begin(self) -> str:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._shut:
                return
            there, to_there = await asyncio.open_connection("127.0.0.1", self._port)
            pair = {writer, to_there}
            self._open |= pair
            try:
                await asyncio.gather(_pump(reader, to_there), _pump(there, writer))
            finally:
                self._open -= pair
                to_there.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # the end of the gate; asyncio calls a cancelled handler an error
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    def shut(self) -> None:
        self._shut = True
        for writer in self._open:
            writer.transport.abort()

    def open(self) -> None:
        self._shut = False

    async def end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class EtcdCluster(Cluster):
    """Nodes on the in-memory network, their journal in an etcd of their own."""

    kind = "etcd"

    def __init__(self, path: Path, **more) -> None:
        need_tool("etcd")
        super().__init__(path, **more)
        self.network = Network(seed=1)
        self.book: Book = {}
        self.etcd = Etcd(path / "etcd")
        self.gates: dict[str, Gate] = {}
        self.addresses: dict[str, str] = {}

    async def begin(self, count: int) -> None:
        await asyncio.to_thread(self.etcd.start)
        first = msgspec.msgpack.decode(bootstrap(count).body, type=Bootstrap)
        assert await found_cluster(EtcdOptions(self.etcd.urls), first) == CLUSTER
        await asyncio.gather(*(self.start_node(f"n{number}", number + 1) for number in range(count)))

    async def start_node(self, name: str, number: int) -> Node:
        if name not in self.gates:
            port = int(self.etcd.urls[0].rpartition(":")[2])
            self.gates[name] = Gate(port)
            self.addresses[name] = await self.gates[name].begin()
        endpoint = self.network.endpoint(Identity(node_id=node_id(number), name=name, cluster_id=CLUSTER))
        self.book[NodeId(node_id(number))] = {
            port: await endpoint.listen(port, "tcp://127.0.0.1:0") for port in ("peer", "bulk")
        }
        self.settings = {"servers": self.addresses[name], "cluster_id": CLUSTER, "lease_s": 2}
        node = self.make(name, number, BookWire(endpoint, self.book))
        node.endpoint = endpoint
        await self.run(node)
        return node

    async def end(self) -> None:
        try:
            for name in list(self.nodes):
                await self.stop_node(name)
        finally:
            for gate in self.gates.values():
                await gate.end()
            await asyncio.to_thread(self.etcd.__exit__)

    async def take_quorum(self, leader: Node) -> None:
        """Cut the leader off from etcd."""
        self.gates[leader.name].shut()

    def isolate(self, *names: str) -> None:
        """Cut nodes off from etcd and from all the others."""
        inside = [self.nodes[name].endpoint for name in names]
        outside = [node.endpoint for node in self.nodes.values() if node.name not in names]
        self.network.partition(inside, outside)
        for name in names:
            self.gates[name].shut()

    def heal(self) -> None:
        """Take all cuts back."""
        self.network.heal()
        for gate in self.gates.values():
            gate.open()
