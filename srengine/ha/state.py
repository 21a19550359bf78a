"""The agreed state as a stream: all rows of the appliers' tables at one index, for a node that is too far behind.

::

    header   H {format, index, term, tables, rows, row_bytes}     once, first
    rows     R [[table number, key, value], ...]                  in order of (table, key)
    trailer  T {digest}                                           once, last

Each item is one letter and msgpack. `digest` is that of `metadata.MetadataMachine.digest` at the index, so a receiver
that has put the rows in place is proved equal to the node that sent them. Nothing of a stream is used before its digest
is right: who installs it does so in one transaction and leaves it at the first doubt (`SnapshotDamaged`).

On a disk, each item stands behind its length (4 bytes, little endian). Memory: one item on either side.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

import msgspec

from srengine import errors, limits
from srengine.ha.tables import Row

_T = TypeVar("_T")

FORMAT: Final = 1
DIGEST_BYTES: Final = 16
ITEM_BYTES_TARGET: Final = 256 * limits.KIB
"""Rows are gathered up to this; one larger row makes an item of its own."""
ITEM_BYTES_MAX: Final = limits.STATE_ITEM_BYTES_MAX


class Header(msgspec.Struct, frozen=True):
    """What the stream holds: the state at (index, term). ``rows`` and ``row_bytes`` (keys and values) are totals."""

    format: int
    index: int
    term: int
    tables: tuple[str, ...]
    rows: int
    row_bytes: int


class Trailer(msgspec.Struct, frozen=True):
    """The end."""

    digest: bytes


class Digest:
    """Sums up a state: the index, then rows in order of (table, key)."""

    def __init__(self, index: int) -> None:
        self._state = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=DIGEST_BYTES)

    def add(self, table: str, key: bytes, value: bytes) -> None:
        """Take the next row in."""
        for part in (table.encode(), key, value):
            self._state.update(len(part).to_bytes(8, "little"))
            self._state.update(part)

    def value(self) -> bytes:
        """Return 16 bytes."""
        return self._state.digest()


@dataclass(frozen=True, slots=True)
class Described:
    """A state that was written or installed."""

    index: int
    term: int
    digest: bytes
    rows: int


def write_items(header: Header, rows: Iterable[Row], target: IO[bytes]) -> Described:
    """Write the stream of ``rows``, which are in order of (table, key) and as many as the header says."""
    numbers = {table: number for number, table in enumerate(header.tables)}
    encoder = msgspec.msgpack.Encoder()
    digest = Digest(header.index)
    _write(target, b"H" + encoder.encode(header))
    waiting: list[tuple[int, bytes, bytes]] = []
    size = count = 0
    for table, key, value in rows:
        digest.add(table, key, value)
        if waiting and size + len(key) + len(value) > ITEM_BYTES_TARGET:
            _write(target, b"R" + encoder.encode(waiting))
            waiting, size = [], 0
        waiting.append((numbers[table], key, value))
        size += len(key) + len(value) + 16
        count += 1
    if waiting:
        _write(target, b"R" + encoder.encode(waiting))
    assert count == header.rows, (count, header.rows)
    _write(target, b"T" + encoder.encode(Trailer(digest.value())))
    return Described(header.index, header.term, digest.value(), count)


def _write(target: IO[bytes], item: bytes) -> None:
    assert len(item) <= ITEM_BYTES_MAX, len(item)
    target.write(len(item).to_bytes(4, "little"))
    target.write(item)


def read_file(path: Path) -> Generator[bytes, None, None]:
    """Yield the items of a file as `write_items` wrote it; `SnapshotDamaged` when it is cut or an item too large."""
    with path.open("rb") as file:
        while length := file.read(4):
            size = int.from_bytes(length, "little")
            if len(length) < 4 or size > ITEM_BYTES_MAX:
                raise errors.SnapshotDamaged("an item of a state has an impossible length", bytes=size)
            item = file.read(size)
            if len(item) < size:
                raise errors.SnapshotDamaged("a state ends in the middle of an item")
            yield item


def write_item(file: IO[bytes], item: bytes) -> None:
    """Write an item as it came, for `read_file`."""
    if len(item) > ITEM_BYTES_MAX:
        raise errors.SnapshotDamaged(f"an item of {len(item)} bytes is too large", bytes=len(item))
    _write(file, item)


def check_file(path: Path, known: Sequence[str]) -> Described:
    """Read all of a file and return what it holds. Raises as `read_header` and `read_rows`."""
    with contextlib.closing(read_file(path)) as items:
        header = read_header(items, known)
        digest = Digest(header.index)
        for table, key, value in read_rows(header, items):
            digest.add(table, key, value)
        return Described(header.index, header.term, digest.value(), header.rows)


_header_decoder: Final = msgspec.msgpack.Decoder(Header)
_rows_decoder: Final = msgspec.msgpack.Decoder(list[tuple[int, bytes, bytes]])
_trailer_decoder: Final = msgspec.msgpack.Decoder(Trailer)


def read_header(items: Iterator[bytes], known: Sequence[str]) -> Header:
    """Take the header off ``items``. `SnapshotDamaged`; `UnsupportedFeature` for another format or a table that is not
    ``known`` here.
    """
    item = next(items, b"")
    header = _decoded(_header_decoder, item, b"H")
    if header.format != FORMAT:
        raise errors.UnsupportedFeature(f"a state of format {header.format}; this version reads {FORMAT}")
    strange = sorted(set(header.tables) - set(known))
    if strange:
        raise errors.UnsupportedFeature(
            f"a state with tables that this version does not know: {', '.join(strange[:8])}"
        )
    sizes = (header.index, header.term, header.rows, header.row_bytes)
    if list(header.tables) != sorted(set(header.tables)) or not all(0 <= size < 1 << 63 for size in sizes):
        raise errors.SnapshotDamaged("the header of a state makes no sense")
    return header


def read_rows(header: Header, items: Iterator[bytes]) -> Iterator[Row]:
    """Yield the rows behind the header, and return only if count, order and digest are right and nothing follows.

    Whoever uses rows before that must be able to take them back.
    """
    digest = Digest(header.index)
    before: tuple[int, bytes] = (-1, b"")
    count = size = 0
    for item in items:
        if item[:1] == b"T":
            trailer = _decoded(_trailer_decoder, item, b"T")
            if trailer.digest != digest.value() or (count, size) != (header.rows, header.row_bytes):
                raise errors.SnapshotDamaged("the digest of a state is not that of its rows")
            if next(items, None) is not None:
                raise errors.SnapshotDamaged("something follows the end of a state")
            return
        for number, key, value in _decoded(_rows_decoder, item, b"R"):
            if not 0 <= number < len(header.tables) or (number, key) <= before:
                raise errors.SnapshotDamaged("the rows of a state are not in order")
            before = (number, key)
            count += 1
            size += len(key) + len(value)
            table = header.tables[number]
            digest.add(table, key, value)
            yield table, key, value
    raise errors.SnapshotDamaged("a state ends before its trailer")


def _decoded(decoder: msgspec.msgpack.Decoder[_T], item: bytes, letter: bytes) -> _T:
    if item[:1] != letter:
        raise errors.SnapshotDamaged(f"a state has {item[:1]!r} where {letter!r} belongs")
    try:
        return decoder.decode(memoryview(item)[1:])
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise errors.SnapshotDamaged(f"an item of a state cannot be read: {error}") from error
