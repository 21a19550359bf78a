"""The rejoin with real processes: three nodes, one killed under load, and what it is sent when it comes back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import srengine
from benchmarks.bench_rejoin import ROW_BYTES
from benchmarks.data import KEY_BYTES, VALUE_BYTES, Data, Sizes
from benchmarks.table import Row, at_most
from tests.processes import Nodes, wait_for

TABLE = "bench.records"
AWAY = "node-3"
CATCH_UP_S = 300.0
LOAD_BATCH = 10
"""Records of one write of the load: what is in flight at the kill may or may not have arrived."""


def replica(cluster: Any, node: str) -> dict[str, Any]:
    """Return what the leader says of one node's replica."""
    (found,) = [row for row in cluster.sync_status(TABLE) if row["node"] == node]
    return dict(found)


def is_equal(cluster: Any) -> bool:
    """Return whether all replicas are SYNCED at one sequence with one root."""
    rows = cluster.sync_status(TABLE)
    return len({(row["sequence"], row["root"]) for row in rows}) == 1 and all(row["state"] == "SYNCED" for row in rows)


def bench_rejoin_after_kill(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, data: Data, sizes: Sizes
) -> None:
    """Kill a replica under load, change 1 % of the records, let it come back, count the bytes that it received."""
    count = min(data.count, sizes.cluster_records)
    order = random.Random(13)
    with Nodes(scratch, 3) as nodes, srengine.connect(nodes.endpoints) as cluster:
        nodes.start_all()
        cluster.create_database("bench")
        cluster.create_table(TABLE, tablets=1, replicas=3)
        table = cluster.table(TABLE)
        for start in range(0, count, sizes.batch):
            table.put_many(data.pairs(start, min(start + sizes.batch, count)))
        wait_for(lambda: is_equal(cluster), "all replicas equal after loading", CATCH_UP_S)

        numbers = order.sample(range(count), max(LOAD_BATCH * 4, count // 100))
        written_at_kill = 0
        under_load, killed = threading.Event(), threading.Event()

        def load() -> None:
            nonlocal written_at_kill
            for turn, start in enumerate(range(0, len(numbers), LOAD_BATCH)):
                if start + LOAD_BATCH >= len(numbers):
                    killed.wait(CATCH_UP_S)  # something is missed, however fast the writes were
                table.put_many(data.changed(numbers[start : start + LOAD_BATCH], seed=turn))
                if not under_load.is_set() and start >= len(numbers) // 4:
                    under_load.set()
                if nodes[AWAY].alive:
                    written_at_kill = start + LOAD_BATCH

        thread = threading.Thread(target=load)
        thread.start()
        under_load.wait(CATCH_UP_S)
        nodes[AWAY].kill()
        killed.set()
        thread.join()
        missed = len(numbers) - written_at_kill

        def come_back() -> dict[str, Any]:
            nodes[AWAY].start().wait_ready()
            wait_for(lambda: is_equal(cluster), "the killed replica equal again", CATCH_UP_S)
            return replica(cluster, AWAY)

        state = benchmark.pedantic(come_back, rounds=1, iterations=1)
    assert state["path"] in {"log", "delta"}, state
    least = missed * (KEY_BYTES + VALUE_BYTES + ROW_BYTES)
    report(
        Row(
            "rejoin of a node killed under load: bytes / (records + 24 B each)",
            at_most(1.1),
            state["bytes_received"] / least,
            f"{state['bytes_received']} B ({state['path']})",
            f"{least} B",
            note="Three processes; a write in flight at the kill counts as held, hence against us when it was not.",
        )
    )
