"""B08, what it takes to fence: the time until a new leader owns an epoch, beside one durable metadata transaction.

Nodes that are nothing but a journal (tests/journal_node.py), one alone and three together, elect again and again: the
leader gives up, and whoever leads next says how long fencing took, from the election on. Between any two a transaction
of a metadata store on the same disk is timed.
"""

from __future__ import annotations

import secrets
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import Sizes
from benchmarks.table import Row, at_most
from srengine.storage import MetadataStore
from tests.journal_process import JournalProcess
from tests.processes import free_ports, wait_for

LEADERSHIPS = {"full": 60, "quick": 30, "tiny": 2}
SETTINGS = {"heartbeat_s": 0.05, "lease_s": 0.2, "election_s_min": 0.25, "election_s_max": 0.5}
"""Short, because nobody leads for so long after each round: what fencing takes does not depend on it."""


class Journal:
    """``count`` nodes."""

    def __init__(self, directory: Path, count: int) -> None:
        ports = [free_ports(3) for _ in range(count)]
        self._nodes = [
            JournalProcess(directory / f"node-{number + 1}", number, ports, "raft", SETTINGS) for number in range(count)
        ]

    def start(self) -> None:
        for node in self._nodes:
            node.start()

    def stop(self) -> None:
        for node in self._nodes:
            if node.process is not None:
                node.kill()

    def fenced(self) -> float:
        """Return how long the next fencing took, and end that leadership."""

        def told() -> tuple[JournalProcess, float] | None:
            for node in self._nodes:
                for event in node.events("fenced"):
                    return node, event["seconds"]
            return None

        leader, seconds = wait_for(told, "somebody fences")
        leader.signal(signal.SIGUSR1)
        return seconds


def transaction_s(store: MetadataStore) -> float:
    """Return the seconds of one durable transaction of a record as large as an epoch's."""
    start = time.perf_counter()
    with store.transaction() as transaction:
        transaction.put("bench", secrets.token_bytes(8), bytes(128))
    return time.perf_counter() - start


@pytest.mark.parametrize(("count", "target"), [(1, 1.2), (3, 3.0)])
def bench_fencing(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, sizes: Sizes, count: int, target: float
) -> None:
    """Elect and fence again and again."""
    scratch.chmod(0o700)
    taken: list[float] = []
    beside: list[float] = []
    journal = Journal(scratch, count)

    def work() -> None:
        with MetadataStore(scratch / "beside") as store:
            transaction_s(store)
            for _ in range(LEADERSHIPS[sizes.name]):
                taken.append(journal.fenced())
                beside.append(transaction_s(store))

    try:
        journal.start()
        benchmark.pedantic(work, rounds=1, iterations=1)
    finally:
        journal.stop()
    report(
        Row(
            f"journal: fencing, {count} node{'s' if count > 1 else ''}, median / one durable metadata transaction",
            at_most(target),
            statistics.median(ours / theirs for ours, theirs in zip(taken, beside, strict=True)),
            f"{statistics.median(taken) * 1e3:.3g} ms",
            f"{statistics.median(beside) * 1e3:.3g} ms",
            note="From the election on, so the first entry of the term is decided and applied within it.",
        )
    )
