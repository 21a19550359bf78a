"""Clusters under test for `bench_coordination`: etcd and srengine behind one face, and what is measured on either.

Both run as three processes on loopback, on the same disk, one after the other in the same run. A writer is one
connection to one node; it is as lean as the other side's: for etcd a hand-written HTTP client of the gateway that reads
no more of an answer than it must, so that nothing of ours slows the reference down.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import signal
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.etcd import Etcd
from tests.journal_process import JournalProcess
from tests.processes import free_ports, wait_for

NODES = 3
PROBE_S = 0.01
"""A new write starts so often while an outage is measured."""
ATTEMPT_S = 5.0
OUTAGE_S_MAX = 60.0
VALUE = b"v" * 128


class Writer(Protocol):
    """One client of one node; several calls at once take several connections where the protocol needs that."""

    async def put(self, key: str, value: bytes) -> None:
        """Return when the write is acknowledged; any exception: it was not, or is not known."""
        ...

    async def leader(self) -> int | None:
        """Return the number of the node that leads, as this node says."""
        ...

    async def applied(self) -> int:
        """Return up to which index this node has applied."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Cluster(Protocol):
    """Three nodes, numbered from 0."""

    name: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def signal(self, node: int, number: int) -> None: ...
    def ended(self, node: int) -> bool: ...
    def restart(self, node: int) -> None: ...
    async def connect(self, node: int) -> Writer: ...


# --- etcd ------------------------------------------------------------------------------------------------------------


class GatewayWriter:
    """Keep-alive connections to one etcd's JSON gateway. Assumes what etcd sends: status line and Content-Length."""

    def __init__(self, host: str, port: int, members: Callable[[int], int]) -> None:
        self._host = host
        self._port = port
        self._members = members
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._all: set[asyncio.StreamWriter] = set()

    async def post(self, path: str, body: bytes) -> bytes:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        self._all.add(writer)
        try:
            writer.write(
                b"POST %s HTTP/1.1\r\nHost: etcd\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            start = head.index(b"Content-Length: ") + 16
            answer = await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))
        except BaseException:
            self._all.discard(writer)
            writer.transport.abort()
            raise
        self._idle.append((reader, writer))
        if not head.startswith(b"HTTP/1.1 200"):
            raise OSError(answer.decode(errors="replace"))
        return answer

    async def put(self, key: str, value: bytes) -> None:
        body = b'{"key":"%s","value":"%s"}' % (base64.b64encode(key.encode()), base64.b64encode(value))
        await self.post("/v3/kv/put", body)

    async def leader(self) -> int | None:
        status = json.loads(await self.post("/v3/maintenance/status", b"{}"))
        leader = int(status.get("leader", 0))
        return self._members(leader) if leader else None

    async def applied(self) -> int:
        return int(json.loads(await self.post("/v3/maintenance/status", b"{}"))["raftAppliedIndex"])

    async def close(self) -> None:
        self._idle.clear()
        for writer in self._all:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._all), return_exceptions=True)


class EtcdCluster:
    """Debian's etcd with its defaults."""

    name = "etcd"

    def __init__(self, directory: Path) -> None:
        self._etcd = Etcd(directory, NODES)
        self._ids: list[int] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses for clients."""
        return self._etcd.urls

    def start(self) -> None:
        self._etcd.start()
        for server in self._etcd.servers:
            with urllib.request.urlopen(f"{server.url}/v3/maintenance/status", data=b"{}", timeout=10) as answer:
                self._ids.append(int(json.load(answer)["header"]["member_id"]))

    def stop(self) -> None:
        self._etcd.__exit__()

    def signal(self, node: int, number: int) -> None:
        process = self._etcd.servers[node].process
        assert process is not None
        process.send_signal(number)

    def ended(self, node: int) -> bool:
        return not self._etcd.servers[node].alive

    def restart(self, node: int) -> None:
        self._etcd.servers[node].start().wait_healthy()

    async def connect(self, node: int) -> GatewayWriter:
        host, _, port = self._etcd.servers[node].url.removeprefix("http://").rpartition(":")
        return GatewayWriter(host, int(port), self._ids.index)


# --- srengine --------------------------------------------------------------------------------------------------------


class RegisterWriter:
    """A connection to one node that writes registers of the journal; ``closed`` is told of its end."""

    def __init__(self, channel: Any, closed: Callable[[], Awaitable[None]]) -> None:
        self._channel = channel
        self._closed = closed

    async def put(self, key: str, value: bytes) -> None:
        from srengine.ha.register_service import PutRegister

        self._channel.wake()
        await self._channel.request(PutRegister(key, value, timeout_s=ATTEMPT_S), timeout_s=ATTEMPT_S + 1)

    async def _journal(self):
        from srengine.ha.register_service import GetJournal

        self._channel.wake()
        return (await self._channel.request(GetJournal(), timeout_s=ATTEMPT_S)).message

    async def leader(self) -> int | None:
        name = (await self._journal()).leader
        return int(name.removeprefix("node-")) - 1 if name else None

    async def applied(self) -> int:
        return (await self._journal()).applied_index

    async def close(self) -> None:
        await self._channel.close()
        await self._closed()


class EmbeddedWriter:
    """The process that a node is embedded in, and which leads: it writes to the journal without a connection."""

    def __init__(self, node: Any) -> None:
        self._node = node

    async def put(self, key: str, value: bytes) -> None:
        from srengine.ha.registers import put_register

        await self._node.protocol.propose(put_register(key, value), timeout_s=ATTEMPT_S)

    async def leader(self) -> int | None:
        return 0 if self._node.protocol.epoch else None

    async def applied(self) -> int:
        return int(self._node.protocol.applied_index)

    async def close(self) -> None:
        """Nothing is open."""


class JournalCluster:
    """Three processes that are nothing but a node's journal (tests/journal_node.py)."""

    name = "srengine"

    def __init__(self, directory: Path, backend: str = "raft", settings: dict[str, Any] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._ports = ports = [free_ports(3) for _ in range(NODES)]
        self._nodes = [
            JournalProcess(directory / f"node-{number + 1}", number, ports, backend, settings or {})
            for number in range(NODES)
        ]
        self._endpoint: Any = None
        self._writers = 0

    def start(self) -> None:
        for node in self._nodes:
            node.start()
        for node in self._nodes:
            node.wait_ready()

    def stop(self) -> None:
        for node in self._nodes:
            if node.process is not None:
                node.kill()

    def signal(self, node: int, number: int) -> None:
        self._nodes[node].signal(number)

    def ended(self, node: int) -> bool:
        return not self._nodes[node].alive

    def restart(self, node: int) -> None:
        self._nodes[node].wait()
        self._nodes[node].start().wait_ready()

    async def connect(self, node: int) -> RegisterWriter:
        from srengine.transport import Endpoint, Identity

        # One for all writers of an event loop, as the other side's connections share a loop: thirty-two sets of
        # ZeroMQ's threads would be a load of their own.
        if not self._writers:
            self._endpoint = Endpoint(Identity(keys=None, version="benchmark"))
        self._writers += 1
        return RegisterWriter(self._endpoint.channel(self._nodes[node].address), self._closed)

    async def _closed(self) -> None:
        self._writers -= 1
        if not self._writers:
            await self._endpoint.close()

    @contextlib.asynccontextmanager
    async def embedded(self) -> AsyncIterator[EmbeddedWriter]:
        """Run the first node in this process, the others in theirs, and yield a writer as soon as it leads.

        Instead of `start`; the loop has to go on while the node lives.
        """
        import gc
        import sys

        from srengine.node.interpreter import take_over_interpreter
        from tests.journal_node import JournalNode, prepare

        own, *others = self._nodes
        before = gc.get_threshold(), sys.getswitchinterval()
        for node in others:
            node.start()
        specification = own.specification
        embedded = JournalNode(specification, prepare(specification))
        await embedded.start()
        try:
            for node in others:
                await asyncio.to_thread(node.wait_ready)
            await embedded.known.wait()
            deadline = time.monotonic() + OUTAGE_S_MAX
            while not embedded.protocol.epoch:
                assert time.monotonic() < deadline, "the embedded node does not get to lead"
                for node in others:  # whoever leads gives it up, to one or the other
                    node.signal(signal.SIGUSR1)
                await asyncio.sleep(0.5)
            take_over_interpreter()
            yield EmbeddedWriter(embedded)
        finally:
            await embedded.stop()
            gc.unfreeze()
            gc.set_threshold(*before[0])
            sys.setswitchinterval(before[1])


class EtcdBackedCluster(JournalCluster):
    """The same three processes with the other backend: their journal is in the servers of an `EtcdCluster`."""

    name = "srengine on etcd"

    def __init__(self, directory: Path, etcd: EtcdCluster) -> None:
        from tests.journal_node import CLUSTER

        self._servers = etcd.urls
        super().__init__(directory, "etcd", {"servers": ",".join(etcd.urls), "cluster_id": CLUSTER})

    def start(self) -> None:
        import msgspec

        from srengine.ha.backends.etcd_client import EtcdOptions
        from srengine.ha.backends.etcd_settings import found_cluster
        from srengine.ha.members import Bootstrap
        from tests.journal_node import bootstrap

        first = msgspec.msgpack.decode(bootstrap(self._ports).body, type=Bootstrap)
        asyncio.run(found_cluster(EtcdOptions(self._servers), first))
        super().start()


# --- what is measured ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def writers(cluster: Cluster, nodes: Sequence[int]) -> AsyncIterator[list[Writer]]:
    """Open a connection to each of ``nodes``."""
    made = [await cluster.connect(node) for node in nodes]
    try:
        yield made
    finally:
        for writer in made:
            await writer.close()


async def find_leader(cluster: Cluster) -> int:
    """Return the node that all of them call leader, once they do and a write went through it."""
    deadline = time.monotonic() + OUTAGE_S_MAX
    async with writers(cluster, range(NODES)) as everybody:
        while True:
            said: set[int | None] = set()
            with contextlib.suppress(Exception):
                said = {await writer.leader() for writer in everybody}
                if len(said) == 1 and None not in said:
                    (leader,) = said
                    assert leader is not None
                    await everybody[leader].put("ready", VALUE)
                    return leader
            assert time.monotonic() < deadline, (cluster.name, "no leader", said)
            await asyncio.sleep(0.05)


async def sequential(cluster: Cluster, count: int) -> list[float]:
    """Return the seconds of each of ``count`` writes, one after the other, at the leader."""
    async with writers(cluster, [await find_leader(cluster)]) as (writer,):
        return await one_by_one(writer, count)


async def one_by_one(writer: Writer, count: int) -> list[float]:
    """Return the seconds of each of ``count`` writes, one after the other."""
    for number in range(20):
        await writer.put(f"warm{number}", VALUE)
    taken = []
    for number in range(count):
        start = time.perf_counter()
        await writer.put(f"k{number % 100}", VALUE)
        taken.append(time.perf_counter() - start)
    return taken


async def concurrent(cluster: Cluster, clients: int, seconds: float) -> float:
    """Return the acknowledged writes a second of ``clients`` connections to the leader."""
    leader = await find_leader(cluster)
    async with writers(cluster, [leader] * clients) as everybody:
        return await side_by_side(everybody, seconds)


async def side_by_side(everybody: Sequence[Writer], seconds: float) -> float:
    """Return the acknowledged writes a second of writers that each write one after the other."""
    done = 0

    async def work(number: int, writer: Writer, deadline: float) -> None:
        nonlocal done
        turn = 0
        while time.perf_counter() < deadline:
            await writer.put(f"k{number}.{turn % 20}", VALUE)
            turn += 1
            done += 1

    await asyncio.gather(*(work(number, each, time.perf_counter() + 0.3) for number, each in enumerate(everybody)))
    done = 0
    start = time.perf_counter()
    await asyncio.gather(*(work(number, each, start + seconds) for number, each in enumerate(everybody)))
    return done / (time.perf_counter() - start)


async def discovery(cluster: Cluster, count: int) -> list[float]:
    """Return the seconds that each of ``count`` questions for the leader takes, at all nodes in turn."""
    await find_leader(cluster)
    taken = []
    async with writers(cluster, range(NODES)) as everybody:
        for number in range(count):
            start = time.perf_counter()
            leader = await everybody[number % NODES].leader()
            taken.append(time.perf_counter() - start)
            assert leader is not None, cluster.name
    return taken


async def outage(cluster: Cluster, number: int) -> float:
    """End the leader by a signal; return the longest time between two acknowledged writes around it, in seconds.

    A write starts every `PROBE_S` at one of the two other nodes in turn, whatever became of the earlier ones, from
    before the signal until one that began after the leader's process had ended was acknowledged.
    """
    leader = await find_leader(cluster)
    others = [node for node in range(NODES) if node != leader]
    acknowledged: list[tuple[float, float]] = []

    async def probe(writer: Writer, turn: int) -> None:
        began = time.perf_counter()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(ATTEMPT_S):
                await writer.put(f"probe{turn % 50}", VALUE)
            acknowledged.append((began, time.perf_counter()))

    probes: set[asyncio.Task[None]] = set()
    signalled = ended = 0.0
    start = time.perf_counter()
    async with writers(cluster, others) as pool:
        turn = 0
        while True:
            now = time.perf_counter()
            if not signalled and len(acknowledged) >= 30:
                cluster.signal(leader, number)
                signalled = time.perf_counter()
            if signalled and not ended and cluster.ended(leader):
                ended = time.perf_counter()
            if ended and any(began > ended for began, _ in acknowledged):
                break
            assert now - start < OUTAGE_S_MAX, (cluster.name, "no write was acknowledged any more")
            task = asyncio.create_task(probe(pool[turn % len(pool)], turn))
            probes.add(task)
            task.add_done_callback(probes.discard)
            turn += 1
            await asyncio.sleep(PROBE_S)
        for task in probes:
            task.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
    moments = sorted(done for _, done in acknowledged)
    last_before = max((moment for moment in moments if moment <= signalled), default=signalled)
    moments = [last_before, *(moment for moment in moments if moment > signalled)]
    return max(after - before for before, after in itertools.pairwise(moments))


async def outages(cluster: Cluster, number: int, rounds: int) -> list[float]:
    """Measure `outage` several times; the ended node is back before the next."""
    taken = []
    for _ in range(rounds):
        leader = await find_leader(cluster)
        taken.append(await outage(cluster, number))
        await asyncio.to_thread(cluster.restart, leader)
    return taken


async def catch_up(cluster: Cluster, entries: int, clients: int) -> tuple[float, float]:
    """Return (writes a second while a follower is away, entries a second at which it catches up, start included)."""
    leader = await find_leader(cluster)
    away = (leader + 1) % NODES
    cluster.signal(away, signal.SIGKILL)
    await asyncio.to_thread(wait_for, lambda: cluster.ended(away), "the end of the follower")
    left = iter(range(entries))

    async def work(number: int, writer: Writer) -> None:
        for turn in left:
            await writer.put(f"k{number}.{turn % 20}", VALUE)

    async with writers(cluster, [leader] * clients) as everybody:
        start = time.perf_counter()
        await asyncio.gather(*(work(number, writer) for number, writer in enumerate(everybody)))
        writing_s = time.perf_counter() - start
        head = await everybody[0].applied()
    start = time.perf_counter()
    back = asyncio.create_task(asyncio.to_thread(cluster.restart, away))
    while True:
        with contextlib.suppress(Exception):
            async with writers(cluster, [away]) as (writer,), asyncio.timeout(2):
                if await writer.applied() >= head:
                    break
        assert time.perf_counter() - start < 600, (cluster.name, "the follower does not catch up")
        await asyncio.sleep(0.005)
    catching_s = time.perf_counter() - start
    await back
    return entries / writing_s, entries / catching_s


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of all lie.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, round(share * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
