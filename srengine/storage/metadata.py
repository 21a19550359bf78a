"""The metadata store: named tables of a node (catalog, boot numbers, the log) in an LMDB environment of their own.

Through the kernel `rows`, never through the tablets' one: two copies of LMDB must not meet on one environment. One
store, one directory::

    meta/                0700
      data.mdb           one named LMDB database for each table; value = bytes + XXH3-64 of (table, key, bytes)
      lock.mdb

* **Durable.** When the with-block of `MetadataStore.transaction` ends without an exception, everything in it is on the
  disk, and all of it or nothing. An exception inside takes all of it back.
* **Checked.** Each value carries a checksum over table, key and value, tested at every read; what does not match is
  `CorruptionError` naming table and key.
* **Growing.** The memory map is doubled between transactions, and inside one by replaying what it did so far; readers
  never see it, because every read is one short LMDB transaction of at most `SCAN_ROWS` rows. LMDB ends readers that are
  open when its map moves, so none may be.
* **In one piece.** A transaction that only puts and discards begins, changes and commits in one call that lets the
  interpreter go: the log of consensus is written beside a busy event loop. Who reads in it has it begun at once.
* **Honest about faults.** A full disk is `DiskFull`; reading goes on, and writing when space returns. An
  input/output error while writing fences the store (`TabletFenced`), durably: see fences.py.

Thread-safe: one transaction at a time, others wait; reads outside of it never wait for one. A forked child gets
`ForkedEnvironment`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, Self

from srengine import errors, limits, types
from srengine._native import rows as kernel
from srengine._native.rows import RowsError
from srengine.storage import fences, files, pages
from srengine.storage.metadata_rows import Row, checked_key, damaged, is_sealed, read_row, value_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

FORMAT: Final = b"1"
TABLES_MAX: Final = 64
SCAN_ROWS: Final = 256
"""Rows read in one LMDB transaction by a scan, so that no reader holds old pages or the map for long."""
SCAN_BYTES: Final = 8 * limits.MIB
"""Or fewer, when together they are larger: what a scan holds in memory."""
VALUE_BYTES_MAX: Final = limits.ENTRY_BYTES_MAX
MAP_BYTES_MIN: Final = 16 * limits.MIB
MAP_BYTES_MAX: Final = 1 << 40
TRANSACTION_ROWS_MAX: Final = 1_000_000

_FULL_BYTES: Final = 256 * limits.KIB
"""Less free space than this after a write that was cut short: the disk is full, not broken."""
_OWN_TABLE: Final = "srengine"
_FORMAT_KEY: Final = b"format"


class MetadataStore:
    """Named tables in the directory ``path``, which is made (its parent must exist) unless ``create`` is False.

    ``map_bytes`` is the initial memory map (tests use small ones). Raises `NotFound`, `UnsafePermissions`,
    `UnsupportedFileSystem`, `TruncatedTablet`, `CorruptionError`, `ForeignData`, `TabletFenced` (a fault earlier).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        map_bytes: int = MAP_BYTES_MIN,
        insecure: bool = False,
        allow_remote_fs: bool = False,
    ) -> None:
        self.path = Path(path)
        self.closed = False
        self._pid = os.getpid()
        self._insecure = insecure
        self._write_lock = threading.RLock()
        self._transaction: Transaction | None = None
        self._reads = threading.Condition()
        self._readers = 0
        self._moving = False
        self._fault: str | None = None
        self._tables: dict[str, int] = {}
        files.check_local_file_system(self.path.parent, allow_remote_fs=allow_remote_fs)
        if create and not self.path.exists():
            _build(self.path, map_bytes, insecure=insecure)
        files.check_private(self.path, directory=True, insecure=insecure)
        fences.refuse_if_fenced(self.path, self.path.name)
        meta = pages.check_before_open(self.path / pages.DATA_NAME)
        files.check_private(self.path / pages.DATA_NAME, directory=False, insecure=insecure)
        self._map_bytes = _map_bytes_for(max(map_bytes, meta.bytes_claimed), meta.page_bytes)
        self._environment = _open_environment(self.path, self._map_bytes)
        try:
            self._open_tables()
            self._check_format()
        except BaseException:
            self._environment.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment after the running transaction; a second call does nothing."""
        if os.getpid() != self._pid:
            self.closed = True
            return
        with self._write_lock, self._all_readers_gone():
            if not self.closed:
                self.closed = True
                self._environment.close()

    def check_usable(self) -> None:
        """Raise `ForkedEnvironment`, `Closed` or `TabletFenced` when nothing may be done here."""
        if os.getpid() != self._pid:
            raise errors.ForkedEnvironment(
                f"{self.path} was opened by process {self._pid} and this is its child; open it again here",
                path=str(self.path),
            )
        if self.closed:
            raise errors.Closed(f"the metadata store {self.path} is closed", path=str(self.path))
        if self._fault is not None:
            raise errors.TabletFenced(
                f"the metadata store {self.path} is fenced after a fault: {self._fault}",
                path=str(self.path),
                reason="io-error",
            )

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return the committed value, or None; an unknown table is an empty one."""
        # Not by way of `_reading`: a context manager written in Python costs as much as the lookup.
        self._begin_reading()
        try:
            return self._get(self._environment, self._tables.get(table), table, key)
        except RowsError as error:
            self._raise_ours(error, "cannot read")
        finally:
            self._end_reading()

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield committed (key, value) with ``start`` <= key < ``stop`` in order of the keys' bytes.

        Not one point in time: rows that other transactions commit meanwhile may show up behind the place reached.
        """
        position, first = start, True
        while True:
            with self._reading():
                handle = self._tables.get(table)
                rows, done = self._rows(self._environment, handle, table, position, stop, after=not first)
            yield from rows
            if done:
                return
            position, first = rows[-1][0], False

    def survey(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[Row]:
        """Yield what `scan` yields, and damaged rows as well instead of raising: for whoever can do without them."""
        position, first = start, True
        while True:
            with self._reading():
                found, done = _stored_rows(self._environment, self._tables.get(table), position, stop, after=not first)
            for key, stored in found:
                yield read_row(table, key, stored)
            if done:
                return
            position, first = found[-1][0], False

    def tables(self) -> list[str]:
        """Return the names of the tables that were ever written to, sorted."""
        self.check_usable()
        return sorted(name for name in self._tables if name != _OWN_TABLE)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._begin_reading()
        try:
            with self._translated("cannot read"):
                yield
        finally:
            self._end_reading()

    def _begin_reading(self) -> None:
        self.check_usable()
        with self._reads:
            while self._moving:
                self._reads.wait()
            self.check_usable()
            self._readers += 1

    def _end_reading(self) -> None:
        with self._reads:
            self._readers -= 1
            if self._moving:
                self._reads.notify_all()

    @contextlib.contextmanager
    def _all_readers_gone(self) -> Iterator[None]:
        with self._reads:
            self._moving = True
            while self._readers:
                self._reads.wait()
        try:
            yield
        finally:
            with self._reads:
                self._moving = False
                self._reads.notify_all()

    def _get(self, source: _Source, handle: int | None, table: str, key: bytes) -> bytes | None:
        if handle is None:
            return None
        stored = source.get(handle, checked_key(key))
        return None if stored is None else self._unsealed(table, key, stored)

    def _rows(
        self, source: _Source, handle: int | None, table: str, start: bytes | None, stop: bytes | None, *, after: bool
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        found, done = _stored_rows(source, handle, start, stop, after=after)
        return [(key, self._unsealed(table, key, stored)) for key, stored in found], done

    def _unsealed(self, table: str, key: bytes, stored: bytes) -> bytes:
        if not is_sealed(table, key, stored):
            raise damaged(self.path, table, key)
        return value_of(stored)

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change tables: all of the with-block durably at its end, or nothing if it raises.

        Blocks while another thread's transaction runs. Raises `DiskFull`, `QuotaExceeded` (the map's bound),
        `TabletFenced` (input/output error; nothing was changed), `InvalidValue` for a nested one, and MemoryError
        when there is no address space for a larger map.
        """
        with self._write_lock:
            self.check_usable()
            if self._transaction is not None:
                raise errors.InvalidValue("a transaction of the metadata store is open in this thread already")
            self._maybe_grow()
            self._transaction = transaction = Transaction(self)
            try:
                yield transaction
                transaction._commit()
            finally:
                transaction._end()
                self._transaction = None

    def replace_tables(
        self, tables: Sequence[str], rows: Callable[[], Iterator[tuple[str, bytes, bytes]]], *, bytes_expected: int
    ) -> None:
        """Empty ``tables`` and put ``rows()`` (table, key, value) in one durable transaction; nothing if it raises.

        For many rows: they are not kept in memory. ``rows`` is called again when the map has to grow, and must then
        yield the same; ``bytes_expected`` (keys and values) makes that rare. It may put rows into other tables, too.
        Raises as `transaction`, and whatever ``rows`` raises.
        """
        with self._write_lock:
            self.check_usable()
            if self._transaction is not None:
                raise errors.InvalidValue("a transaction of the metadata store is open in this thread already")
            used = self._used_bytes()
            if used + 3 * bytes_expected > self._map_bytes:
                self._grow(used + 3 * bytes_expected)
            while True:
                try:
                    self._replace_once(tables, rows())
                except _MapFullError:
                    self._grow(self._map_bytes * 2)
                else:
                    return

    def _replace_once(self, tables: Sequence[str], rows: Iterator[tuple[str, bytes, bytes]]) -> None:
        with self._translated("cannot write"):
            writer = self._environment.begin()
        made: dict[str, int] = {}
        try:
            with self._translated("cannot write"), _map_full():
                for table in tables:
                    if table in self._tables:
                        writer.empty(self._tables[table])
            handles = dict(self._tables)
            waiting: list[_Change] = []
            size = 0
            for table, key, value in rows:
                types.check_name(table, "table")
                with self._translated("cannot write"), _map_full():
                    if table not in handles:
                        handles[table] = made[table] = self._make_table(writer, table, len(made))
                    waiting.append((table, checked_key(key), _checked_value(value)))
                    size += len(value)
                    if len(waiting) >= SCAN_ROWS or size >= SCAN_BYTES:
                        writer.change(waiting, handles)
                        waiting, size = [], 0
            with self._translated("cannot commit to"), _map_full():
                writer.change(waiting, handles)
                writer.commit()
            self._tables.update(made)
        finally:
            if os.getpid() == self._pid:
                writer.abort()

    def _make_table(self, writer: kernel.Writer, table: str, made: int) -> int:
        if len(self._tables) + made >= TABLES_MAX:
            raise errors.InvalidValue(f"a metadata store has at most {TABLES_MAX} tables")
        return writer.open_table(table.encode())

    def _used_bytes(self) -> int:
        page_bytes, pages_used = self._environment.sizes()
        return page_bytes * pages_used

    def _maybe_grow(self) -> bool:
        """Double the map once three quarters are used, so that a transaction rarely meets its end."""
        if self._used_bytes() <= self._map_bytes * 3 // 4:
            return False
        self._grow(self._map_bytes * 2)
        return True

    def _grow(self, wanted: int) -> None:
        if self._map_bytes >= MAP_BYTES_MAX:
            raise errors.QuotaExceeded(f"the metadata store {self.path} has reached {MAP_BYTES_MAX} bytes")
        size = min(_map_bytes_for(wanted, self._environment.sizes()[0]), MAP_BYTES_MAX)
        _check_address_space(size)
        with self._all_readers_gone(), self._translated("cannot grow"):
            self._environment.set_map_bytes(size)
            self._map_bytes = size

    # --- set-up and faults -------------------------------------------------------------------------------------------

    def _open_tables(self) -> None:
        with self._translated("cannot open"):
            for name, handle in self._environment.tables().items():
                self._tables[name.decode("ascii", "backslashreplace")] = handle

    def _check_format(self) -> None:
        with self._reading():
            found = self._get(self._environment, self._tables.get(_OWN_TABLE), _OWN_TABLE, _FORMAT_KEY)
        if found is None:
            raise errors.ForeignData(f"{self.path} is no metadata store of srengine", path=str(self.path))
        if found != FORMAT:
            raise errors.UnsupportedFeature(
                f"{self.path} has format {found[:16]!r}; this version reads {FORMAT!r}", path=str(self.path)
            )

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RowsError as error:
            self._raise_ours(error, doing)

    def _raise_ours(self, error: RowsError, doing: str) -> NoReturn:
        text = f"{doing} the metadata store {self.path}: {error}"
        facts = {"path": str(self.path)}
        code = error.code
        if code in {errno.ENOSPC, errno.EDQUOT}:
            raise errors.DiskFull(text, **facts) from error
        if code == kernel.MAP_FULL:
            raise errors.QuotaExceeded(text, **facts) from error
        if code in kernel.DAMAGED:
            raise errors.CorruptionError(text, file=str(self.path / pages.DATA_NAME)) from error
        if code in kernel.STRANGE:
            raise errors.ForeignData(text, **facts) from error
        if code in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise errors.Denied(text, **facts) from error
        if code == errno.ENOMEM:
            raise MemoryError(text) from error
        if code == errno.EIO and self._disk_is_full():
            # LMDB says it for a write that was cut short by a full disk, too.
            raise errors.DiskFull(text, **facts) from error
        if code in {errno.EIO, kernel.PANIC}:
            self.fence(text)
            raise errors.TabletFenced(text, reason="io-error", **facts) from error
        raise errors.Error(text, **facts) from error

    def _disk_is_full(self) -> bool:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize < _FULL_BYTES

    def fence(self, text: str) -> None:
        """Refuse everything from now on, durably: the disk has failed."""
        self._fault = text
        with contextlib.suppress(errors.Error):
            # The disk is failing: if not even the mark can be written, this process still refuses.
            fences.set_fence(self.path, "io-error", text)


_Change = tuple[str, bytes, bytes | None] | tuple[str, dict[bytes, bytes | None]]
"""Table, key, value, or many of a table; None: the key is deleted."""
_Page = tuple[list[tuple[bytes, bytes]], bool]
"""Rows, and whether they are the last."""


class _Source(Protocol):
    """Committed rows, or a transaction's."""

    def get(self, table: int, key: bytes, /) -> bytes | None: ...

    def page(
        self,
        table: int,
        start: bytes | None,
        after: bool,  # noqa: FBT001  (the kernel's)
        stop: bytes | None,
        rows_max: int,
        bytes_max: int,
        /,
    ) -> _Page: ...


class _MapFullError(Exception):
    """The memory map has no room left."""


@contextlib.contextmanager
def _map_full() -> Iterator[None]:
    try:
        yield
    except RowsError as error:
        if error.code != kernel.MAP_FULL:
            raise
        raise _MapFullError from error


class Transaction:
    """Reads and changes inside `MetadataStore.transaction`; reads see the transaction's own changes."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._done: list[_Change] = []
        """All changes so far."""
        self._count = 0
        """Rows in them."""
        self._written = 0
        """How many of them the writer has."""
        self._writer: kernel.Writer | None = None
        """None until somebody reads, or a table is new."""
        self._new_tables: dict[str, int] = {}
        self._is_open = True

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return the value as this transaction sees it, or None."""
        self._check_open()
        writer = self._catch_up()
        try:
            return self._store._get(writer, self._handle(table), table, key)
        except RowsError as error:
            self._store._raise_ours(error, "cannot read")

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set the value of ``key`` in ``table``, which is made when it is new.

        Keys are 1 to 511 bytes, values up to `VALUE_BYTES_MAX`. Raises `InvalidValue`.
        """
        self._check_open()
        self._remember(table, checked_key(key), _checked_value(value))

    def delete(self, table: str, key: bytes) -> bool:
        """Delete ``key``; return whether it was there."""
        if self.get(table, key) is None:
            return False
        self._remember(table, bytes(key), None)
        return True

    def discard(self, table: str, key: bytes) -> None:
        """Delete ``key`` if it is there, without looking at its value, which may be damaged."""
        self._check_open()
        self._remember(table, checked_key(key), None)

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) with ``start`` <= key < ``stop`` in order; rows changed behind the place reached show."""
        position, first = start, True
        while True:
            self._check_open()
            writer = self._catch_up()
            with self._store._translated("cannot read"):
                rows, done = self._store._rows(writer, self._handle(table), table, position, stop, after=not first)
            yield from rows
            if done:
                return
            position, first = rows[-1][0], False

    def delete_range(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> int:
        """Delete every key with ``start`` <= key < ``stop``; return how many there were."""
        count = 0
        for key, _ in self.scan(table, start, stop):
            self._remember(table, key, None)
            count += 1
        return count

    def change(self, rows: Mapping[str, dict[bytes, bytes | None]]) -> None:
        """`put` each value, by table and key, `discard` where there is None: all of them, or `InvalidValue` and
        none. For many rows: in whatever order they come, they are written in that of their keys. The dictionaries stay
        as they are until the end of the transaction.
        """
        self._check_open()
        many: list[_Change] = []
        count = 0
        # NB: no loops of our own over rows. They would be most of what many cost, and an event loop waits meanwhile.
        for table, changed in rows.items():
            if not changed:
                continue
            if min(map(len, changed)) < limits.KEY_BYTES_MIN or max(map(len, changed)) > limits.KEY_BYTES_MAX:
                checked_key(min(changed, key=len))
                checked_key(max(changed, key=len))
            if max(map(len, filter(None, changed.values())), default=0) > VALUE_BYTES_MAX:
                _checked_value(max(filter(None, changed.values()), key=len))
            if self._open_table(table, is_put=any(value is not None for value in changed.values())):
                many.append((table, changed))
                count += len(changed)
        self._check_room(count)
        self._done += many

    def _check_room(self, count: int) -> None:
        if self._count + count > TRANSACTION_ROWS_MAX:
            raise errors.InvalidValue(f"a transaction changes at most {TRANSACTION_ROWS_MAX} rows")
        self._count += count

    def _check_open(self) -> None:
        self._store.check_usable()
        if not self._is_open:
            raise errors.Closed("this transaction of the metadata store is over")

    def _remember(self, table: str, key: bytes, value: bytes | None) -> None:
        if self._open_table(table, is_put=value is not None):
            self._check_room(1)
            self._done.append((table, key, value))

    def _open_table(self, table: str, *, is_put: bool) -> bool:
        """Make a table for the sake of what ``is_put`` there; return whether there is one."""
        if self._handle(table) is None:
            types.check_name(table, "table")
            if not is_put:
                return False
            self._make_table(table)
        return True

    def _handle(self, table: str) -> int | None:
        # A table made by this transaction is no other reader's before it is committed.
        return self._store._tables.get(table, self._new_tables.get(table))

    def _make_table(self, table: str) -> None:
        while True:
            try:
                with self._store._translated("cannot write"):
                    handle = self._store._make_table(self._begun(), table, len(self._new_tables))
            except errors.QuotaExceeded:
                self._restart_in_larger_map()
            else:
                self._new_tables[table] = handle
                return

    def _begun(self) -> kernel.Writer:
        if self._writer is None:
            with self._store._translated("cannot write"):
                self._writer = self._store._environment.begin()
            # Tables that an earlier writer made were taken back with it.
            names, self._new_tables = list(self._new_tables), {}
            for name in names:
                self._make_table(name)
        return self._writer

    def _catch_up(self) -> kernel.Writer:
        """Return the writer with all changes in it; when the map is full, grow it and begin again."""
        while True:
            writer = self._begun()
            waiting = self._done[self._written :]
            try:
                with self._store._translated("cannot write"):
                    writer.change(waiting, self._handles())
            except errors.QuotaExceeded:
                self._restart_in_larger_map()
            else:
                self._written = len(self._done)
                return writer

    def _handles(self) -> dict[str, int]:
        return {**self._new_tables, **self._store._tables}

    def _restart_in_larger_map(self) -> None:
        self._abort()
        waiting = sum(map(_bytes_of, self._done))
        self._store._grow(self._store._map_bytes * 2 + 2 * waiting)

    def _commit(self) -> None:
        while self._done or self._new_tables:
            try:
                with self._store._translated("cannot commit to"):
                    if self._writer is None and not self._new_tables:
                        self._store._environment.change(self._done, self._handles())
                    else:
                        writer = self._catch_up()
                        self._writer, self._written = None, 0
                        writer.commit()
            except errors.QuotaExceeded:
                # The commit itself needs pages for the list of free pages.
                self._restart_in_larger_map()
            else:
                break
        self._abort()
        self._is_open = False
        self._store._tables.update(self._new_tables)

    def _abort(self) -> None:
        writer, self._writer, self._written = self._writer, None, 0
        if writer is not None:
            writer.abort()

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            if os.getpid() == self._store._pid:
                self._abort()


def _bytes_of(change: _Change) -> int:
    if len(change) == 3:
        return len(change[1]) + len(change[2] or b"")
    return sum(len(key) + len(value or b"") for key, value in change[1].items())


def _checked_value(value: bytes) -> bytes:
    """Return a value as bytes; `InvalidValue` for one that no row can have."""
    if len(value) > VALUE_BYTES_MAX:
        raise errors.InvalidValue(f"a value of {len(value)} bytes is longer than {VALUE_BYTES_MAX}")
    return bytes(value)


def _stored_rows(source: _Source, handle: int | None, start: bytes | None, stop: bytes | None, *, after: bool) -> _Page:
    """Return some rows of the range as they are stored, and whether they are the last of it."""
    if handle is None:
        return [], True
    if start:
        checked_key(start)
    return source.page(handle, start or None, after, stop, SCAN_ROWS, SCAN_BYTES)


def _map_bytes_for(wanted: int, page_bytes: int) -> int:
    unit = max(page_bytes, 65536)
    return -(-max(wanted, unit) // unit) * unit


def _check_address_space(size: int) -> None:
    """Raise MemoryError if there is no room for a map. LMDB gives the old map up before it asks for the new one."""
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
    except OSError as error:
        raise MemoryError(f"no address space for a map of {size} bytes") from error


def _open_environment(path: Path, map_bytes: int) -> kernel.Environment:
    try:
        # Every commit is synchronous, data and meta page; the lock file is used: see docs/architecture.md.
        return kernel.Environment(os.fsencode(path), map_bytes, TABLES_MAX + 1, files.FILE_MODE)
    except RowsError as error:
        if error.code in {errno.EAGAIN, errno.EACCES}:
            raise errors.AlreadyOpen(f"{path} is open in another place: {error}", path=str(path)) from error
        if error.code in {errno.ENOSPC, errno.EDQUOT}:
            raise errors.DiskFull(f"cannot open {path}: {error}", path=str(path)) from error
        raise errors.CorruptionError(f"cannot open {path}: {error}", file=str(path / pages.DATA_NAME)) from error


def _build(path: Path, map_bytes: int, *, insecure: bool) -> None:
    """Make an empty store aside and rename it, so that ``path`` is never half a store."""
    aside = f"{files.TEMPORARY_PREFIX}{path.name[:200]}-{secrets.token_hex(8)}"
    building = path.parent / aside
    with files.Directory(path.parent) as parent:
        files.make_private_directory(building, insecure=insecure)
        try:
            environment = _open_environment(building, _map_bytes_for(map_bytes, 65536))
            try:
                writer = environment.begin()
                table = writer.open_table(_OWN_TABLE.encode())
                writer.change([(_OWN_TABLE, _FORMAT_KEY, FORMAT)], {_OWN_TABLE: table})
                writer.commit()
            except RowsError as error:
                if error.code not in {errno.ENOSPC, errno.EDQUOT}:
                    raise errors.Error(f"cannot make {path}: {error}", path=str(path)) from error
                raise errors.DiskFull(f"cannot make {path}: {error}", path=str(path)) from error
            finally:
                environment.close()
            for entry in files.walk_files(building):
                files.sync_file(entry)
            files.sync_directory(building)
            files.move(parent, aside, parent, path.name)
        finally:
            parent.remove_tree(aside)
