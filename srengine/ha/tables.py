"""Tables of the metadata store as this room sees them: what appliers read and write, what they are.

An *applier* is one room's part of the cluster-wide state. It reads nothing but the command and the tables, so every
node comes to the same rows; see `metadata.MetadataMachine`, which calls it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Row = tuple[str, bytes, bytes]
"""(table, key, value)."""
Changes = dict[str, dict[bytes, bytes | None]]
"""Values by table, and there by key; None: deleted."""


class Readable(Protocol):
    """Reads; outside a transaction every read stands alone."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return a value, None without one."""
        ...

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order, ``start`` inclusive, ``stop`` exclusive."""
        ...


class Tables(Readable, Protocol):
    """Reads and writes of one transaction; what an applier sees."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set a value."""
        ...

    def delete(self, table: str, key: bytes) -> bool:
        """Remove a value; return whether there was one."""
        ...


class Store(Readable, Protocol):
    """What this room needs of `srengine.storage.MetadataStore`."""

    def transaction(self) -> AbstractContextManager[Tables]:
        """Durable, all or nothing, when the with-block ends."""
        ...


class Batch(Tables, Protocol):
    """A transaction that takes many changes at once."""

    def change(self, rows: Mapping[str, dict[bytes, bytes | None]]) -> None:
        """Put the values by table and key; delete where there is None. Not to be changed before the end of it all."""
        ...


class ReplaceableStore(Readable, Protocol):
    """The same, for who changes many rows at once and installs a whole state."""

    def transaction(self) -> AbstractContextManager[Batch]:
        """See `Store.transaction`."""
        ...

    def replace_tables(self, tables: Sequence[str], rows: Callable[[], Iterator[Row]], *, bytes_expected: int) -> None:
        """Empty ``tables`` and put the rows, durably, all or nothing."""
        ...


class Applier(Protocol):
    """One room's part of the state."""

    @property
    def kinds(self) -> Sequence[str]:
        """Kinds of commands that it applies."""
        ...

    @property
    def tables(self) -> Sequence[str]:
        """Tables that it owns; they are part of the digest."""
        ...

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        """Change the tables, or raise an `errors.Error` that refuses the command."""
        ...


class Overlay:
    """Changes kept aside over rows: for an applier that may still refuse, and to see what a command would do.

    Between `try_out` and `keep` or `drop` changes are on trial: seen, and gone with `drop`.
    """

    def __init__(self, below: Readable, changes: Changes | None = None) -> None:
        self._below = below
        self.changes: Changes = {} if changes is None else changes
        """What is kept."""
        self._new = self.changes
        """Where changes go: to what is kept, or to what is on trial."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """See `Readable.get`."""
        if table in self._new and key in self._new[table]:
            return self._new[table][key]
        if table in self.changes and key in self.changes[table]:
            return self.changes[table][key]
        return self._below.get(table, key)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """See `Tables.put`."""
        self._set(table, key, value)

    def delete(self, table: str, key: bytes) -> bool:
        """See `Tables.delete`."""
        there = self.get(table, key) is not None
        self._set(table, key, None)
        return there

    def _set(self, table: str, key: bytes, value: bytes | None) -> None:
        if table in self._new:
            self._new[table][key] = value
        else:
            self._new[table] = {key: value}

    def change(self, rows: Mapping[str, dict[bytes, bytes | None]]) -> None:
        """See `Batch.change`."""
        add_changes(self._new, rows)

    def try_out(self) -> None:
        """Begin a trial."""
        assert self._new is self.changes, "a trial in a trial"
        self._new = {}

    def keep(self) -> None:
        """End a trial: its changes are kept."""
        add_changes(self.changes, self._new)
        self._new = self.changes

    def drop(self) -> None:
        """End a trial: its changes are gone."""
        self._new = self.changes

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See `Readable.scan`; rows changed behind the place reached may or may not show."""
        changed = changed_in((self.changes, self._new), table, start, stop)
        below = (row for row in self._below.scan(table, start, stop) if row[0] not in changed)
        yield from heapq.merge(below, put_in(changed))

    def write(self, target: Batch) -> None:
        """Make the kept changes there."""
        target.change(self.changes)


def add_changes(changes: Changes, more: Mapping[str, Mapping[bytes, bytes | None]]) -> None:
    """Make further changes over earlier ones."""
    for table, rows in more.items():
        if table in changes:
            changes[table].update(rows)
        else:
            changes[table] = dict(rows)


def changed_in(
    layers: Sequence[Changes], table: str, start: bytes | None, stop: bytes | None
) -> dict[bytes, bytes | None]:
    """Return what layers, the newest last, change in a range of a table."""
    return {
        key: value
        for layer in layers
        for key, value in layer.get(table, {}).items()
        if (start is None or key >= start) and (stop is None or key < stop)
    }


def put_in(changed: Mapping[bytes, bytes | None]) -> list[tuple[bytes, bytes]]:
    """Return the rows that changes of a table leave, in order of their keys."""
    return sorted((key, value) for key, value in changed.items() if value is not None)
