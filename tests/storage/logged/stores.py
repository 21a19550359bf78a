"""Logged stores for the tests of this folder: filled, copied, on disks that fail."""

from __future__ import annotations

import contextlib
import os
import select
import shutil

import pytest

from srengine import errors
from srengine.storage import fences, wal
from srengine.storage.logged import LoggedStore
from srengine.storage.metadata import MetadataStore

SMALL = 4096
"""A log of eight sectors: it is full all the time."""


@contextlib.contextmanager
def opened(path, capacity=wal.CAPACITY // 16):
    store = LoggedStore.open(path, capacity=capacity)
    try:
        yield store
    finally:
        store.close()


def fill(store, table, rows):
    """Put rows, None deletes, in one transaction."""
    with store.transaction() as transaction:
        for key, value in dict(rows).items():
            if value is None:
                transaction.discard(table, key)
            else:
                transaction.put(table, key, value)


def crashed(store, to):
    """Copy a store that is open: what a process that dies now leaves behind."""
    shutil.copytree(store.path, to)
    return to


def waiting(store):
    """Return how many rows are not in LMDB yet."""
    return sum(len(rows) for rows in store._pending.values())


def changing(table, rows):
    """Return the changes of a transaction that is begun."""
    return [(table, key, value) for key, value in dict(rows).items()]


def is_done(store):
    """Return whether the descriptor says that what was begun has ended."""
    return bool(select.select([store.done], [], [], 0)[0])


def wait_done(store):
    select.select([store.done], [], [])


class Disk:
    """The disk under a store's write-ahead log for the next record that is begun: it does not answer before `answer`,
    or until somebody waits for it, and fails then with ``code`` unless that is 0.
    """

    def __init__(self, store, code=0):
        self._store = store
        self._code = code
        self._held = None
        self.appender, store._appender = store._appender, self

    def begin(self, *given):
        self._held = given

    def answer(self):
        if self._code:
            os.write(self._store._notify, b"!")
        else:
            self.appender.begin(*self._held)
        self._held = None

    def take(self):
        if self._held is not None:
            self.answer()
        self._store._appender = self.appender
        return self._code or self.appender.take()

    def close(self):
        self.appender.close()


def mixed(store):
    """Fill table t with settled rows of several pages of a scan, cover some, and return what is to be seen."""
    settled = {b"%04d" % number: b"settled" for number in range(0, 1200, 2)}
    fill(store, "t", settled)
    store.settle()
    pending = {b"%04d" % number: b"pending" for number in range(0, 1200, 7)}
    pending |= {b"%04d" % number: None for number in range(0, 1200, 10)}
    pending |= {b"000": b"before all", b"2": b"behind all", b"1199": b"last but one"}
    fill(store, "t", pending)
    fill(store, "new", {b"k": b"v"})
    fill(store, "nothing", {b"k": None})
    assert waiting(store) == len(pending) + 2
    return {key: value for key, value in {**settled, **pending}.items() if value is not None}


def transactions(store):
    return store._store._environment.last_transaction()


def calls(store):
    """Everything that a store may be asked, for a row that is pending and for one that is not."""
    return (
        lambda: store.get("t", b"pending"),
        lambda: store.get("t", b"settled"),
        lambda: list(store.scan("t")),
        lambda: list(store.survey("t")),
        lambda: list(store.scan("unknown")),
        store.tables,
        lambda: fill(store, "t", {b"k": b"v"}),
    )


def both(store):
    fill(store, "t", {b"settled": b"v"})
    store.settle()
    fill(store, "t", {b"pending": b"v"})


@contextlib.contextmanager
def writing_to(log, path, flags):
    """Let an open write-ahead log write to another file."""
    kept, other = os.dup(log._fd), os.open(path, flags)
    os.dup2(other, log._fd)
    try:
        yield
    finally:
        os.dup2(kept, log._fd)
        os.close(kept)
        os.close(other)


def log_on(store, path, flags):
    """Let an open store write its log to another file."""
    return writing_to(store._log, path, flags)


def check_fenced_for_good(store):
    """Close a store that fenced itself: it does not open any more, and says why."""
    store.close()
    assert fences.read_fence(store.path).reason == "io-error"
    with pytest.raises(errors.TabletFenced):
        LoggedStore.open(store.path)


def fenced(store):
    """Commit two rows, one of them settled; then let the log fail."""
    both(store)
    with log_on(store, os.devnull, os.O_RDONLY), pytest.raises(errors.TabletFenced):
        fill(store, "t", {b"failed": b"v"})


def damage_wal(path):
    with (path / wal.WAL_NAME).open("r+b") as file:
        file.seek(100)
        file.write(b"damage")


def fill_log(store):
    """Leave less room in the log than a row of 100 bytes takes."""
    while store._log.fits(bytes(100)):
        fill(store, "full", {b"k": bytes(100)})


@contextlib.contextmanager
def begun_and_finished(store, rows):
    assert store.begin(changing("t", rows))
    yield
    store.finish()


def change(transaction, wanted):
    for table, key, value in wanted:
        if value is None:
            transaction.discard(table, key)
        else:
            transaction.put(table, key, value)


def damage_place(path):
    with MetadataStore(path) as inner:
        inner._environment.change([(inner._tables["wal"], b"place", b"damaged bytes")])
