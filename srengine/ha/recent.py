"""The agreed state's newest changes, in memory above its store: visible at once, durable a little later, many together.

::

    apply ──► recent      changes since the last flush            ┐
              flushing    what a flush is writing, if one runs    │ every read looks here first
              kept        rows that were flushed or read lately   │
              whole       all rows of tables that are small and   ┘
                          asked with every entry
    flush ──► store       one durable transaction for all of them

The journal's log is durable before an entry is applied, so nothing can be lost here: after a crash the entries behind
the last flush are applied again. An acknowledged write waits for the log alone, and a hundred of them cost the
state's file one transaction.

A flush writes all of ``recent`` as of one index, or nothing, so the file always holds the state of some index. Whoever
reads the whole state (a digest, a copy) has it stand still by keeping flushes off; entries are applied meanwhile.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

from srengine import errors
from srengine.ha.tables import Changes, Overlay, Readable, ReplaceableStore, Row, add_changes, changed_in, put_in

ROWS_KEPT_MAX: Final = 4096
"""Rows kept for reading; beyond it all are forgotten."""
VALUE_BYTES_KEPT_MAX: Final = 1024
"""A longer value is read from the store again."""

_NO_ROWS: Final[dict[bytes, bytes | None]] = {}
_LONG: Final = bytes(VALUE_BYTES_KEPT_MAX + 1)
"""Stands for a value that is too long to be kept."""


class _Told(NamedTuple):
    """Rows of a table as they are kept: values, keys that are not there, and keys whose values are too long."""

    table: str
    present: dict[bytes, bytes]
    absent: list[bytes]
    long: list[bytes]


class RecentStore:
    """`tables.ReplaceableStore` over another one. Reads from any thread; one thread at a time changes rows, and one
    flushes, beside it or not.
    """

    def __init__(self, below: ReplaceableStore, *, whole: Sequence[str] = ()) -> None:
        """``whole``: tables that are held in memory as a whole, so that to find nothing there takes no look at the
        store.
        """
        self._below = below
        self._file = threading.RLock()
        """Held by whoever writes the store, or wants it to stand still."""
        self._lock = threading.Lock()
        """Held for moments: the layers change under it."""
        self._recent: Changes = {}
        self._flushing: Changes = {}
        self._kept: Changes = {}
        self._kept_rows = 0
        """At least as many as are kept."""
        self._whole: dict[str, dict[bytes, bytes] | None] = dict.fromkeys(whole)
        """None: not read yet."""
        self._flushes = 0
        """Raised whenever rows have moved to the store: a scan that ran across that begins again."""

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, table: str, key: bytes) -> bytes | None:
        """See `tables.Readable.get`."""
        with self._lock:
            flushes = self._flushes
            found, value = self._find(table, key)
        if found:
            return value
        if table in self._whole and self._whole[table] is None:
            self._read_whole(table)
        value = self._below.get(table, key)
        with self._lock:
            # NB: what was flushed since may be newer than what was just read.
            if flushes == self._flushes:
                self._keep(_told({table: {key: value}}))
        return value

    def _find(self, table: str, key: bytes) -> tuple[bool, bytes | None]:
        """Return whether a row, or that there is none, is known without the store, and its value; under the lock."""
        if table in self._recent and key in self._recent[table]:
            return True, self._recent[table][key]
        if table in self._flushing and key in self._flushing[table]:
            return True, self._flushing[table][key]
        if table not in self._whole:
            kept = self._kept.get(table, _NO_ROWS)
            return key in kept, kept.get(key)
        rows = self._whole[table]
        value = None if rows is None else rows.get(key)
        return rows is not None and value is not _LONG, value

    def _read_whole(self, table: str) -> None:
        with self._lock:
            flushes = self._flushes
        try:
            rows = {key: _kept_as(value) for key, value in self._below.scan(table)}
        except errors.CorruptionError:
            return  # the damaged row is met by whoever needs it
        with self._lock:
            if flushes == self._flushes:
                self._whole[table] = rows

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See `tables.Readable.scan`; what is recent is of one moment."""
        while True:
            with self._lock:
                flushes = self._flushes
                changed = changed_in((self._flushing, self._recent), table, start, stop)
            if not changed:
                yield from self._below.scan(table, start, stop)
                return
            below = [row for row in self._below.scan(table, start, stop) if row[0] not in changed]
            if flushes == self._flushes:
                break
        yield from heapq.merge(below, put_in(changed))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Readable]:
        """Yield everything as it is visible now. Changes go on meanwhile, but nothing of them is flushed."""
        with self._file:
            with self._lock:
                recent = {table: dict(rows) for table, rows in self._recent.items()}
            yield Overlay(self._below, recent)

    # --- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Overlay]:
        """See `tables.Store.transaction`; what is recent becomes durable before."""
        with self._file:
            self.flush()
            with self._below.transaction() as transaction:
                changes = Overlay(transaction)
                yield changes
                changes.write(transaction)
            told = _told(changes.changes)
            with self._lock:
                self._keep(told)
                self._flushes += 1

    def show(self, *, from_memory: bool = False) -> AbstractContextManager[Overlay]:
        """Change rows: visible together at the end of the with-block, durable after `flush`; nothing if it fails.

        ``from_memory``: a read that would take a look at the store is `NotInMemoryError` instead.
        """
        return _Showing(self, Overlay(_Memory(self) if from_memory else self))

    def flush(self, *, wait: bool = True) -> bool:
        """Make everything that is visible durable; return whether it is. Without ``wait`` nothing happens while
        somebody reads what is `frozen`. Raises as the store's transaction; then all of it stays recent.
        """
        if not self._file.acquire(blocking=wait):
            return False
        try:
            self._flush()
        finally:
            self._file.release()
        return True

    def _flush(self) -> None:
        with self._lock:
            if not self._recent:
                return
            self._flushing, self._recent = self._recent, {}
        try:
            with self._below.transaction() as transaction:
                transaction.change(self._flushing)
        except BaseException:
            with self._lock:
                newer, self._recent = self._recent, self._flushing
                add_changes(self._recent, newer)
                self._flushing = {}
            raise
        told = _told(self._flushing)
        with self._lock:
            self._keep(told)
            self._flushing = {}
            self._flushes += 1

    def _keep(self, told: Sequence[_Told]) -> None:
        """Keep rows for reading that the store has now; under the lock."""
        for table, present, absent, long in told:
            if table not in self._whole:
                self._keep_some(table, present, absent, long)
                continue
            whole = self._whole[table]
            if whole is not None:
                whole.update(present)
                whole.update(dict.fromkeys(long, _LONG))
                for key in absent:
                    whole.pop(key, None)

    def _keep_some(
        self, table: str, present: Mapping[bytes, bytes], absent: Sequence[bytes], long: Sequence[bytes]
    ) -> None:
        count = len(present) + len(absent)
        if self._kept_rows + count > ROWS_KEPT_MAX:
            self._kept, self._kept_rows = {}, 0
        kept = self._kept.setdefault(table, {})
        self._kept_rows += count
        kept.update(present)
        kept.update(dict.fromkeys(absent))
        for key in long:
            kept.pop(key, None)

    def replace_tables(self, tables: Sequence[str], rows: Callable[[], Iterator[Row]], *, bytes_expected: int) -> None:
        """See `tables.ReplaceableStore`; what is recent becomes durable before."""
        with self._file:
            self.flush()
            try:
                self._below.replace_tables(tables, rows, bytes_expected=bytes_expected)
            finally:
                with self._lock:
                    self._kept, self._kept_rows = {}, 0
                    self._whole = dict.fromkeys(self._whole)
                    self._flushes += 1


class _Showing:
    """See `RecentStore.show`."""

    def __init__(self, store: RecentStore, overlay: Overlay) -> None:
        self._store = store
        self._overlay = overlay

    def __enter__(self) -> Overlay:
        return self._overlay

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._store._lock:
                add_changes(self._store._recent, self._overlay.changes)


class NotInMemoryError(Exception):
    """The store would have to be asked, which may take as long as a disk does."""


class _Memory:
    """Reads of a `RecentStore`, by whoever changes it, that never wait: neither for the store below nor for its lock.

    The layers are those of the beginning. A flush that goes on or ends meanwhile moves rows to deeper ones and leaves
    these as they are; what it adds to the rows that are kept is covered by them.
    """

    def __init__(self, store: RecentStore) -> None:
        with store._lock:
            self._recent, self._flushing, self._kept = store._recent, store._flushing, store._kept
            self._whole = store._whole

    def get(self, table: str, key: bytes) -> bytes | None:
        if table in self._recent and key in self._recent[table]:
            return self._recent[table][key]
        if table in self._flushing and key in self._flushing[table]:
            return self._flushing[table][key]
        if table in self._whole:
            rows = self._whole[table]
            value = _LONG if rows is None else rows.get(key)
            if value is _LONG:
                raise NotInMemoryError
            return value
        if table not in self._kept or key not in self._kept[table]:
            raise NotInMemoryError
        return self._kept[table][key]

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        del table, start, stop
        raise NotInMemoryError


def _told(changed: Changes) -> list[_Told]:
    """Return what rows that the store has now tell whoever keeps them; made before the lock is taken."""
    return [
        _Told(
            table,
            {key: value for key, value in rows.items() if value is not None and len(value) <= VALUE_BYTES_KEPT_MAX},
            [key for key, value in rows.items() if value is None],
            [key for key, value in rows.items() if value is not None and len(value) > VALUE_BYTES_KEPT_MAX],
        )
        for table, rows in changed.items()
    ]


def _kept_as(value: bytes) -> bytes:
    return value if len(value) <= VALUE_BYTES_KEPT_MAX else _LONG
