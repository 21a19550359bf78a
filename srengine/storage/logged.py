"""A metadata store whose changes are durable in a write-ahead log first, and in LMDB later, many at a time.

::

    transaction ──► one record of the write-ahead log (wal.py): durable, one sync
                └─► pending rows, in memory, which cover what is in LMDB

    settle      ──► pending rows and the next generation of the log, one LMDB transaction: two syncs
                └─► the log begins again, nothing is pending

* **The same promise** as `MetadataStore.transaction` makes: all of the with-block durable at its end, or nothing if it
  raises. Which of the two files has it is nobody's business but ours.
* **Settled** is when the log is full, before it is closed, at every start, and when somebody asks (`settle`). The LMDB
  transaction that holds the rows of a generation also says that it is over: whatever a crash leaves, the rows of a
  generation are in LMDB or are put there again.
* **Reading** sees pending rows over those in LMDB; it never waits for a transaction.
* **Not waiting.** `begin` hands a small transaction to a thread of the kernel that needs no interpreter, and `finish`
  takes its end, when the descriptor `done` can be read: for an event loop that has other things to do meanwhile.
* **Faults** as there: a full disk is `DiskFull` and may be tried again; an input/output error fences the store,
  durably. Damage of the write-ahead log is found when it is opened, and nothing is read then.

For rows that are written one after the other and read rarely: the node-wide log of consensus. One transaction at a
time, others wait; reading is thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from srengine import errors, limits
from srengine._native import wal as kernel
from srengine.storage import fences, files, wal
from srengine.storage.metadata import TABLES_MAX, TRANSACTION_ROWS_MAX, VALUE_BYTES_MAX, MetadataStore
from srengine.storage.metadata_rows import Row, check_values, checked_key, damaged, read_offline, read_row
from srengine.storage.pages import DATA_NAME, PageFile
from srengine.types import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from types import TracebackType

_TABLE: Final = "wal"
_PLACE_KEY: Final = b"place"
_PLACE: Final = struct.Struct("<QIQ")
"""identity, generation, capacity"""
_RECORD_BYTES_MAX: Final = limits.MIB
"""A larger transaction goes to LMDB at once: to write it twice would cost more than the second sync."""

_TABLES_MAX: Final = TABLES_MAX - 2
"""With that of the place and the one of the store itself it may hold no more."""
_PENDING_ROWS_MAX: Final = TRANSACTION_ROWS_MAX // 2

Change = tuple[str, bytes, bytes | None]
"""Table, key and value; None: delete."""
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[tuple[str, bytes, bytes | None]]).decode


class LoggedTransaction:
    """Changes inside `LoggedStore.transaction`."""

    __slots__ = ("_changes", "_is_open", "_named")

    def __init__(self, changes: list[Change], named: Container[str]) -> None:
        """``named``: tables whose names were looked at before."""
        self._changes = changes
        self._named = named
        self._is_open = True

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set the value of ``key`` in ``table``. `InvalidValue` as `metadata.Transaction.put`."""
        self._check(table)
        if len(value) > VALUE_BYTES_MAX:
            raise errors.InvalidValue(f"a value of {len(value)} bytes is longer than {VALUE_BYTES_MAX}")
        self._changes.append((table, checked_key(key), bytes(value)))

    def change(self, changes: Iterable[Change]) -> None:
        """Make changes whose maker answers for it that they are within the bounds of `put` and `discard`."""
        self._check_open()
        self._changes.extend(changes)

    def discard(self, table: str, *keys: bytes) -> None:
        """Delete each of ``keys`` that is there, without looking at its value, which may be damaged."""
        self._check(table)
        self._changes.extend([(table, checked_key(key), None) for key in keys])

    def _check_open(self) -> None:
        if not self._is_open:
            raise errors.Closed("this transaction of the metadata store is over")

    def _check(self, table: str) -> None:
        self._check_open()
        if table not in self._named:
            check_name(table, "table")


class LoggedStore:
    """A metadata store behind a write-ahead log; made by `open`."""

    def __init__(self, store: MetadataStore, log: wal.WriteAheadLog, pipe: tuple[int, int]) -> None:
        self._store = store
        self._log = log
        self._pid = os.getpid()
        self._writing = threading.RLock()
        self._in_transaction = False
        self._begun: tuple[list[Change], bytes] | None = None
        """What the appender works on, and its record; `_writing` is held meanwhile."""
        self._done, self._notify = pipe
        self._appender = kernel.Appender(self._notify)
        self._pending_lock = threading.Lock()
        self._pending: dict[str, dict[bytes, bytes | None]] = {}
        """By table and key; None: deleted."""
        self._pending_rows = 0
        """At least as many as are pending."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        prepare: Callable[[MetadataStore], None] | None = None,
        capacity: int = wal.CAPACITY,
        insecure: bool = False,
        allow_remote_fs: bool = False,
    ) -> Self:
        """Open the store in the directory ``path``, made when it is not there, and put what is in its log in place.

        ``prepare`` is shown what is settled before anything else happens; what it raises keeps everything as it is.
        ``capacity`` is that of a new log. Raises `DiskFull`, and what `MetadataStore` and `wal.WriteAheadLog.open`
        raise.
        """
        with contextlib.ExitStack() as undo:
            store = MetadataStore(path, insecure=insecure, allow_remote_fs=allow_remote_fs)
            undo.callback(store.close)
            if prepare is not None:
                prepare(store)
            log, records = wal.WriteAheadLog.open(path, _place_of(store, capacity), insecure=insecure)
            undo.callback(log.close)
            try:
                pipe = _pipe()
                for end in pipe:
                    undo.callback(os.close, end)
                opened = cls(store, log, pipe)
            except OSError as error:
                raise files.from_os_error(error, f"cannot open {path}") from error
            undo.callback(opened._appender.close)
            opened._adopt(_changes_in(records, log.path))
            opened.settle()
            undo.pop_all()
        return opened

    @property
    def path(self) -> Path:
        """The directory."""
        return self._store.path

    def close(self) -> None:
        """Settle if the disk lets us, and close both files, after the running transaction. Idempotent."""
        if os.getpid() != self._pid:  # everything is the parent's, a lock that somebody held there, too
            return
        with self._writing:
            if not self._store.closed:
                if self._begun is not None:
                    with contextlib.suppress(errors.Error):
                        self.finish()
                with contextlib.suppress(errors.Error):  # then the log has it, or the store is fenced
                    self.settle()
                self._store.close()
                self._appender.close()
                self._log.close()
                os.close(self._done)
                os.close(self._notify)

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, table: str, key: bytes) -> bytes | None:
        """See `MetadataStore.get`."""
        # In this order: a row that is settled meanwhile is found in the store.
        with self._pending_lock:
            rows = self._pending.get(table)
            if rows is not None and key in rows:
                self._store.check_usable()
                return rows[key]
        return self._store.get(table, key)

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See `MetadataStore.scan`; `CorruptionError` for a damaged row."""
        covering = self._covering(table, start, stop)
        if not covering:
            yield from self._store.scan(table, start, stop)
            return
        for row in _covered(self._store.survey(table, start, stop), covering):
            if not row.sound:
                raise damaged(self.path, table, row.key)
            yield row.key, row.value

    def survey(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[Row]:
        """See `MetadataStore.survey`."""
        return _covered(self._store.survey(table, start, stop), self._covering(table, start, stop))

    def _covering(self, table: str, start: bytes | None, stop: bytes | None) -> dict[bytes, bytes | None]:
        with self._pending_lock:
            return {
                key: value
                for key, value in self._pending.get(table, {}).items()
                if (start is None or key >= start) and (stop is None or key < stop)
            }

    def tables(self) -> list[str]:
        """See `MetadataStore.tables`."""
        with self._pending_lock:
            pending = {table for table, rows in self._pending.items() if any(v is not None for v in rows.values())}
        return sorted(({*self._store.tables()} | pending) - {_TABLE})

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[LoggedTransaction]:
        """Change tables: all of the with-block durably at its end, or nothing if it raises.

        Blocks while another thread's transaction runs. Raises as `MetadataStore.transaction`.
        """
        with self._writing:
            if self._in_transaction:
                raise errors.InvalidValue("a transaction of the metadata store is open in this thread already")
            self._store.check_usable()
            changes: list[Change] = []
            transaction = LoggedTransaction(changes, self._pending)
            self._in_transaction = True
            try:
                yield transaction
                if changes:
                    # Again: what the with-block did may have closed the store, or be the child of a fork.
                    self._store.check_usable()
                    self._commit(changes)
            finally:
                transaction._is_open = False
                self._in_transaction = False

    def _commit(self, changes: list[Change]) -> None:
        record = self._record_of(changes)
        if record is None:
            self._settle(changes)
            return
        try:
            self._log.append(record)
        except OSError as error:
            raise self._fault(error) from error
        self._adopt(changes)

    def _record_of(self, changes: list[Change]) -> bytes | None:
        """Return the record of a transaction, or None when it belongs into LMDB at once, with all that is pending.

        NB: whatever goes into the log has to go into LMDB later, so what LMDB could refuse is refused first.
        """
        for table, _, _ in changes:
            if table not in self._pending:
                if not self._may_have_tables(changes):
                    return None
                break
        if self._pending_rows + len(changes) > _PENDING_ROWS_MAX:
            return None
        record = _encode(changes)
        return record if len(record) <= _RECORD_BYTES_MAX and self._log.fits(record) else None

    def _may_have_tables(self, changes: list[Change]) -> bool:
        """Return whether the tables of a transaction are there, or may be made beside those of what is pending."""
        made = {table for table, _, _ in changes} - self._pending.keys()
        stored = self._store.tables()
        made.difference_update(stored)
        return not made or len(stored) + len(self._pending) + len(made) <= _TABLES_MAX

    def _fault(self, error: OSError) -> errors.Error | MemoryError:
        """Return what a failed write of the log is to the caller; the store is fenced if nobody knows what is there."""
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return files.from_os_error(error, "cannot write")
        if error.errno == errno.ENOMEM:
            return MemoryError(str(error))
        text = f"cannot write the write-ahead log: {error}"
        self._store.fence(text)
        return errors.TabletFenced(text, path=str(self.path), reason="io-error")

    @property
    def done(self) -> int:
        """A descriptor that can be read when what was begun has ended; `finish` reads it."""
        return self._done

    def begin(self, changes: list[Change]) -> bool:
        """Begin a transaction of ``changes``, for which `LoggedTransaction.change` holds; return False, and change
        nothing, if it has to be a `transaction` that waits: it is large, the log is full, or another one runs. `finish`
        has to follow, in the same thread.
        """
        if self._in_transaction or not self._writing.acquire(blocking=False):
            return False
        try:
            self._store.check_usable()
            record = self._record_of(changes)
            if record is None:
                return False
            self._log.begin(self._appender, record)
            self._begun = changes, record
            self._in_transaction = True
        finally:
            if self._begun is None:
                self._writing.release()
        return True

    def finish(self) -> None:
        """Wait for the end of what was begun: durable when this returns. Raises as `transaction`."""
        if os.getpid() != self._pid:  # the thread is the parent's, and so is the byte that tells its end
            self._store.check_usable()
        assert self._begun is not None
        (changes, record), self._begun = self._begun, None
        try:
            self._log.finish(self._appender, record)
            self._adopt(changes)
        except OSError as error:
            raise self._fault(error) from error
        finally:
            os.read(self._done, 1)
            self._in_transaction = False
            self._writing.release()

    def _adopt(self, changes: Iterable[Change]) -> None:
        with self._pending_lock:
            pending = self._pending
            for table, key, value in changes:
                if table not in pending:
                    pending[table] = {}
                pending[table][key] = value
                self._pending_rows += 1

    def settle(self) -> None:
        """Put everything that is pending into LMDB, and begin the log again. Raises as `transaction`."""
        with self._writing:
            if self._in_transaction:
                raise errors.InvalidValue("a transaction of the metadata store is open in this thread")
            if self._pending:
                self._settle(())

    def _settle(self, more: Iterable[Change]) -> None:
        rows = dict(self._pending)
        for table, key, value in more:
            if rows.get(table) is self._pending.get(table):
                rows[table] = dict(rows.get(table, {}))
            rows[table][key] = value
        rows[_TABLE] = {_PLACE_KEY: _PLACE.pack(*self._log.next_place())}
        with self._store.transaction() as transaction:
            transaction.change(rows)
        self._log.restart()
        with self._pending_lock:
            self._pending, self._pending_rows = {}, 0


def _place_of(store: MetadataStore, capacity: int) -> wal.Place:
    """Return what the store keeps of its log; a store that has none, new or of an earlier version, gets one."""
    stored = store.get(_TABLE, _PLACE_KEY)
    if stored is not None:
        return _place_in(stored, store.path)
    _check_unused(store.path)
    place = wal.WriteAheadLog.create(store.path, capacity)
    with store.transaction() as transaction:
        transaction.put(_TABLE, _PLACE_KEY, _PLACE.pack(*place))
    return place


def _check_unused(path: Path) -> None:
    if not wal.is_unused(path):
        raise errors.CorruptionError(
            f"{path} has a write-ahead log and has lost what belongs to it", file=str(path / wal.WAL_NAME)
        )


def _pipe() -> tuple[int, int]:
    """Return two ends of a pipe. Who writes never waits: at most one byte is in it. Who reads knows that one comes: it
    is written right behind what makes `finish` go on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    return reader, writer


def _covered(stored: Iterable[Row], covering: dict[bytes, bytes | None]) -> Iterator[Row]:
    """Merge rows in order of their keys; what covers them wins."""
    ahead = sorted(covering)
    at = 0
    for row in stored:
        while at < len(ahead) and ahead[at] < row.key:
            yield from _row(ahead[at], covering)
            at += 1
        if row.key not in covering:
            yield row
    for key in ahead[at:]:
        yield from _row(key, covering)


def _row(key: bytes, covering: dict[bytes, bytes | None]) -> Iterator[Row]:
    value = covering[key]
    if value is not None:
        yield Row(key, value, sound=True)


def _place_in(stored: bytes, path: Path) -> wal.Place:
    try:
        place = wal.Place(*_PLACE.unpack(stored))
    except struct.error as error:
        raise errors.CorruptionError(f"the place of the write-ahead log of {path} is none", path=str(path)) from error
    if not 0 < place.capacity <= wal.CAPACITY_MAX or place.capacity % wal.SECTOR_BYTES:
        raise errors.CorruptionError(f"the write-ahead log of {path} cannot have {place.capacity} bytes")
    return place


def _changes_in(records: Iterable[bytes], path: Path) -> Iterator[Change]:
    for record in records:
        try:
            yield from _decode(record)
        except msgspec.MsgspecError as error:
            raise errors.CorruptionError(f"a record of {path} that is none: {error}", file=str(path)) from error


class OfflineRows:
    """Tables of a logged store that nobody has open, read without LMDB: rows of the log over those of the file.

    Raises `NotFound`, and `CorruptionError` when the write-ahead log is damaged. A context manager.
    """

    def __init__(self, path: Path) -> None:
        stored = dict(read_offline(path, _TABLE)).get(_PLACE_KEY)
        self._covering: dict[str, dict[bytes, bytes | None]] = {}
        if stored is None:
            _check_unused(path)
        else:
            records = wal.read_offline(path, _place_in(stored, path))
            for table, key, value in _changes_in(records, path / wal.WAL_NAME):
                self._covering.setdefault(table, {})[key] = value
        self._file = PageFile(path / DATA_NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def survey(self, table: str) -> Iterator[Row]:
        """Yield the rows of a table in order, sound or not."""
        stored = self._file.items(table) if table in self._file.tables() else ()
        return _covered((read_row(table, key, value) for key, value in stored), self._covering.get(table, {}))


def recover_logged(path: Path) -> None:
    """`recover_metadata` for a logged store: the write-ahead log has to prove whole, too."""
    if fences.read_fence(path) is None:
        return

    def verify() -> None:
        check_values(path / DATA_NAME)
        OfflineRows(path).close()

    # A store that is older than the write-ahead log has none. One that lost it does not pass `verify`.
    beside = (wal.WAL_NAME,) if (path / wal.WAL_NAME).exists() else ()
    fences.prove(path, verify, beside=beside)
