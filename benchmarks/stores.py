"""The stores that are compared, behind as little as possible.

Each has its own directory: two bindings never open one LMDB environment.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import lmdb

from benchmarks import settings
from benchmarks._reference import Store as Reference
from benchmarks.data import KEY_BYTES, VALUE_BYTES, Data, pack
from srengine._native.tablet import Environment
from srengine.storage import Store, Tablet

HEADER = bytes(32)
"""py-lmdb writes records of the same size; their header is made before the clock starts."""


def open_tablet(path: Path) -> tuple[Store, Tablet]:
    """Return a fresh store with one tablet."""
    store = Store(path)
    return store, store.tablet("bench")


def open_environment(path: Path, *, digests: bool) -> Environment:
    """Return a fresh tablet of the kernel alone; without ``digests`` it keeps no root (a switch for this benchmark)."""
    path.mkdir(parents=True)
    return Environment(
        os.fsencode(path),
        map_bytes=settings.MAP_BYTES,
        view_ms_max=30_000,
        create=True,
        meta={b"seed": b"bench-01"},
        digests=digests,
    )


def open_reference(path: Path) -> Reference:
    """Return a fresh store of the C loops."""
    return Reference(path, KEY_BYTES, VALUE_BYTES, settings.MAP_BYTES)


class PyLmdb:
    """py-lmdb with the same two databases: putmulti of records, putmulti of the log, one commit."""

    def __init__(self, path: Path) -> None:
        """Make a fresh environment with py-lmdb's durable defaults."""
        path.mkdir(parents=True)
        self.environment = lmdb.open(str(path), map_size=settings.MAP_BYTES, max_dbs=4)
        self.records = self.environment.open_db(b"records")
        self.changes = self.environment.open_db(b"changes", integerkey=True)
        self.sequence = 0

    def log_of(self, pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the change log's items of a batch (made before the clock starts)."""
        items = [(struct.pack("@N", self.sequence + number), key) for number, (key, _) in enumerate(pairs, 1)]
        self.sequence += len(pairs)
        return items

    @staticmethod
    def records_of(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the record items of a batch, header included (made before the clock starts)."""
        return [(key, HEADER + value) for key, value in pairs]

    def put(self, records: list[tuple[bytes, bytes]], log: list[tuple[bytes, bytes]]) -> None:
        """Put one batch, sorted by key as ours, in one durable transaction."""
        with self.environment.begin(write=True) as transaction:
            with transaction.cursor(self.records) as cursor:
                cursor.putmulti(sorted(records))
            with transaction.cursor(self.changes) as cursor:
                cursor.putmulti(log, append=True)

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()


class Loaded:
    """Three stores with the same records, written in the same random order and the same batches."""

    def __init__(self, path: Path, data: Data, batch: int) -> None:
        """Load all of ``data``."""
        path.mkdir()
        self.data = data
        self.store, self.tablet = open_tablet(path / "ours")
        self.reference = open_reference(path / "reference")
        self.pylmdb = PyLmdb(path / "pylmdb")
        for start in range(0, data.count, batch):
            stop = min(start + batch, data.count)
            pairs = data.pairs(start, stop)
            self.tablet.put_many(pairs)
            self.reference.put_batch(*data.packed(start, stop))
            self.pylmdb.put(PyLmdb.records_of(pairs), self.pylmdb.log_of(pairs))

    def overwrite_all(self, batch: int) -> None:
        """Give every record another value, in the tablet and in the reference store, in another random order."""
        order = random.Random(5)
        numbers = order.sample(range(self.data.count), self.data.count)
        for start in range(0, self.data.count, batch):
            pairs = self.data.changed(numbers[start : start + batch], seed=start)
            self.tablet.put_many(pairs)
            self.reference.put_batch(*pack(pairs))

    def close(self) -> None:
        """Close all three."""
        self.tablet.close()
        self.store.close()
        self.reference.close()
        self.pylmdb.close()
