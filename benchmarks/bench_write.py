"""Durable batches: ours against the C loop, against py-lmdb, and with against without digests."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data import Data, Sizes, pack
from benchmarks.race import race
from benchmarks.stores import Loaded, PyLmdb, open_environment, open_reference, open_tablet
from benchmarks.table import Row, at_least, rate


def bench_insert(benchmark: Any, report: Callable[[Row], None], scratch: Path, data: Data, sizes: Sizes) -> None:
    """Insert everything in random order, batch by batch: the C loop, py-lmdb, ours, and again."""
    store, tablet = open_tablet(scratch / "ours")
    reference = open_reference(scratch / "reference")
    pylmdb = PyLmdb(scratch / "pylmdb")
    batches = [(start, min(start + sizes.batch, data.count)) for start in range(0, data.count, sizes.batch)]
    work: dict[str, Any] = {}

    def before(turn: int) -> None:
        start, stop = batches[turn]
        work["pairs"] = data.pairs(start, stop)
        work["packed"] = data.packed(start, stop)
        work["records"] = PyLmdb.records_of(work["pairs"])
        work["log"] = pylmdb.log_of(work["pairs"])

    times = race(
        benchmark,
        lambda _: tablet.put_many(work["pairs"]),
        {
            "C loop": lambda _: reference.put_batch(*work["packed"]),
            "py-lmdb": lambda _: pylmdb.put(work["records"], work["log"]),
        },
        rounds=len(batches),
        before=before,
    )
    assert tablet.count == data.count, (tablet.count, data.count)
    for name, target in (("C loop", 0.85), ("py-lmdb", 1.0)):
        report(
            Row(
                f"durable put_many, inserts / {name}",
                at_least(target),
                times.ratio(name),
                rate(sizes.batch, times.ours_s, "rec"),
                rate(sizes.batch, times.reference_s(name), "rec"),
            )
        )
    tablet.close()
    store.close()
    reference.close()
    pylmdb.close()


def bench_overwrite(benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data, sizes: Sizes) -> None:
    """Overwrite random records, batch by batch: the C loop, ours, and again.

    Everything is overwritten once before, so that the change log has as many dead entries as it ever has and ours pays
    for dropping them, which the C loop never does. That comes in steps, in some of the batches, so this row compares
    sums: a median would leave them out.
    """
    rounds = max(2, min(data.count // sizes.batch, 40))
    order = random.Random(7)
    work: dict[str, Any] = {}
    loaded.overwrite_all(sizes.load_batch)

    def before(turn: int) -> None:
        work["pairs"] = data.changed(order.sample(range(data.count), sizes.batch), seed=1000 + turn)
        work["packed"] = pack(work["pairs"])

    times = race(
        benchmark,
        lambda _: loaded.tablet.put_many(work["pairs"]),
        {"C loop": lambda _: loaded.reference.put_batch(*work["packed"])},
        rounds=rounds,
        before=before,
    )
    assert loaded.tablet.count == data.count, (loaded.tablet.count, data.count)
    ours_s, reference_s = sum(times.ours), sum(times.references["C loop"])
    report(
        Row(
            "durable put_many, overwrites / C loop",
            at_least(0.85),
            reference_s / ours_s,
            rate(sizes.batch * rounds, ours_s, "rec"),
            rate(sizes.batch * rounds, reference_s, "rec"),
            note="Sums of all batches: ours drops dead change entries in some of them, the C loop in none.",
        )
    )


def bench_digests(benchmark: Any, report: Callable[[Row], None], scratch: Path, data: Data, sizes: Sizes) -> None:
    """Insert the same batches into two tablets, one of which keeps no digests and no root."""
    tablet = open_environment(scratch / "with", digests=True)
    plain = open_environment(scratch / "without", digests=False)
    batches = [(start, min(start + sizes.batch, data.count)) for start in range(0, data.count, sizes.batch)][:50]
    work: dict[str, Any] = {}

    def before(turn: int) -> None:
        work["pairs"] = data.pairs(*batches[turn])

    times = race(
        benchmark,
        lambda _: tablet.put_many(work["pairs"]),
        {"without": lambda _: plain.put_many(work["pairs"])},
        rounds=len(batches),
        before=before,
    )
    report(
        Row(
            "digests and root, same batch / without them",
            at_least(0.95),
            times.ratio("without"),
            rate(sizes.batch, times.ours_s, "rec"),
            rate(sizes.batch, times.reference_s("without"), "rec"),
        )
    )
    tablet.close()
    plain.close()
