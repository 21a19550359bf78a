"""The metadata state machine: applies the journal's commands, in order, to named tables of the metadata store.

Each room that keeps cluster-wide state contributes one *applier*. The machine finds the applier by the command's kind,
gives it a transaction, and commits its changes together with the entry's index: so after any crash the state is exactly
that of some index. Whoever has a durable log of its own lets entries show first and flushes later (recent.py). Appliers
read nothing but the command and the tables, hence every node comes to the same state; `MetadataMachine.digest` proves
it.

What happens to a command, in this order:

1. It was applied before (its request id has a kept outcome): that outcome is the answer, nothing changes.
2. Its epoch is not the newest one (epochs.py): `StaleEpoch`, nothing changes, and no outcome is kept. Exempt are what
   makes an epoch (`epochs.FENCE`), the first entry, and changes of membership that consensus itself has put in force
   with the entry: the table of members must follow it.
3. Its applier refuses it by raising one of our errors: nothing of it is kept but the outcome.
4. Else its changes are kept.

In all cases the index is raised. Refusals are as deterministic as changes.

A node that lacks more than the log keeps gets the whole state: `export` writes it to a file, `install` puts it in
place, verified, all or nothing (state.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec

from srengine import errors
from srengine.ha import state
from srengine.ha.epochs import FENCE, newest_epoch
from srengine.ha.journal import Command
from srengine.ha.members import BOOTSTRAP
from srengine.ha.outcomes import OUTCOME_TABLE, Outcome, find_outcome, keep_outcome, refused
from srengine.ha.recent import NotInMemoryError, RecentStore
from srengine.ha.tables import Applier, Overlay, Readable, ReplaceableStore, Row, Store, Tables

__all__ = ["STATE_TABLE", "Applier", "Applying", "MetadataMachine", "Store", "Tables"]

STATE_TABLE: Final = "journal_state"
_APPLIED: Final = b"applied"


class Applying(msgspec.Struct, frozen=True):
    """One entry. ``command``: None for one without meaning here (the first of a term). ``in_force``: consensus has put
    the change of membership in force with the entry.
    """

    index: int
    term: int
    command: Command | None
    in_force: bool = False


class MetadataMachine:
    """The appliers in their order, over one metadata store. Thread-safe: one call changes, others wait."""

    def __init__(self, store: ReplaceableStore, appliers: Sequence[Applier]) -> None:
        self.store = RecentStore(store, whole=[OUTCOME_TABLE])
        """Where the state is read from."""
        self._lock = threading.RLock()
        self._applied: tuple[int, int] | None = None
        """See `applied`; None: not read yet."""
        self._whole: set[object] = set()
        """One for each that reads or replaces the whole state now."""
        self._appliers: dict[str, Applier] = {}
        tables = [OUTCOME_TABLE]
        for applier in appliers:
            for kind in applier.kinds:
                assert kind not in self._appliers, kind
                self._appliers[kind] = applier
            for table in applier.tables:
                assert table not in tables, table
                tables.append(table)
        self._tables = tuple(sorted(tables))

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that make the state, sorted."""
        return self._tables

    @property
    def occupied(self) -> bool:
        """Whether the whole state is replaced now, for which applying waits, or read, for which it waits when more is
        not flushed than may be.
        """
        return bool(self._whole)

    @property
    def applied_index(self) -> int:
        """Index of the last applied entry, 0 before the first."""
        return self.applied[0]

    @property
    def applied(self) -> tuple[int, int]:
        """Index and term of the last applied entry, (0, 0) before the first."""
        known = self._applied
        return known if known is not None else _applied(self.store)

    def apply(self, index: int, term: int, command: Command | None) -> Outcome:
        """Apply the next entry durably; return what it came to."""
        return self.apply_all([Applying(index, term, command)])[0]

    def apply_all(self, entries: Sequence[Applying]) -> list[Outcome]:
        """Apply the next entries, which follow each other, in one durable transaction; return what each came to."""
        return self._apply_guarded(self.store.transaction(), entries)

    def show_all(self, entries: Sequence[Applying]) -> list[Outcome]:
        """Apply the next entries; they are visible when this returns, and durable after the next `flush`."""
        return self._apply_guarded(self.store.show(), entries)

    def show_from_memory(self, entries: Sequence[Applying]) -> bool:
        """`show_all` if that takes neither a look at the store nor a wait for another call; return whether it did."""
        if not entries:
            return True
        if not self._lock.acquire(blocking=False):
            return False
        try:
            with self.store.show(from_memory=True) as rows:
                self._apply_in(rows, entries)
            self._applied = entries[-1].index, entries[-1].term
        except NotInMemoryError:
            return False
        finally:
            self._lock.release()
        return True

    def flush(self) -> bool:
        """Make everything durable that was applied before this call, unless somebody reads the whole state at this
        moment; return whether it is.
        """
        return self.store.flush(wait=False)

    def _apply_guarded(self, target: AbstractContextManager[Overlay], entries: Sequence[Applying]) -> list[Outcome]:
        """Apply over a store that may fail to be read: a fault of this node's disk is no outcome of a command. It takes
        the whole transaction back.
        """
        if not entries:
            return []
        with self._lock:
            try:
                with target as transaction:
                    rows = Overlay(_Guarded(transaction))
                    outcomes = self._apply_in(rows, entries)
                    rows.write(transaction)
            except _LocalFaultError as fault:
                raise fault.error from None
            self._applied = entries[-1].index, entries[-1].term
        return outcomes

    def _apply_in(self, rows: Overlay, entries: Sequence[Applying]) -> list[Outcome]:
        applied, _ = self._applied if self._applied is not None else _applied(rows)
        outcomes = []
        for applied, entry in enumerate(entries, applied + 1):  # noqa: B020  (it is the applied index)
            assert entry.index == applied, (entry.index, applied)
            outcomes.append(self._apply(rows, entry))
        rows.put(STATE_TABLE, _APPLIED, _encode_applied(entries[-1].index, entries[-1].term))
        return outcomes

    def _apply(self, rows: Overlay, entry: Applying) -> Outcome:
        command = entry.command
        if command is None:
            return Outcome(entry.index)
        if command.request:
            earlier = find_outcome(rows, command.request)
            if earlier is not None:
                return earlier
        if not entry.in_force and command.kind not in {FENCE, BOOTSTRAP}:
            newest, _ = newest_epoch(rows)
            if command.epoch != newest:
                return refused(
                    entry.index,
                    errors.StaleEpoch(
                        f"{command.kind} was proposed in epoch {command.epoch}, the newest is {newest}",
                        epoch=command.epoch,
                        newest=newest,
                    ),
                )
        outcome = self._decide(rows, entry.index, command)
        if command.request:
            keep_outcome(rows, command.request, outcome)
        return outcome

    def _decide(self, rows: Overlay, index: int, command: Command) -> Outcome:
        rows.try_out()
        try:
            applier = self._appliers.get(command.kind)
            if applier is None:
                raise errors.UnsupportedFeature(f"nobody applies {command.kind}", kind=command.kind)
            applier.apply(rows, index, command.kind, command.body)
        except (msgspec.MsgspecError, RecursionError) as error:
            rows.drop()
            text = f"the body of {command.kind} cannot be read: {error}"
            return refused(index, errors.InvalidValue(text, kind=command.kind))
        except errors.Error as error:
            rows.drop()
            return refused(index, error)
        rows.keep()
        return Outcome(index)

    # --- the whole state ---------------------------------------------------------------------------------------------

    def described(self) -> tuple[int, bytes]:
        """Return applied index and digest, which belong together. Entries are applied meanwhile, and not flushed."""
        with self._frozen() as rows:
            index, _ = _applied(rows)
            digest = state.Digest(index)
            for table, key, value in self._rows(rows):
                digest.add(table, key, value)
            return index, digest.value()

    def digest(self) -> bytes:
        """Return 16 bytes over all rows of the appliers' tables and the index; equal states have equal digests."""
        return self.described()[1]

    def export(self, path: Path) -> state.Described:
        """Write the state to a new file. Entries are applied meanwhile, and not flushed."""
        with self._frozen() as rows:
            index, term = _applied(rows)
            count = size = 0
            for _, key, value in self._rows(rows):
                count += 1
                size += len(key) + len(value)
            header = state.Header(state.FORMAT, index, term, self._tables, count, size)
            with path.open("xb") as file:
                return state.write_items(header, self._rows(rows), file)

    def install(self, path: Path, *, index: int | None = None, term: int | None = None) -> state.Described:
        """Replace the state by that of a file, durably, all or nothing.

        ``index`` and ``term``: what the file must hold. Raises `SnapshotDamaged`, `UnsupportedFeature` (of another
        version), and `Conflict` for a state that is older than the own one.
        """
        with self._lock, self._occupied(), contextlib.closing(state.read_file(path)) as items:
            header = state.read_header(items, self._tables)
            if index is not None and header.index != index:
                raise errors.SnapshotDamaged(f"the state is that of index {header.index}, not {index}")
            if term is not None and header.term != term:
                raise errors.SnapshotDamaged(f"the state is that of term {header.term}, not {term}")
            if header.index < self.applied_index:
                raise errors.Conflict(f"the state of index {header.index} is older than {self.applied_index} here")
            digest = state.Digest(header.index)

            def rows() -> Iterator[Row]:
                nonlocal digest
                digest = state.Digest(header.index)
                with contextlib.closing(state.read_file(path)) as again:
                    first = state.read_header(again, self._tables)
                    for table, key, value in state.read_rows(first, again):
                        digest.add(table, key, value)
                        yield table, key, value
                yield STATE_TABLE, _APPLIED, _encode_applied(header.index, header.term)

            self._applied = None
            self.store.replace_tables(self._tables, rows, bytes_expected=header.row_bytes)
            self._applied = header.index, header.term
            return state.Described(header.index, header.term, digest.value(), header.rows)

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        token = object()
        self._whole.add(token)
        try:
            yield
        finally:
            self._whole.discard(token)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[Readable]:
        """Yield the state of one index."""
        with contextlib.ExitStack() as stack:
            with self._lock:
                stack.enter_context(self._occupied())
                rows = stack.enter_context(self.store.frozen())
            yield rows

    def _rows(self, rows: Readable) -> Iterator[Row]:
        for table in self._tables:
            for key, value in rows.scan(table):
                yield table, key, value


def _applied(rows: Readable) -> tuple[int, int]:
    stored = rows.get(STATE_TABLE, _APPLIED)
    if stored is None:
        return 0, 0
    return int.from_bytes(stored[:8], "little"), int.from_bytes(stored[8:16], "little")


def _encode_applied(index: int, term: int) -> bytes:
    return index.to_bytes(8, "little") + term.to_bytes(8, "little")


class _LocalFaultError(Exception):
    """The store could not be read: says nothing about the command. Never leaves this module."""

    def __init__(self, error: errors.Error) -> None:
        super().__init__(error.message)
        self.error = error


class _Guarded:
    """Reads of a transaction, whose faults are this node's alone."""

    def __init__(self, below: Tables) -> None:
        self._below = below

    def get(self, table: str, key: bytes) -> bytes | None:
        try:
            return self._below.get(table, key)
        except errors.Error as error:
            raise _LocalFaultError(error) from error

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        try:
            yield from self._below.scan(table, start, stop)
        except errors.Error as error:
            raise _LocalFaultError(error) from error
