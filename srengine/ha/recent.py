"""The agreed state's newest changes, in memory above its store: visible at once, durable a little later, many together.

::

    apply ──► recent      changes since the last flush            ┐
              flushing    what a flush is writing, if one runs    │ every read looks here first
              kept        rows that were flushed or read lately   ┘
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
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from srengine.ha.tables import Overlay, Readable, ReplaceableStore, Row, Tables

ROWS_KEPT_MAX: Final = 4096
"""Rows kept for reading; beyond it all are forgotten."""
VALUE_BYTES_KEPT_MAX: Final = 1024
"""A longer value is read from the store again."""

_Rows = dict[tuple[str, bytes], bytes | None]
"""Values by table and key; None: deleted."""


class RecentStore:
    """`tables.ReplaceableStore` over another one. Reads from any thread; one thread at a time changes or flushes."""

    def __init__(self, below: ReplaceableStore) -> None:
        self._below = below
        self._file = threading.RLock()
        """Held by whoever writes the store, or wants it to stand still."""
        self._lock = threading.Lock()
        """Held for moments: the layers change under it."""
        self._recent: _Rows = {}
        self._flushing: _Rows = {}
        self._kept: _Rows = {}
        self._flushes = 0
        """Raised whenever rows have moved to the store: a scan that ran across that begins again."""

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, table: str, key: bytes) -> bytes | None:
        """See `tables.Readable.get`."""
        place = (table, key)
        with self._lock:
            flushes = self._flushes
            for rows in (self._recent, self._flushing, self._kept):
                if place in rows:
                    return rows[place]
        value = self._below.get(table, key)
        with self._lock:
            # NB: what was flushed since may be newer than what was just read.
            if flushes == self._flushes:
                self._keep({place: value})
        return value

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See `tables.Readable.scan`; what is recent is of one moment."""
        while True:
            with self._lock:
                flushes = self._flushes
                changed = {
                    key: value
                    for rows in (self._flushing, self._recent)
                    for (of, key), value in rows.items()
                    if of == table and (start is None or key >= start) and (stop is None or key < stop)
                }
            if not changed:
                yield from self._below.scan(table, start, stop)
                return
            below = [row for row in self._below.scan(table, start, stop) if row[0] not in changed]
            if flushes == self._flushes:
                break
        put = sorted((key, value) for key, value in changed.items() if value is not None)
        yield from heapq.merge(below, put)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Readable]:
        """Yield everything as it is visible now. Changes go on meanwhile, but nothing of them is flushed."""
        with self._file:
            with self._lock:
                recent = dict(self._recent)
            yield Overlay(self._below, recent)

    # --- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Tables]:
        """See `tables.Store.transaction`; what is recent becomes durable before."""
        with self._file:
            self.flush()
            with self._below.transaction() as transaction:
                changes = Overlay(transaction)
                yield changes
                changes.write(transaction)
            with self._lock:
                self._keep(changes.changes)
                self._flushes += 1

    @contextlib.contextmanager
    def show(self) -> Iterator[Tables]:
        """Change rows: visible together at the end of the with-block, durable after `flush`; nothing if it fails."""
        changes = Overlay(self)
        yield changes
        with self._lock:
            self._recent.update(changes.changes)

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
                for (table, key), value in self._flushing.items():
                    if value is None:
                        transaction.delete(table, key)
                    else:
                        transaction.put(table, key, value)
        except BaseException:
            with self._lock:
                self._recent = {**self._flushing, **self._recent}
                self._flushing = {}
            raise
        with self._lock:
            self._keep(self._flushing)
            self._flushing = {}
            self._flushes += 1

    def _keep(self, rows: _Rows) -> None:
        if len(self._kept) + len(rows) > ROWS_KEPT_MAX:
            self._kept = {}
        for place, value in rows.items():
            if value is None or len(value) <= VALUE_BYTES_KEPT_MAX:
                self._kept[place] = value
            else:
                self._kept.pop(place, None)

    def replace_tables(self, tables: Sequence[str], rows: Callable[[], Iterator[Row]], *, bytes_expected: int) -> None:
        """See `tables.ReplaceableStore`; what is recent becomes durable before."""
        with self._file:
            self.flush()
            try:
                self._below.replace_tables(tables, rows, bytes_expected=bytes_expected)
            finally:
                with self._lock:
                    self._kept = {}
                    self._flushes += 1
