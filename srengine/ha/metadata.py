"""The metadata state machine: applies the journal's entries, in order, to named tables of the metadata store.

Each room that keeps cluster-wide state contributes one *applier*. The machine finds the applier by the command's kind,
gives it a transaction, and commits its changes together with the entry's index: so after any crash the state is exactly
that of some index. Appliers read nothing but the command and the tables, hence every node comes to the same state;
`MetadataMachine.digest` proves it.

An applier refuses a command by raising one of our errors: nothing of it is kept, the index is raised all the same, and
the error is what the proposer gets. Refusals are as deterministic as changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

import msgspec

from srengine import errors
from srengine.ha.journal import Entry

STATE_TABLE: Final = "journal_state"
_APPLIED: Final = b"applied"


class Tables(Protocol):
    """Reads and writes of one transaction; what an applier sees."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return a value, None without one."""
        ...

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set a value."""
        ...

    def delete(self, table: str, key: bytes) -> bool:
        """Remove a value; return whether there was one."""
        ...

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order, ``start`` inclusive, ``stop`` exclusive."""
        ...


class Store(Protocol):
    """What this room needs of `srengine.storage.MetadataStore`."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return a value, None without one."""
        ...

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order, ``start`` inclusive, ``stop`` exclusive."""
        ...

    def transaction(self) -> AbstractContextManager[Tables]:
        """Durable, all or nothing, when the with-block ends."""
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


class MetadataMachine:
    """The appliers in their order, over one metadata store."""

    def __init__(self, store: Store, appliers: Sequence[Applier]) -> None:
        self._store = store
        self._appliers: dict[str, Applier] = {}
        self._tables: list[str] = []
        for applier in appliers:
            for kind in applier.kinds:
                assert kind not in self._appliers, kind
                self._appliers[kind] = applier
            for table in applier.tables:
                assert table not in self._tables, table
                self._tables.append(table)

    @property
    def applied_index(self) -> int:
        """Index of the last applied entry, 0 before the first."""
        stored = self._store.get(STATE_TABLE, _APPLIED)
        return 0 if stored is None else int.from_bytes(stored, "little")

    def apply(self, entry: Entry) -> errors.Error | None:
        """Apply the next entry durably; return the refusal, if it was refused."""
        refusal: errors.Error | None = None
        with self._store.transaction() as transaction:
            stored = transaction.get(STATE_TABLE, _APPLIED)
            applied = 0 if stored is None else int.from_bytes(stored, "little")
            assert entry.index == applied + 1, (entry.index, applied)
            aside = _Aside(transaction)
            try:
                applier = self._appliers.get(entry.kind)
                if applier is None:
                    raise errors.UnsupportedFeature(f"nobody applies {entry.kind}", kind=entry.kind)
                applier.apply(aside, entry.index, entry.kind, entry.body)
            except msgspec.MsgspecError as error:
                refusal = errors.InvalidValue(f"the body of {entry.kind} cannot be read: {error}", kind=entry.kind)
            except errors.Error as error:
                refusal = error
            else:
                aside.write()
            transaction.put(STATE_TABLE, _APPLIED, entry.index.to_bytes(8, "little"))
        return refusal

    def digest(self) -> bytes:
        """Return 16 bytes over all rows of the appliers' tables and the index; equal states have equal digests."""
        state = hashlib.blake2b(self.applied_index.to_bytes(8, "little"), digest_size=16)
        for table in sorted(self._tables):
            for key, value in self._store.scan(table):
                for part in (table.encode(), key, value):
                    state.update(len(part).to_bytes(8, "little"))
                    state.update(part)
        return state.digest()


class _Aside:
    """Changes kept aside over a transaction until the applier has finished, so that a refusal leaves nothing."""

    def __init__(self, below: Tables) -> None:
        self._below = below
        self._changes: dict[tuple[str, bytes], bytes | None] = {}

    def get(self, table: str, key: bytes) -> bytes | None:
        if (table, key) in self._changes:
            return self._changes[table, key]
        return self._below.get(table, key)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._changes[table, key] = value

    def delete(self, table: str, key: bytes) -> bool:
        there = self.get(table, key) is not None
        self._changes[table, key] = None
        return there

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        rows: dict[bytes, bytes | None] = dict(self._below.scan(table, start, stop))
        for (changed, key), value in self._changes.items():
            if changed == table and (start is None or key >= start) and (stop is None or key < stop):
                rows[key] = value
        for key in sorted(rows):
            value = rows[key]
            if value is not None:
                yield key, value

    def write(self) -> None:
        for (table, key), value in sorted(self._changes.items(), key=lambda item: item[0]):
            if value is None:
                self._below.delete(table, key)
            else:
                self._below.put(table, key, value)
