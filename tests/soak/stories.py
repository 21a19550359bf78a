"""Stories that run for as long as they are told to: the gate runs a slice of each, ``make soak`` all of it."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from srengine import errors
from srengine.client import messages
from tests.distance import Distance
from tests.namespaces import HostNodes, Network
from tests.node.cluster import Asker, numbered
from tests.node.coordination import Writer, command, wait_leader
from tests.processes import NodeProcess, Nodes, free_ports, wait_for

TABLE = "soak.records"
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


def observers(directory: Path, count: int, seconds: float) -> tuple[int, int]:
    """Let ``count`` observers join three voters; return the terms at the beginning and after ``seconds`` of calm."""
    with Nodes(directory) as nodes, Asker() as asker, ExitStack() as stack:
        nodes.start_all()
        leader = wait_leader(asker, nodes)
        at = nodes[leader].address
        joined: list[NodeProcess] = []
        for number in range(count):
            name = f"observer-{number}"
            ticket = command(at, "member", "add", name, "--role", "observer").stdout.decode().strip()
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
        return before, asker.status(at)["term"]


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
