"""One node of the log's benchmark in a process of its own: ``python -m benchmarks.driving NUMBER DIRECTORY``.

It takes a line of JSON with all ports, then commands, one a line, each answered by a line:

* ``["role"]`` the role in the group;
* ``["sequential", count, bytes]`` seconds of each of so many proposals, one after another;
* ``["clients", clients, count, bytes]`` seconds that so many clients took for so many proposals together;
* ``["cpu"]`` seconds of processor time so far;
* ``["profile", count, bytes]`` where so many proposals spent their time, by file;
* ``["end"]``.

Its state machine puts each entry and the applied index into a metadata store, durably and at once; a node's shows it
first and writes it a little later.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import pstats
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srengine.clock import SystemClock
from srengine.consensus.driver import Driver, prepare
from srengine.consensus.effects import Timing
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor
from srengine.consensus.log import NodeLog
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Bundle
from srengine.storage import MetadataStore
from srengine.transport import Channel, Endpoint, Identity
from srengine.types import NodeId

GROUP = "journal"
NODES = tuple(NodeId(f"{number:032x}") for number in (1, 2, 3))
FIRST = Entry(1, 1, EntryKind.CONFIGURATION, b"", Configuration(NODES))


class State:
    """Entries and the applied index in one transaction."""

    def __init__(self, path: Path) -> None:
        self.store = MetadataStore(path)
        self.applied = Floor()

    def apply_now(self, entries: Sequence[Entry]) -> bool:
        return False  # it waits for the disk

    def apply(self, entries: Sequence[Entry]) -> None:
        with self.store.transaction() as transaction:
            for entry in entries:
                transaction.put("rows", entry.index.to_bytes(8, "big"), entry.data)
            last = entries[-1]
            transaction.put("applied", b"index", last.index.to_bytes(8, "big") + last.term.to_bytes(8, "big"))
        self.applied = Floor(last.index, last.term, FIRST.configuration or Configuration())


class Ways:
    """The channels to the others."""

    def __init__(self, endpoint: Endpoint, ports: Sequence[int]) -> None:
        self._endpoint = endpoint
        self._ports = ports
        self._channels: dict[NodeId, Channel] = {}

    def channel(self, node: NodeId) -> Channel:
        if node not in self._channels:
            address = f"tcp://127.0.0.1:{self._ports[NODES.index(node)]}"
            self._channels[node] = self._endpoint.channel(address, port="peer")
        return self._channels[node]


async def sequential(driver: Driver, count: int, size: int) -> list[float]:
    data = bytes(size)
    taken = []
    for _ in range(count):
        before = time.perf_counter()
        await driver.propose(GROUP, data)
        taken.append(time.perf_counter() - before)
    return taken


async def clients(driver: Driver, number: int, count: int, size: int) -> float:
    data = bytes(size)
    left = count

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await driver.propose(GROUP, data)

    before = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(number)))
    return time.perf_counter() - before


async def profile(driver: Driver, count: int, size: int) -> str:
    profiler = cProfile.Profile()
    profiler.enable()
    await sequential(driver, count, size)
    profiler.disable()
    by_file: dict[str, list[float]] = {}
    for (file, _, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = name if file == "~" else file.rpartition("site-packages/")[2].rpartition("srengine/")[2]
        spent = by_file.setdefault(where, [0.0, 0.0])
        spent[0] += own
        spent[1] += calls
    rows = sorted(by_file.items(), key=lambda item: -item[1][0])
    return "\n".join(
        f"{own / count * 1e6:8.1f} us {calls / count:8.1f} calls  {where}" for where, (own, calls) in rows[:30]
    )


async def obey(driver: Driver, command: list[Any]) -> object:
    match command:
        case ["role"]:
            return driver.status(GROUP).role.value
        case ["sequential", count, size]:
            return await sequential(driver, count, size)
        case ["clients", number, count, size]:
            return await clients(driver, number, count, size)
        case ["cpu"]:
            return time.process_time()
        case ["profile", count, size]:
            return await profile(driver, count, size)
        case _:
            raise ValueError(command)


async def main(number: int, directory: Path) -> None:
    loop = asyncio.get_running_loop()
    ports = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    endpoint = Endpoint(Identity(node_id=NODES[number], cluster_id="c" * 32))
    with NodeLog.open(directory / "log") as log:
        driver = Driver(NODES[number], log, Ways(endpoint, ports), SystemClock())
        endpoint.serve_posts(Bundle, driver.receive)
        await endpoint.listen("peer", f"tcp://127.0.0.1:{ports[number]}")
        log.bootstrap(GROUP, FIRST)
        state = State(directory / "state")
        group = prepare(log, GROUP, state)
        machine = RaftMachine(
            group=GROUP,
            node_id=NODES[number],
            log=group,
            hard_state=group.hard_state,
            applied_index=0,
            timing=Timing(),
            random=random.Random(number),
            now=SystemClock().boottime_s(),
            trusted=True,
        )
        driver.add(GROUP, machine, state)
        while (command := json.loads(await loop.run_in_executor(None, sys.stdin.readline))) != ["end"]:
            print(json.dumps(await obey(driver, command)), flush=True)
        await driver.stop()
        await endpoint.close()
        state.store.close()


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(mode=0o700)
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
