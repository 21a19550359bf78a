"""Real processes whose journal is all they have: killed, stopped, woken under load; what clients saw has one order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from pathlib import Path

import msgspec
import pytest

from srengine import errors
from srengine.ha.backends.etcd_client import EtcdOptions
from srengine.ha.backends.etcd_settings import found_cluster
from srengine.ha.members import Bootstrap
from srengine.ha.register_service import GetJournal, GetRegister, PutRegister
from srengine.transport import Endpoint, Identity
from tests.conftest import need_tool
from tests.etcd import Etcd
from tests.ha.etcd.parts import until
from tests.journal_node import CLUSTER, bootstrap
from tests.journal_process import JournalProcess
from tests.processes import free_ports
from tests.simulator.checkers.linearizability import Kind, Operation, check

pytestmark = pytest.mark.processes

ATTEMPT_S = 3.0
STOPPED_S = 3.0
"""Longer than the leases of both backends as they are set here."""
REGISTERS = ("r0", "r1", "r2")


class Clients:
    """Clients at all nodes; every operation on a register stands in the history."""

    def __init__(self, processes: list[JournalProcess]) -> None:
        self.processes = processes
        self.endpoint = Endpoint(Identity(version="test"))
        self.channels = [self.endpoint.channel(process.address) for process in processes]
        self.history: list[Operation] = []
        self.moments = itertools.count(1)
        self.values = itertools.count(1)
        self.acknowledged = 0
        self.ended = False

    async def ask(self, node: int, message: msgspec.Struct) -> msgspec.Struct:
        self.channels[node].wake()
        return (await self.channels[node].request(message, timeout_s=ATTEMPT_S)).message

    async def leader(self) -> int:
        """Return the node that owns the newest epoch, as soon as one says so."""
        async with asyncio.timeout(60):
            while True:
                for node, process in enumerate(self.processes):
                    if process.alive:
                        with contextlib.suppress(errors.Error):
                            if (await self.ask(node, GetJournal())).epoch:
                                return node
                await asyncio.sleep(0.05)

    async def write(self, name: str, node: int, register: str) -> None:
        value, invoked, returned = next(self.values), next(self.moments), None
        try:
            await self.ask(node, PutRegister(register, b"%d" % value, timeout_s=ATTEMPT_S))
            returned = next(self.moments)
            self.acknowledged += 1
        except errors.Error:
            pass  # it may have been done
        self.history.append(Operation(name, register, Kind.WRITE, invoked, returned, value=value))

    async def read(self, name: str, node: int, register: str) -> None:
        invoked = next(self.moments)
        try:
            found = await self.ask(node, GetRegister(register, timeout_s=ATTEMPT_S))
        except errors.Error:
            return
        seen = None if found.value is None else int(found.value)
        self.history.append(Operation(name, register, Kind.READ, invoked, next(self.moments), seen=seen))

    async def work(self, number: int, seed: int) -> None:
        chooser = random.Random(seed)
        while not self.ended:
            node, register = chooser.randrange(len(self.channels)), chooser.choice(REGISTERS)
            if chooser.random() < 0.5:
                await self.write(f"c{number}", node, register)
            else:
                await self.read(f"c{number}", node, register)
            await asyncio.sleep(0.005)

    async def progress(self, count: int = 5) -> None:
        """Return when some more writes were acknowledged."""
        enough = self.acknowledged + count
        await until(lambda: self.acknowledged >= enough, "writes acknowledged again", 60)


async def torment(processes: list[JournalProcess], rounds: int, seed: int) -> Clients:
    """Kill and stop nodes under load, the leader mostly; return what was seen."""
    clients = Clients(processes)
    chooser = random.Random(seed)
    load = [asyncio.create_task(clients.work(number, seed * 100 + number)) for number in range(4)]
    try:
        for turn in range(rounds):
            await clients.progress()
            leader = await clients.leader()
            victim = processes[leader if turn % 3 else chooser.randrange(len(processes))]
            if turn % 4 == 3:
                victim.pause()
                await asyncio.sleep(STOPPED_S)
                victim.go_on()
            else:
                await asyncio.to_thread(victim.kill)
                await clients.progress()
                await asyncio.to_thread(lambda victim=victim: victim.start().wait_ready())
        await clients.progress()
    finally:
        clients.ended = True
        await asyncio.gather(*load)
    for register in REGISTERS:
        for node in range(len(processes)):
            await clients.read("end", node, register)
    await clients.endpoint.close()
    return clients


def run(directory: Path, backend: str, settings: dict, rounds: int) -> Clients:
    ports = [free_ports(3) for _ in range(3)]
    processes = [JournalProcess(directory / f"n{number}", number, ports, backend, settings) for number in range(3)]
    if backend == "etcd":
        first = msgspec.msgpack.decode(bootstrap(ports).body, type=Bootstrap)
        options = EtcdOptions(tuple(settings["servers"].split(",")))
        assert asyncio.run(found_cluster(options, first)) == CLUSTER
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait_ready()
        return asyncio.run(torment(processes, rounds, seed=1))
    finally:
        for process in processes:
            if process.process is not None:
                if process.alive:
                    process.go_on()
                process.kill()


def test_what_clients_saw_has_one_order_on_raft(tmp_path: Path) -> None:
    """H11, H06, F21: ten nodes killed or stopped and woken under load: no acknowledged write is lost, no read is stale,
    whichever node it is asked of.
    """
    tmp_path.chmod(0o700)
    clients = run(tmp_path, "raft", {}, rounds=10)
    assert clients.acknowledged >= 50
    check(clients.history)


def test_what_clients_saw_has_one_order_on_etcd(tmp_path: Path) -> None:
    """H11, H06, F21: the same on the backend etcd, with fewer rounds: each loss of a leader costs its lease."""
    need_tool("etcd")
    tmp_path.chmod(0o700)
    with Etcd(tmp_path / "etcd") as etcd:
        clients = run(tmp_path, "etcd", {"servers": etcd.urls[0], "cluster_id": CLUSTER, "lease_s": 2}, rounds=4)
    assert clients.acknowledged >= 20
    check(clients.history)
