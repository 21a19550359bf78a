"""Drivers with real logs in one process, over the transport in memory or over ZeroMQ, for the tests of the driver."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import asynccontextmanager

from srengine import errors
from srengine.clock import SystemClock
from srengine.consensus.driver import Driver, prepare
from srengine.consensus.effects import Role, Timing
from srengine.consensus.entries import Floor
from srengine.consensus.log import NodeLog
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Bundle
from srengine.consensus.services import Bounds
from srengine.metrics import Metrics
from srengine.transport import Endpoint, Identity
from srengine.transport.memory import Network
from tests.consensus.logs import FIRST, NODES

GROUP = "journal"
TIMING = Timing(heartbeat_s=0.05, lease_s=0.4, election_s_min=0.8, election_s_max=1.6, news_s=0.01)


class State:
    """A state machine that remembers every entry; outlives its driver, as a file would."""

    def __init__(self):
        self.applied = Floor()
        self.entries = []
        """(index, term, data), one a place."""
        self.fault = None
        """Raised by the next `apply`."""
        self.gate = threading.Event()
        self.gate.set()
        self.threads = set()

    def apply_now(self, entries):
        return False

    def apply(self, entries):
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        for entry in entries:
            assert entry.index == len(self.entries) + 1, (entry.index, len(self.entries))
            self.entries.append((entry.index, entry.term, entry.data))
            configuration = entry.configuration or self.applied.configuration
            self.applied = Floor(entry.index, entry.term, configuration)

    def copy_from(self, other):
        self.entries = list(other.entries)
        self.applied = other.applied
        return self.applied

    @property
    def data(self):
        return [data for _, _, data in self.entries if data.startswith(b"p")]


class LateState(State):
    """One that shows entries at once and holds them durably after `flush` only; `crash` loses the difference."""

    def __init__(self):
        super().__init__()
        self.visible = Floor()
        self.flushes = 0
        self.flush_fault = None
        self.not_now = 0
        """So many calls of `flush` find that it cannot be."""

    def apply(self, entries):
        durable, self.applied = self.applied, self.visible
        super().apply(entries)
        self.visible, self.applied = self.applied, durable

    def flush(self):
        self.threads.add(threading.current_thread().name)
        assert self.applied != self.visible
        if self.flush_fault is not None:
            fault, self.flush_fault = self.flush_fault, None
            raise fault
        if self.not_now:
            self.not_now -= 1
            return
        self.flushes += 1
        self.applied = self.visible

    def crash(self):
        del self.entries[self.applied.index :]
        self.visible = self.applied

    def copy_from(self, other):
        self.visible = super().copy_from(other)
        return self.visible


class QuickState(LateState):
    """One that applies on the loop when it may; ``busy`` times it has to be the thread."""

    def __init__(self):
        super().__init__()
        self.at_once = 0
        self.busy = 0

    def apply_now(self, entries):
        assert threading.current_thread() is threading.main_thread()
        if self.busy:
            self.busy -= 1
            return False
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        LateState.apply(self, entries)
        self.threads.discard(threading.current_thread().name)
        self.at_once += len(entries)
        return True


class Member:
    """One node: what outlives a restart (directory, state), and what does not (endpoint, log, driver)."""

    def __init__(self, cluster, number):
        self.cluster = cluster
        self.number = number
        self.id = NODES[number]
        self.path = cluster.path / f"log-{number}"
        self.states = {}
        self.address = None
        self.endpoint = self.log = self.driver = None
        self.roles = []
        self.health = []
        self.failed = []
        self.fetches = 0
        self.fetch_fault = None
        self.in_fetch = None
        """Awaited by `fetch` when it has the copy and has not handed it over."""

    @property
    def running(self):
        return self.driver is not None

    def channel(self, node):
        """The driver's `Peers`."""
        other = next(member for member in self.cluster.members if member.id == node)
        if node not in self.channels and other.address is not None:
            self.channels[node] = self.endpoint.channel(other.address, port="peer")
        return self.channels.get(node)

    def reference(self, floor):
        """The driver's `StateSource`."""
        return b"from " + self.id.encode()

    async def fetch(self, source, floor, reference):
        """The driver's `StateSink`."""
        self.fetches += 1
        if self.fetch_fault is not None:
            fault, self.fetch_fault = self.fetch_fault, None
            raise fault
        other = next(member for member in self.cluster.members if member.id == source)
        assert reference == b"from " + source.encode()
        assert other.states[GROUP].applied.index >= floor.index
        copied = State()
        copied.copy_from(other.states[GROUP])
        if self.in_fetch is not None:
            await self.in_fetch()
        return lambda: self.states[GROUP].copy_from(copied)

    async def start(self, *, trusted=True, groups=(GROUP,)):
        identity = Identity(node_id=self.id, cluster_id="d" * 32)
        network = self.cluster.network
        self.metrics = Metrics()
        make = network.endpoint if network is not None else Endpoint
        self.endpoint = make(identity, metrics=self.metrics)
        self.channels = {}
        self.log = NodeLog.open(self.path)
        self.driver = Driver(
            self.id,
            self.log,
            self,
            SystemClock(),
            bounds=self.cluster.bounds,
            metrics=self.metrics,
            on_health=lambda health, error: self.health.append(health),
            on_group_failed=lambda name, error: self.failed.append((name, error.code)),
        )
        self.endpoint.serve_posts(Bundle, self.driver.receive)
        address = self.address if self.address is not None else "tcp://127.0.0.1:0"
        self.address = await self.endpoint.listen("peer", address)
        for name in groups:
            if name not in self.log.groups():
                self.log.bootstrap(name, FIRST)
            state = self.states.setdefault(name, self.cluster.state_type())
            log = prepare(self.log, name, state)
            machine = RaftMachine(
                group=name,
                node_id=self.id,
                log=log,
                hard_state=log.hard_state,
                applied_index=state.applied.index,
                timing=TIMING,
                random=random.Random(f"{self.cluster.seed}/{self.number}/{name}"),
                now=SystemClock().boottime_s(),
                trusted=trusted and log.damage is None,
            )
            self.driver.add(name, machine, state, source=self, sink=self)
        self.driver.watch_roles(groups[0], self.roles.append)

    async def stop(self):
        if self.driver is None:
            return
        driver, self.driver = self.driver, None
        await self.endpoint.close()
        await driver.stop()
        self.log.close()

    @property
    def role(self):
        return self.driver.status(GROUP).role if self.driver is not None else None

    async def propose(self, data, **options):
        return await self.driver.propose(GROUP, data, **options)


class Cluster:
    def __init__(self, path, kind="memory", *, bounds=None, seed=1, state_type=State):
        self.path = path
        self.state_type = state_type
        self.seed = seed
        self.network = Network(seed) if kind == "memory" else None
        self.bounds = bounds if bounds is not None else Bounds(persist_s_max=0.1)
        self.members = [Member(self, number) for number in range(3)]

    async def leader(self, among=None, seconds=20):
        """Wait until one of them leads, and return it."""
        among = self.members if among is None else among

        def leading():
            return [member for member in among if member.role is Role.LEADER]

        await until(leading, seconds)
        return leading()[0]

    async def write(self, data, seconds=20):
        """Propose until it is decided, as a client would: again only when nothing happened."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            leader = await self.leader()
            try:
                return await leader.propose(data, timeout_s=seconds)
            except (errors.NoQuorum, errors.Conflict):
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.01)

    async def settled(self, seconds=20):
        """Wait until every running member has applied the same."""
        running = [member for member in self.members if member.running]
        await until(lambda: len({tuple(member.states[GROUP].entries) for member in running}) == 1, seconds)


@asynccontextmanager
async def cluster(path, kind="memory", **options):
    made = Cluster(path, kind, **options)
    try:
        for member in made.members:
            await member.start()
        yield made
    finally:
        for member in made.members:
            for state in member.states.values():
                state.gate.set()
            await member.stop()


async def until(condition, seconds=20):
    """Wait until ``condition()`` holds; fail after a generous while."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.005)
