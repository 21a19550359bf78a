"""Group commit: many threads that each put one record at a time, durably."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data import Data, Sizes
from benchmarks.machine import Disk
from benchmarks.race import race
from benchmarks.stores import open_tablet
from benchmarks.table import Row, at_least, rate

THREADS = 16
SLOW_FSYNC_S = 100e-6
"""On a disk whose fsync costs less, sixteen threads wait for Python's lock, not for the disk: reported, no target."""


def bench_threads(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, data: Data, sizes: Sizes, disk: Disk
) -> None:
    """Put the same number of records with one thread and with sixteen."""
    store, tablet = open_tablet(scratch / "ours")
    tablet.put_many(data.pairs(0, data.count // 2))
    fresh = iter(data.pairs(data.count // 2, data.count))
    total = THREADS * sizes.thread_puts
    work: list[list[tuple[bytes, bytes]]] = []

    def before(_: int) -> None:
        work[:] = [[next(fresh) for _ in range(sizes.thread_puts // 4)] for _ in range(4)]
        work.extend([next(fresh) for _ in range(sizes.thread_puts)] for _ in range(THREADS))

    def put(pairs: list[tuple[bytes, bytes]]) -> None:
        for key, held in pairs:
            tablet.put(key, held)

    def alone(_: int) -> None:
        for pairs in work[:4]:
            put(pairs)

    def together(_: int) -> None:
        threads = [threading.Thread(target=put, args=(pairs,)) for pairs in work[4:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    times = race(benchmark, together, {"one thread": alone}, rounds=min(5, sizes.rounds), before=before)
    slow = disk.fsync_s >= SLOW_FSYNC_S
    # One thread does a sixteenth of the records, so the ratio of times is scaled to a ratio of throughputs.
    report(
        Row(
            f"{THREADS} threads of single durable puts / one thread",
            at_least(4.5) if slow else None,
            times.ratio("one thread") * THREADS,
            rate(total, times.ours_s, "put"),
            rate(total / THREADS, times.reference_s("one thread"), "put"),
            note=f"fsync costs {disk.fsync_s * 1e6:.0f} us here; the target of 4.5 is for disks of 100 us and more.",
        )
    )
    tablet.close()
    store.close()
