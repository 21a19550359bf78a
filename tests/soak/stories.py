"""Stories that run for as long as they are told to: the gate runs a slice of each, ``make soak`` all of it."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from srengine import errors
from srengine.client import messages
from srengine.ha.epochs import check_epochs, read_epoch
from srengine.storage import MetadataStore
from srengine.transport import Endpoint, Identity
from tests.contending import Contender, GetEpoch, Newest, ask
from tests.distance import Distance
from tests.journal_process import JournalProcess
from tests.namespaces import HostNodes, Network
from tests.node.cluster import Asker, numbered
from tests.node.coordination import Writer, command, joiner, put_until_done, wait_leader
from tests.processes import NodeProcess, Nodes, free_ports, wait_for

TABLE = "soak.records"
REGISTER_BYTES = 60_000
ONE_WAY_S = 0.04
PAUSE_S = 0.05


def kills(directory: Path, count: int, seed: int) -> int:
    """Kill random nodes ``count`` times under a writer that never stops; return how many entries were acknowledged.

    Every acknowledged one must be there at the end, on every node.
    """
    chooser = random.Random(seed)
    with Nodes(directory) as nodes, Asker() as asker:
        nodes.start_all()
        wait_leader(asker, nodes)
        with Writer(nodes) as writer:
            for _ in range(count):
                node = chooser.choice(list(nodes))
                writer.wait_more(chooser.randrange(1, 5))
                node.kill()
                writer.wait_more(1)
                node.start().wait_ready()
        wait_leader(asker, nodes)
        for node in nodes:
            writer.check(asker, node.address)
        return writer.count


def leaders(directory: Path, count: int) -> list[float]:
    """Kill whoever leads ``count`` times under a writer that never stops; return the seconds from each kill until a
    write that began after it was acknowledged. Every acknowledged one must be on every node at the end.
    """
    taken: list[float] = []
    with Nodes(directory) as nodes, Asker() as asker:
        nodes.start_all()
        with Writer(nodes) as writer:
            for _ in range(count):
                leader = wait_leader(asker, nodes)
                writer.wait_more(1)
                began = time.monotonic()
                nodes[leader].kill()
                # The first one may have been on its way already.
                writer.wait_more(2)
                taken.append(time.monotonic() - began)
                wait_leader(asker, nodes, but=leader)
                nodes[leader].start().wait_ready()
        wait_leader(asker, nodes)
        for node in nodes:
            writer.check(asker, node.address)
    return taken


def calm(directory: Path, seconds: float, *, load: bool) -> tuple[int, int]:
    """Let three nodes run for a while, idle or with tables being written as fast as they take it; return the term at
    the beginning and at the end: equal when nobody was elected without a reason.
    """
    with Nodes(directory) as nodes, Asker() as asker:
        nodes.start_all()
        leader = wait_leader(asker, nodes)
        at = nodes[leader].address
        asker.create(nodes["node-1"].address, TABLE)
        before = asker.status(at)["term"]
        with _load(nodes) if load else ExitStack():
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                asker.put_register(at, "tick", b"%f" % time.monotonic())
                threading.Event().wait(min(0.5, seconds / 10))
        return before, asker.status(at)["term"]


@contextmanager
def _load(nodes: Nodes) -> Iterator[None]:
    """Write batches to a table until the block ends."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        first = 0
        with Asker() as asker:
            while not stop.is_set():
                try:
                    asker.write(nodes["node-1"].address, TABLE, numbered(first, first + 500, "x" * 200))
                except errors.Error as error:
                    failures.append(error)
                    return
                first += 500

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


@dataclass(frozen=True, slots=True)
class Observed:
    """What `observers` saw."""

    terms: tuple[int, int]
    """Before and after the calm."""
    election_s: float
    """From the kill of the leader until a write was acknowledged."""


def observers(directory: Path, count: int, seconds: float, *, voters: int = 3) -> Observed:
    """Let ``count`` observers join, let everything be calm for a while, then kill the leader."""
    with Nodes(directory, voters) as nodes, Asker() as asker, ExitStack() as stack:
        nodes.start_all()
        leader = wait_leader(asker, nodes)
        at = nodes[leader].address
        joined: list[NodeProcess] = []
        for number in range(count):
            name = f"observer-{number}"
            added = command(at, "member", "add", name, "--role", "observer")
            assert added.returncode == 0, added.stderr.decode()
            ticket = added.stdout.decode().strip()
            arguments = ["--cluster", "test", "--join", at, "--ticket", ticket, "--role", "observer"]
            node = NodeProcess(name, directory / name, free_ports(), arguments)
            stack.callback(_end, node)
            node.start().wait_ready()
            joined.append(node)
        before = asker.status(at)["term"]
        asker.put_register(at, "r", b"v")
        for node in joined:
            wait_for(lambda node=node: asker.get_register(node.address, "r") == b"v", "the observer has applied it")
        threading.Event().wait(seconds)
        after = asker.status(at)["term"]
        began = time.monotonic()
        nodes[leader].kill()
        others = [node.address for node in nodes if node.alive]
        put_until_done(asker, lambda: others, "r", b"w")
        election_s = time.monotonic() - began
        for node in joined:
            wait_for(lambda node=node: asker.get_register(node.address, "r") == b"w", "the observer follows")
        return Observed((before, after), election_s)


def contend(directory: Path, contenders: int, rounds: int) -> int:
    """Let processes claim the epoch behind the newest one, all at the same moment, ``rounds`` times, at three nodes;
    return how many epochs a contender won (the nodes' own leaders fence, too).

    For each claimed epoch exactly the one that its record names was told that it won, on every node the same.
    """
    directory.chmod(0o700)
    ports = [free_ports(3) for _ in range(3)]
    nodes = [JournalProcess(directory / f"node-{number + 1}", number, ports, "raft", {}) for number in range(3)]
    winners: dict[int, list[str]] = {}

    async def newest(address: str) -> Newest:
        endpoint = Endpoint(Identity(version="test"))
        try:
            found: Newest = await ask(endpoint.channel(address), GetEpoch())
            return found
        finally:
            await endpoint.close()

    with ExitStack() as stack:
        for node in nodes:
            stack.callback(_end, node)
            node.start()
        for node in nodes:
            node.wait_ready()
        names = [f"contender-{number}" for number in range(contenders)]
        processes = {
            name: stack.enter_context(Contender(name, nodes[number % 3].address)) for number, name in enumerate(names)
        }
        before = asyncio.run(newest(nodes[0].address))
        for _ in range(rounds):
            for process in processes.values():
                process.begin(before)
            winners[before.epoch + 1] = [name for name, process in processes.items() if process.won()]
            after = asyncio.run(newest(nodes[0].address))
            assert after.epoch > before.epoch, (before, after)
            before = after
        for node in nodes:
            assert asyncio.run(newest(node.address)).epoch >= before.epoch
        for node in nodes:
            node.signal(signal.SIGTERM)
        assert [node.wait() for node in nodes] == [0, 0, 0]
    for node in nodes:
        with MetadataStore(node.data / "meta") as store:
            assert check_epochs(store) >= before.epoch
            for epoch, told in winners.items():
                record = read_epoch(store, epoch)
                assert record is not None, epoch
                assert told == ([record.name] if record.name in processes else []), (record, told)
    return sum(map(len, winners.values()))


@dataclass(frozen=True, slots=True)
class Joined:
    """What `join` saw; times in seconds, of each acknowledged write."""

    before_s: list[float]
    held_s: list[float]
    """While the joiner could not put in place what it had been sent."""
    joining_s: list[float]
    """From then until it was stable."""

    @property
    def slower(self) -> float:
        """How many times the 99th percentile of before that of the whole joining is."""
        return late(self.held_s + self.joining_s) / late(self.before_s)


def late(taken: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(taken)[int(0.99 * (len(taken) - 1))]


def join(directory: Path, mib: int, *, writes: int = 50) -> Joined:
    """Let a follower join a cluster whose agreed state is so large, and whose log is trimmed, under one write after the
    other. Until it has all of it the joiner counts for nothing and nobody waits for it.
    """
    options = directory / "options.toml"
    options.write_text("journal_kept = 100\n")
    gate = directory / "gate"
    with Nodes(directory, arguments=["--config", str(options)]) as nodes, Asker() as asker:
        nodes.start_all()
        at = nodes[wait_leader(asker, nodes)].address
        chooser = random.Random(mib)
        count = (mib << 20) // REGISTER_BYTES
        for number in range(count):
            asker.put_register(at, f"b{number}", chooser.randbytes(REGISTER_BYTES), timeout_s=60)

        def write(goes_on: Callable[[int], bool]) -> list[float]:
            taken: list[float] = []
            while goes_on(len(taken)):
                began = time.perf_counter()
                asker.put_register(at, f"t{len(taken) % 10}", b"v", timeout_s=60)
                taken.append(time.perf_counter() - began)
            return taken

        def is_stable() -> bool:
            return next(member.stable for member in asker.members(at).members if member.name == "late")

        before_s = write(lambda done: done < writes)
        added = command(at, "member", "add", "late")
        assert added.returncode == 0, added.stderr.decode()
        ticket = added.stdout.decode().strip()
        with joiner(nodes, directory, "late", ticket, "--config", str(options)) as newcomer:
            newcomer.environment = {
                "SRENGINE_FAILPOINTS": "journal.apply=hold",
                "SRENGINE_FAILPOINTS_HOLD": str(gate),
            }
            gate.touch()
            newcomer.start()
            wait_for(lambda: any(each.name == "late" for each in asker.members(at).members), "it is a member")
            held_s = write(lambda done: done < writes)
            assert not is_stable(), "it is stable and has nothing"
            gate.unlink()
            joining_s = write(lambda done: done < writes or not is_stable())
            newcomer.wait_ready()
            chooser.seed(mib)
            for number in range(count):
                found = asker.get_register(newcomer.address, f"b{number}", timeout_s=60)
                assert found == chooser.randbytes(REGISTER_BYTES), number
        return Joined(before_s, held_s, joining_s)


@dataclass(frozen=True, slots=True)
class Distant:
    """What `distant` saw; times in seconds."""

    terms: tuple[int, int]
    """At the beginning and at the end."""
    round_trip_s: float
    """Of a connection between the two places."""
    far_s: list[float]
    """Each acknowledged write, with the distance."""
    near_s: list[float]
    """And without it."""

    @property
    def round_trips(self) -> float:
        """Round trips that the median write makes: what it takes longer than without the distance."""
        return (statistics.median(self.far_s) - statistics.median(self.near_s)) / self.round_trip_s


def distant(directory: Path, seconds: float, *, writes_min: int = 30) -> Distant:
    """Let a leader be alone in one place, its two followers in another that is 80 ms of round trip away, and write for
    a while, one write after the other with pauses in between; then the same writes without the distance.
    """
    near, far = ["node-1", "node-2"], "node-3"
    with (
        Network([*near, far]) as network,
        Distance(network, near, [far], one_way_s=ONE_WAY_S) as distance,
        HostNodes(network, directory, [*near, far]) as nodes,
        Asker(enter=network.enter) as asker,
    ):
        nodes.start_all()
        at = nodes[far].address
        if wait_leader(asker, nodes) != far:
            asker.ask(at, messages.TransferLeader(far))
            wait_for(lambda: wait_leader(asker, nodes) == far, f"{far} leads")
        before = asker.status(at)["term"]
        round_trip_s = distance.round_trip_s(far, near[0], nodes[near[0]].port)

        def write(seconds: float) -> list[float]:
            taken: list[float] = []
            deadline = time.monotonic() + seconds
            while len(taken) < writes_min or time.monotonic() < deadline:
                began = time.perf_counter()
                asker.put_register(at, f"r{len(taken) % 100}", b"v")
                taken.append(time.perf_counter() - began)
                threading.Event().wait(PAUSE_S)
            return taken

        far_s = write(seconds)
        after = asker.status(at)["term"]
        distance.one_way_s = 0.0
        return Distant((before, after), round_trip_s, far_s, write(0))


def _end(node: NodeProcess) -> None:
    if node.process is not None:
        node.kill()
