"""Snapshots: producing the items of one, and applying them to an empty tablet, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from benchmarks import machine
from benchmarks.data import KEY_BYTES, VALUE_BYTES, Data, Sizes
from benchmarks.race import race
from benchmarks.stores import Loaded, open_reference, open_tablet
from benchmarks.table import Row, at_least, rate
from srengine import limits
from srengine.snapshot import InPlace, SnapshotSink, SnapshotSource
from srengine.snapshot.sink import FILL_BYTES

ROW_BYTES = 24 + KEY_BYTES + VALUE_BYTES


def drain(loaded: Loaded, compression: str) -> int:
    """Produce every item and drop it; return the bytes."""
    size = 0
    for item in SnapshotSource(loaded.tablet, compression=compression).sealed():
        size += item.size
    return size


def rows_of(loaded: Loaded) -> list[bytes]:
    """Return the blocks of rows that a snapshot's chunks hold."""
    blocks, after, done = [], None, False
    with loaded.tablet.view() as view:
        while not done:
            batch = view.rows_by_key(after, bytes_max=limits.CHUNK_BYTES_TARGET)
            after, done = batch.last, batch.done
            if batch.count:
                blocks.append(batch.rows)
    return blocks


def bench_snapshot_written(
    benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data, sizes: Sizes
) -> None:
    """Produce all items of an uncompressed snapshot: scan, checks, rows, digests, heads."""
    size = data.count * ROW_BYTES
    assert drain(loaded, "none") >= size
    assert loaded.reference.scan_blocks(limits.CHUNK_BYTES_TARGET) == size
    times = race(
        benchmark,
        lambda _: drain(loaded, "none"),
        {"C loop": lambda _: loaded.reference.scan_blocks(limits.CHUNK_BYTES_TARGET)},
        rounds=sizes.rounds,
    )
    report(
        Row(
            "snapshot written, uncompressed / C loop into 1 MiB blocks",
            at_least(0.9),
            times.ratio("C loop"),
            rate(size, times.ours_s, "B"),
            rate(size, times.reference_s("C loop"), "B"),
        )
    )


def bench_snapshot_written_zstd(
    benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data, sizes: Sizes
) -> None:
    """Produce all items of a compressed snapshot, against bare zstd at level 1 on the very same blocks."""
    blocks = rows_of(loaded)
    size = sum(map(len, blocks))

    def bare(_: int) -> None:
        compressor = zstandard.ZstdCompressor(level=1)
        for block in blocks:
            compressor.compress(block)

    times = race(
        benchmark,
        lambda _: drain(loaded, "zstd"),
        {"zstd": bare},
        rounds=max(2, sizes.rounds // 2),
    )
    report(
        Row(
            "snapshot written, zstd 1 / bare zstd on the same blocks",
            at_least(0.9),
            times.ratio("zstd"),
            rate(size, times.ours_s, "B"),
            rate(size, times.reference_s("zstd"), "B"),
        )
    )


def bench_snapshot_applied(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, loaded: Loaded, data: Data, sizes: Sizes
) -> None:
    """Apply the items of a snapshot to an empty tablet, durably, against MDB_APPEND of sorted records and their log.

    Transactions have the same size on both sides.
    """
    items = list(SnapshotSource(loaded.tablet, compression="none"))
    keys, values = data.sorted_packed()
    transaction_records = FILL_BYTES // ROW_BYTES
    work: dict[str, Any] = {}

    def close() -> None:
        for store in work.values():
            store.close()
        work.clear()
        shutil.rmtree(scratch)
        scratch.mkdir()

    def before(_: int) -> None:
        close()
        machine.have_memory(scratch, 2 * sizes.copy_bytes)
        work["store"], work["tablet"] = open_tablet(scratch / "ours")
        work["reference"] = open_reference(scratch / "reference")

    def ours(_: int) -> None:
        with SnapshotSink(InPlace(work["tablet"])) as sink:
            for item in items:
                sink.accept(item)
            sink.finish()

    times = race(
        benchmark,
        ours,
        {"C loop": lambda _: work["reference"].append_load(keys, values, transaction_records)},
        rounds=min(5, sizes.rounds),
        before=before,
    )
    assert work["tablet"].count == data.count, (work["tablet"].count, data.count)
    assert work["tablet"].root == loaded.tablet.root
    report(
        Row(
            "snapshot applied to an empty tablet / C MDB_APPEND loop",
            at_least(0.85),
            times.ratio("C loop"),
            rate(data.count, times.ours_s, "rec"),
            rate(data.count, times.reference_s("C loop"), "rec"),
            note="From memory, every item proved; both durable after each 8 MiB of rows.",
        )
    )
    close()
