"""Clusters for the contract suite: nodes of one backend in one event loop, started, stopped, cut and healed.

Every kind makes the same thing of it: `Cluster` with `Node`s that have a backend, an agreed state of their own and a
role service. A kind that cannot do something (cut a network that it has not got) is left out of those tests by their
mark.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from srengine import errors
from srengine.clock import SystemClock
from srengine.ha import backends
from srengine.ha import members as m
from srengine.ha.backends import HAOptions, Surroundings
from srengine.ha.epochs import EpochsApplier
from srengine.ha.fencing import FencingOptions
from srengine.ha.members import MembersApplier
from srengine.ha.metadata import MetadataMachine
from srengine.ha.protocol import HAProtocol, Role
from srengine.ha.role_machine import RoleOptions
from srengine.ha.roles import RoleService
from srengine.metrics import Metrics
from srengine.storage import MetadataStore
from srengine.transport import Identity
from srengine.transport.memory import MemoryEndpoint, Network
from srengine.types import NodeId
from tests.ha.agreed import CLUSTER, Setting, address, bootstrap, node_id
from tests.ha.contract.wire import Book, BookWire

WAIT_S = 60.0
"""How long a condition may take before a test fails: the machine may be busy."""


class Admission:
    """What a leader has on this node, and what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.epoch = 0

    async def open(self, epoch: int) -> None:
        self.told.append(f"open {epoch}")
        self.epoch = epoch

    async def close(self) -> None:
        self.told.append("close")
        self.epoch = 0

    async def drain(self) -> None:
        self.told.append("drain")

    async def drop(self) -> None:
        self.told.append("drop")


@dataclass(eq=False)
class Node:
    """One running node."""

    name: str
    number: int
    protocol: HAProtocol
    machine: MetadataMachine
    setting: Setting
    roles: RoleService
    admission: Admission
    metrics: Metrics
    disk: MetadataStore
    """What ``store`` reads from, where nothing is recent."""
    alarms: list[str] = field(default_factory=list)
    tasks: set[asyncio.Task] = field(default_factory=set)
    endpoint: MemoryEndpoint | None = None
    exits: list[errors.Error] = field(default_factory=list)

    @property
    def store(self):
        return self.machine.store

    @property
    def id(self) -> NodeId:
        return NodeId(node_id(self.number))

    @property
    def leads(self) -> bool:
        return self.roles.role is Role.LEADER and self.roles.admitting

    def rows(self) -> list[bytes]:
        return [value for _, value in self.store.scan("test")]

    def member(self, name: str) -> m.Member | None:
        return m.find_member(self.store, name)


class Cluster(ABC):
    """Nodes n0, n1, ... with the ids 1, 2, ...; those of the start are followers."""

    kind = ""
    settings: ClassVar[dict] = {}
    """Of the backend."""

    def __init__(self, path: Path, *, role_options: RoleOptions | None = None, fence: FencingOptions | None = None):
        self.path = path
        path.chmod(0o700)
        self.nodes: dict[str, Node] = {}
        self.role_options = role_options
        self.fencing = fence if fence is not None else FencingOptions(delay_s=0.05)

    @abstractmethod
    async def begin(self, count: int) -> None:
        """Make and start the first nodes."""

    @abstractmethod
    async def end(self) -> None:
        """Stop everything."""

    @abstractmethod
    async def start_node(self, name: str, number: int) -> Node:
        """Start a node, with what is in its directory."""

    async def stop_node(self, name: str) -> None:
        """Stop a node: in order, or as if it died; its directory stays."""
        node = self.nodes.pop(name)
        await self._stop(node)

    def wipe(self, name: str) -> None:
        """Lose the directory of a node that is stopped."""
        shutil.rmtree(self.path / name)

    async def _stop(self, node: Node) -> None:
        for task in list(node.tasks):
            task.cancel()
        if node.tasks:
            await asyncio.wait(node.tasks)
        await node.protocol.stop()
        if node.endpoint is not None:
            await node.endpoint.close()
        node.disk.close()

    def make(self, name: str, number: int, wire, **more) -> Node:
        """Make a node's state, backend and role service around a wire; nothing is started."""
        directory = self.path / name
        directory.mkdir(mode=0o700, exist_ok=True)
        store = MetadataStore(directory / "meta")
        setting = Setting()
        machine = MetadataMachine(store, [MembersApplier(), EpochsApplier(), setting])
        metrics = Metrics()
        node = Node(name, number, None, machine, setting, None, Admission(), metrics, store)

        def spawn(work, what: str) -> asyncio.Task:
            task = asyncio.get_running_loop().create_task(work, name=what)
            node.tasks.add(task)
            task.add_done_callback(node.tasks.discard)
            return task

        around = Surroundings(
            name=name,
            node_id=node.id,
            address=address(number - 1),
            data_dir=directory,
            machine=machine,
            wire=wire,
            clock=SystemClock(),
            spawn=spawn,
            alarm=lambda event, text: node.alarms.append(f"{event}: {text}"),
            metrics=metrics,
            options=HAOptions(fencing=self.fencing, settings=self.settings),
            **more,
        )
        node.protocol = backends.find_backend(self.kind)(around)
        node.roles = RoleService(
            node.protocol,
            node.admission,
            clock=SystemClock(),
            metrics=metrics,
            on_exit=node.exits.append,
            options=self.role_options,
        )
        self.nodes[name] = node
        return node

    async def run(self, node: Node) -> None:
        """Start a node's backend and its role service."""
        await node.protocol.start()
        task = asyncio.get_running_loop().create_task(node.roles.run())
        node.tasks.add(task)
        task.add_done_callback(node.tasks.discard)

    # --- waiting -----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    async def leader(self, *, but: str = "") -> Node:
        """Return the node that acts as leader, as soon as there is one and all others in contact know it."""

        def found() -> Node | None:
            leading = [node for node in self.nodes.values() if node.leads and node.name != but]
            return leading[0] if len(leading) == 1 else None

        await until(lambda: found() is not None)
        leader = found()
        assert leader is not None
        return leader

    async def follower(self) -> Node:
        """Return a node that knows the leader and is not it."""
        leader = await self.leader()
        await until(
            lambda: any(
                node.protocol.observed.role is Role.FOLLOWER and node.protocol.observed.leader == leader.name
                for node in self.nodes.values()
            )
        )
        return next(node for node in self.nodes.values() if node.protocol.observed.role is Role.FOLLOWER)

    async def take_quorum(self, leader: Node) -> None:
        """Take away what the leader needs to lead: here the other nodes."""
        for name in [name for name in self.nodes if name != leader.name]:
            await self.stop_node(name)

    async def forgotten(self, name: str) -> None:
        """Return when the leader takes a node that was stopped for dead; here at once."""
        assert name not in self.nodes, name

    async def equal(self) -> None:
        """Return when all nodes have applied the same entries; their digests are equal then."""

        def same() -> bool:
            return len({node.machine.applied for node in self.nodes.values()}) == 1

        await until(same)
        assert len({node.machine.digest() for node in self.nodes.values()}) == 1


async def until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Wait until ``condition()`` holds; fail after a generous while."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.005)


class RaftCluster(Cluster):
    """The embedded backend on the in-memory network."""

    kind = "raft"
    settings: ClassVar[dict] = {"heartbeat_s": 0.1, "lease_s": 0.4, "election_s_min": 0.8, "election_s_max": 1.6}

    def __init__(self, path: Path, **more) -> None:
        super().__init__(path, **more)
        self.network = Network(seed=1)
        self.book: Book = {}

    async def begin(self, count: int) -> None:
        from srengine.ha.backends.raft import found

        for number in range(count):
            directory = self.path / f"n{number}"
            directory.mkdir(mode=0o700)
            found(directory, bootstrap(count))
        await asyncio.gather(*(self.start_node(f"n{number}", number + 1) for number in range(count)))

    async def start_node(self, name: str, number: int, *, trusted: bool = True) -> Node:
        endpoint = self.network.endpoint(Identity(node_id=node_id(number), name=name, cluster_id=CLUSTER))
        self.book[NodeId(node_id(number))] = {
            port: await endpoint.listen(port, "tcp://127.0.0.1:0") for port in ("peer", "bulk")
        }
        node = self.make(name, number, BookWire(endpoint, self.book), trusted=trusted)
        node.endpoint = endpoint
        await self.run(node)
        return node

    async def end(self) -> None:
        for name in list(self.nodes):
            await self.stop_node(name)

    async def forgotten(self, name: str) -> None:
        number = int(name[1:]) + 1
        leader = await self.leader()
        await until(lambda: NodeId(node_id(number)) not in leader.protocol.leading.alive())

    def isolate(self, *names: str) -> None:
        """Cut nodes off from all the others, in both directions."""
        inside = [self.nodes[name].endpoint for name in names]
        outside = [node.endpoint for node in self.nodes.values() if node.name not in names]
        self.network.partition(inside, outside)


class ToyCluster(Cluster):
    """A backend of another package, installed into a directory of the test's own and found by its entry point."""

    kind = "toy"

    async def begin(self, count: int) -> None:
        site = self.path / "site"
        site.mkdir()
        shutil.copy(Path(__file__).parent / "toy" / "srengine_toy.py", site)
        information = site / "srengine_toy-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: srengine-toy\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("[srengine.ha]\ntoy = srengine_toy:Backend\n")
        sys.path.insert(0, str(site))
        self.site = str(site)
        importlib.invalidate_caches()
        from srengine_toy import World

        self.settings = {"world": World(bootstrap(count))}
        for number in range(count):
            await self.start_node(f"n{number}", number + 1)

    async def start_node(self, name: str, number: int) -> Node:
        node = self.make(name, number, None)
        await self.run(node)
        return node

    async def end(self) -> None:
        try:
            for name in list(self.nodes):
                await self.stop_node(name)
        finally:
            sys.path.remove(self.site)
            sys.modules.pop("srengine_toy", None)


KINDS: dict[str, type[Cluster]] = {"raft": RaftCluster, "toy": ToyCluster}
