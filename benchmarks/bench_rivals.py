"""The same work with what a user would otherwise pick, each durable on return: reported, without a target.

rocksdict and plyvel keep a log and sort later, so a batch of random keys costs them one sequential write; they pay when
they compact and when they read. sqlite3 is a B-tree with a write-ahead log. None of them keeps a change log, a root or
checks for each record, and only ours can say what changed since a position.
"""

from __future__ import annotations

import importlib
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from benchmarks.data import Data, Sizes
from benchmarks.race import race
from benchmarks.stores import open_tablet
from benchmarks.table import Row, rate


class Rival(Protocol):
    """What every store can do."""

    def put_many(self, pairs: list[tuple[bytes, bytes]]) -> object:
        """Put a batch; durable on return."""

    def get(self, key: bytes) -> object:
        """Return a value or None."""

    def scan(self) -> Iterator[object]:
        """Return an iterator over all records in key order."""

    def close(self) -> object:
        """Close."""


class Ours:
    """srengine."""

    def __init__(self, path: Path) -> None:
        """Open fresh."""
        self.store, self.tablet = open_tablet(path)
        self.put_many, self.get, self.scan = self.tablet.put_many, self.tablet.get, self.tablet.scan

    def close(self) -> None:
        """Close."""
        self.tablet.close()
        self.store.close()


class Rocks:
    """RocksDB through rocksdict, raw bytes, synchronous write-ahead log."""

    def __init__(self, path: Path) -> None:
        """Open fresh."""
        self.module = importlib.import_module("rocksdict")
        self.database = self.module.Rdict(str(path), self.module.Options(raw_mode=True))
        self.options = self.module.WriteOptions()
        self.options.sync = True
        self.get = self.database.get

    def put_many(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Put a batch; durable on return."""
        batch = self.module.WriteBatch(raw_mode=True)
        for key, value in pairs:
            batch.put(key, value)
        self.database.write(batch, self.options)

    def scan(self) -> Iterator[object]:
        """Return an iterator over all records."""
        return iter(self.database.items())

    def close(self) -> None:
        """Close."""
        self.database.close()


class Level:
    """LevelDB through plyvel, synchronous log."""

    def __init__(self, path: Path) -> None:
        """Open fresh."""
        self.database = importlib.import_module("plyvel").DB(str(path), create_if_missing=True)
        self.get, self.scan, self.close = self.database.get, self.database.iterator, self.database.close

    def put_many(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Put a batch; durable on return."""
        with self.database.write_batch(sync=True) as batch:
            for key, value in pairs:
                batch.put(key, value)


class Sqlite:
    """SQLite through sqlite3: a table without row ids, write-ahead log, synchronous=FULL."""

    def __init__(self, path: Path) -> None:
        """Open fresh."""
        path.mkdir()
        self.database = sqlite3.connect(path / "data.sqlite", isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")
        self.database.execute("CREATE TABLE records (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")

    def put_many(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Put a batch; durable on return."""
        self.database.execute("BEGIN IMMEDIATE")
        self.database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", pairs)
        self.database.execute("COMMIT")

    def get(self, key: bytes) -> object:
        """Return a value or None."""
        row = self.database.execute("SELECT value FROM records WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def scan(self) -> Iterator[object]:
        """Return an iterator over all records."""
        return iter(self.database.execute("SELECT key, value FROM records ORDER BY key"))

    def close(self) -> None:
        """Close."""
        self.database.close()


RIVALS: dict[str, tuple[str, Callable[[Path], Rival]]] = {
    "rocksdict": ("rocksdict", Rocks),
    "plyvel": ("plyvel", Level),
    "sqlite3": ("sqlite3", Sqlite),
}


@pytest.mark.parametrize("name", sorted(RIVALS))
def bench_rival(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, data: Data, sizes: Sizes, name: str
) -> None:
    """Insert the same batches durably, then get and scan the same records."""
    module, kind = RIVALS[name]
    pytest.importorskip(module, reason=f"{module} is not installed; the extra `bench` brings it")
    ours, theirs = Ours(scratch / "ours"), kind(scratch / name)
    count = min(data.count, sizes.rival_records)
    batches = [data.pairs(start, min(start + sizes.batch, count)) for start in range(0, count, sizes.batch)]
    times = race(
        benchmark,
        lambda turn: ours.put_many(batches[turn]),
        {name: lambda turn: theirs.put_many(batches[turn])},
        rounds=len(batches),
    )
    # The sum, not the median: an LSM tree pays for its batches later, in some of the rounds.
    ours_s, theirs_s = sum(times.ours), sum(times.references[name])
    report(
        Row(
            f"durable put_many, inserts / {name}",
            None,
            theirs_s / ours_s,
            rate(count, ours_s, "rec"),
            rate(count, theirs_s, "rec"),
        )
    )
    order = random.Random(11)
    keys = [data.key(order.randrange(count)) for _ in range(sizes.gets)]

    def get_all(store: Rival) -> None:
        get = store.get
        for key in keys:
            get(key)

    def scan_all(store: Rival) -> int:
        return sum(1 for _ in store.scan())

    assert scan_all(ours) == scan_all(theirs) == count
    for what, work, amount, unit in (("get", get_all, len(keys), "get"), ("scan", scan_all, count, "rec")):
        mine, others = [], []
        for _ in range(3):
            others.append(seconds(work, theirs))
            mine.append(seconds(work, ours))
        ratios = sorted(other / own for own, other in zip(mine, others, strict=True))
        report(
            Row(
                f"{what}, warm / {name}",
                None,
                ratios[1],
                rate(amount, sorted(mine)[1], unit),
                rate(amount, sorted(others)[1], unit),
            )
        )
    ours.close()
    theirs.close()


def seconds(work: Callable[[Rival], object], store: Rival) -> float:
    """Return how long ``work`` takes."""
    start = time.perf_counter()
    work(store)
    return time.perf_counter() - start
