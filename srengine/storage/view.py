"""A view: a tablet at one point in time, pinned for a bounded while.

A view sees what was durable when it was opened and nothing later. It keeps LMDB from reusing pages, so it has a maximum
age; past it every call raises `ViewExpired` and the file stops growing because of it. Whoever reads for longer opens
view after view and goes on by key (`View.rows_by_key`) or by sequence (`View.rows_since`), as snapshots do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from srengine import errors, limits
from srengine._native import tablet as kernel
from srengine.types import Position, Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from srengine.storage.tablet import Tablet

TOMBSTONE: Final = 1
_PAGE_RECORDS: Final = 512
_PAGE_BYTES: Final = limits.MIB
_META_ROW = struct.Struct("<BHI")
_LOCAL_ROWS: Final = frozenset({b"state", b"seed", b"tablet", b"format", b"boot", b"fill", b"adopted"})
"""Meta rows that belong to this copy and are not shipped."""


class RowBatch(NamedTuple):
    """Rows in their wire form (docs/formats.md) and where they end.

    ``last`` is the last row's key or sequence, None when there is no row; ``done``: nothing follows in this view.
    """

    rows: bytes | memoryview
    count: int  # type: ignore[assignment]  # a tuple's own count() is not missed
    last: bytes | int | None
    done: bool


def prefix_end(prefix: bytes) -> bytes | None:
    """Return the first key after all keys with this prefix; None when there is none (only 0xff bytes)."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None


def scan_bounds(start: bytes | None, stop: bytes | None, prefix: bytes | None) -> tuple[bytes | None, bytes | None]:
    """Return [start, stop) for a scan; ``prefix`` narrows it."""
    for name, bound in (("start", start), ("stop", stop), ("prefix", prefix)):
        if bound is not None and not isinstance(bound, bytes):
            raise TypeError(f"{name} is bytes, not {type(bound).__name__}")
    if prefix:
        start = prefix if start is None else max(start, prefix)
        end = prefix_end(prefix)
        if end is not None:
            stop = end if stop is None else min(stop, end)
    return start, stop


def record_of(key: bytes, found: tuple[bytes, int, int, int] | None, *, tombstones: bool) -> Record | None:
    """Return what a kernel found (value, sequence, clock, flags) as a record; None also for an unwanted tombstone."""
    if found is None or (found[3] & TOMBSTONE and not tombstones):
        return None
    value, sequence, clock, flags = found
    return Record(key, value, sequence, clock, bool(flags & TOMBSTONE))


def encode_meta(rows: list[tuple[int, bytes, bytes]]) -> bytes:
    """Encode meta, request and session rows as they travel at the end of a delta."""
    return b"".join(_META_ROW.pack(database, len(name), len(value)) + name + value for database, name, value in rows)


def decode_meta(data: bytes | memoryview) -> list[tuple[int, bytes, bytes]]:
    """Decode what `encode_meta` made; raises `FrameError` for anything else."""
    data = bytes(data)
    rows: list[tuple[int, bytes, bytes]] = []
    at = 0
    while at < len(data):
        if len(data) - at < _META_ROW.size:
            raise errors.FrameError(f"meta rows end inside the head of row {len(rows)}")
        database, name_bytes, value_bytes = _META_ROW.unpack_from(data, at)
        at += _META_ROW.size
        if database > 2 or not 1 <= name_bytes <= limits.KEY_BYTES_MAX or len(data) - at < name_bytes + value_bytes:
            raise errors.FrameError(f"meta row {len(rows)} is malformed")
        name, value = data[at : at + name_bytes], data[at + name_bytes : at + name_bytes + value_bytes]
        if database == 0 and name in _LOCAL_ROWS:
            raise errors.FrameError(f"meta row {name!r} belongs to the other copy alone")
        rows.append((database, name, value))
        at += name_bytes + value_bytes
    return rows


def decode_place(state: bytes) -> tuple[int, bytes, int]:
    """Return (sequence, root, count) of a state row. Raises `FrameError`."""
    sequence, root, count, *_ = kernel.decode_state(state)
    return sequence, root, count


class View:
    """A pinned point-in-time reader of a tablet; a context manager. Thread-safe, one call at a time.

    ``position`` is where the tablet stood, ``state`` its state row (112 bytes) as deltas and snapshots carry it.
    """

    def __init__(self, tablet: Tablet, reader: kernel.Reader) -> None:
        self._tablet = tablet
        self._reader = reader
        sequence, root, count, *_ = reader.state_tuple
        self.position = Position(tablet.lineage, sequence, root, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the pinned pages; may be called twice."""
        self._reader.close()

    @property
    def state(self) -> bytes:
        """The state row of this point in time."""
        return self._reader.state_image

    @property
    def purge_mark(self) -> int:
        """The sequence up to which tombstones were removed."""
        return self._reader.state_tuple[7]

    @property
    def log_floor(self) -> int:
        """The sequence below which records have no change entry."""
        return self._reader.state_tuple[8]

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None. Raises `ViewExpired`, `CorruptionError`, `InvalidValue`."""
        found = self._reader.get(key)
        return None if found is None or found[3] & TOMBSTONE else found[0]

    def get_record(self, key: bytes, *, tombstones: bool = False) -> Record | None:
        """Return the record of a key, or None; with ``tombstones`` also one that says "deleted"."""
        return record_of(key, self._reader.get(key), tombstones=tombstones)

    def scan(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of keys in [start, stop) with ``prefix``, in key order or against it, at most ``limit``.

        Raises as `get`, when the iterator gets there.
        """
        for page in self._pages(start, stop, prefix, reverse=reverse, limit=limit, headers=False, tombstones=False):
            yield from page

    def records(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        tombstones: bool = False,
    ) -> Iterator[Record]:
        """Yield records as `scan` yields pairs."""
        for page in self._pages(start, stop, prefix, reverse=reverse, limit=limit, headers=True, tombstones=tombstones):
            for key, value, sequence, clock, flags in page:
                yield Record(key, value, sequence, clock, bool(flags & TOMBSTONE))

    def _pages(
        self,
        start: bytes | None,
        stop: bytes | None,
        prefix: bytes | None,
        *,
        reverse: bool,
        limit: int | None,
        headers: bool,
        tombstones: bool,
    ) -> Iterator[list[Any]]:
        """Yield pages of pairs, or with ``headers`` of (key, value, sequence, clock, flags)."""
        start, stop = scan_bounds(start, stop, prefix)
        if limit is not None and limit < 0:
            raise errors.InvalidValue(f"limit is {limit}, which is negative")
        left, after, done = limit, False, False
        while not done and (left is None or left > 0):
            wanted = _PAGE_RECORDS if left is None else min(left, _PAGE_RECORDS)
            page, done = self._reader.page(start, stop, after, reverse, wanted, _PAGE_BYTES, headers, tombstones)
            if page:
                if reverse:
                    stop = page[-1][0]
                else:
                    start, after = page[-1][0], True
                if left is not None:
                    left -= len(page)
                yield page

    def check_all(self) -> tuple[int, int]:
        """Verify every record; return (records, bytes of keys and values).

        Raises `CorruptionError` at the first damage.
        """
        return self._reader.check_all()

    # --- rows for the wire -------------------------------------------------------------------------------------------

    def rows_by_key(self, after: bytes | None, *, bytes_max: int, buffer: bytearray | None = None) -> RowBatch:
        """Return rows after a key (None: from the first), in key order, at least one unless done.

        A record larger than ``bytes_max`` comes alone. With a ``buffer`` rows that fit are written into it, and
        ``rows`` is a view of its start: who reads much saves an allocation for each batch.
        """
        rows, count, last, done = self._reader.rows_by_key(after, bytes_max, buffer)
        if isinstance(rows, int):
            assert buffer is not None, "only a given buffer is written into"
            return RowBatch(memoryview(buffer)[:rows], count, last, done)
        return RowBatch(rows, count, last, done)

    def rows_since(self, sequence: int, *, bytes_max: int) -> RowBatch:
        """Return the rows of the live change entries after ``sequence``, in sequence order, at least one unless done.

        Raises `BelowPurgeMark` when the change log does not answer for that sequence.
        """
        floor = max(self.purge_mark, self.log_floor)
        if sequence < floor:
            raise errors.BelowPurgeMark(
                f"the change log of {self._tablet} answers from {floor} on, {sequence} was asked for",
                asked=sequence,
                floor=floor,
            )
        rows, count, last, done = self._reader.rows_since(sequence, bytes_max)
        return RowBatch(rows, count, last, done)

    def meta_rows(self, since: int) -> bytes:
        """Return what a copy needs besides records: request and session rows after ``since``; from 0 also the rest."""
        rows = self._reader.meta_rows(since)
        if since == 0:
            stored = self._reader.meta()
            rows += [
                (0, name, kernel.check_row(name, stored[name])) for name in sorted(stored) if name not in _LOCAL_ROWS
            ]
        return encode_meta(rows)
