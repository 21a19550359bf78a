"""Messages of the exchange: what each body says, byte by byte (docs/formats-exchange.md).

    initiator                    responder
    Compare (32)            ->
                            <-   Equal (8)              or  Differs: prefix and estimator
    Fetch                   ->                              the prefix told: what differs is named
    Prepare                 ->                              else, of records: make your table while I make mine
                            <-   Prepared                   nobody waits for it
    Sketch                  ->                              the table
                            <-   Close: the records         or  Tables: the sketch was too small; peel on
    Dump                    ->                              after the last attempt
                            <-   Close                      or  Full: copy everything

Every body is raw bytes, so that what an exchange costs is counted exactly; rows, meta rows and the state row travel
beside it as attachments. Whatever a peer sent is read by `Cursor`, within bounds, and raises `FrameError`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec

from srengine import errors, limits
from srengine._native.merkle import ESTIMATOR_BYTES
from srengine.codec import registry
from srengine.types import Listed, Located

ID_LIMIT: Final = 1 << 47
PREFIX_WIDTH: Final = 2
PREFIX_WAYS: Final = 3
LEAF_CELL: Final = 30
RECORD_CELL: Final = 17
PREFIX_BYTES: Final = LEAF_CELL * PREFIX_WIDTH * PREFIX_WAYS
TO_THE_END: Final = 0xFFFF
_SKETCH = struct.Struct("<BBIQ8s")
_TABLE = struct.Struct("<BIQ")
PREPARED_BYTES: Final = 8


class Reason(enum.IntEnum):
    """Why a full copy is wanted instead."""

    TOO_DIFFERENT = 1
    TOO_LARGE = 2
    UNDECIDED = 3
    BELOW_PURGE_MARK = 4


class ExchangeCompare(msgspec.Struct, frozen=True):
    """Where the initiator stands: root 16, count 8, sequence 8."""

    tablet: str
    body: bytes


class ExchangeEqual(msgspec.Struct, frozen=True):
    """The responder stands there, too: sequence 8."""

    body: bytes


class ExchangeDiffers(msgspec.Struct, frozen=True):
    """It does not: sequence 8, prefix (six cells over leaves), estimator."""

    body: bytes


class ExchangeSketch(msgspec.Struct, frozen=True):
    """The initiator's table: by leaf 1, ways 1, width 4, seed 8, digest of its deterministic rows 8, cells."""

    tablet: str
    body: bytes


class ExchangePrepare(msgspec.Struct, frozen=True):
    """A table over records that the next sketch will have: ways 1, width 4, seed 8."""

    tablet: str
    body: bytes


class ExchangePrepared(msgspec.Struct, frozen=True):
    """It was made: sequence 8."""

    body: bytes


class ExchangeFetch(msgspec.Struct, frozen=True):
    """What the initiator found to differ: sequence at which the responder said so 8, digest of its rows 8, located."""

    tablet: str
    body: bytes


class ExchangeDump(msgspec.Struct, frozen=True):
    """All leaf digests of the initiator: digest of its rows 8, 14 for each leaf."""

    tablet: str
    body: bytes


class ExchangeClose(msgspec.Struct, frozen=True):
    """The end: flags 1, what only the initiator has; attachments: rows, meta rows, state row."""

    body: bytes


class ExchangeTables(msgspec.Struct, frozen=True):
    """The sketch was too small: sequence 8, the extension's head 13, the responder's cells of both tables."""

    body: bytes


class ExchangeFull(msgspec.Struct, frozen=True):
    """A full copy is cheaper, or the only way: reason 1."""

    body: bytes


Request = ExchangeCompare | ExchangePrepare | ExchangeSketch | ExchangeFetch | ExchangeDump
Reply = ExchangeEqual | ExchangeDiffers | ExchangePrepared | ExchangeClose | ExchangeTables | ExchangeFull


class Shape(NamedTuple):
    """The shape of a sketch."""

    by_leaf: bool
    ways: int
    width: int
    seed: int

    @property
    def cells(self) -> int:
        """How many cells it has."""
        return self.ways * self.width

    @property
    def cells_bytes(self) -> int:
        """What they take on the wire."""
        return self.cells * (LEAF_CELL if self.by_leaf else RECORD_CELL)

    def check(self) -> Shape:
        """Return itself, or raise `FrameError`: no peer makes us fill a table beyond bounds."""
        if self.ways not in (3, 4, 5) or not self.width >= 1 or self.cells > limits.EXCHANGE_CELLS_MAX:
            raise errors.FrameError(f"no sketch has {self.ways} subtables of {self.width} cells")
        return self


class Cursor:
    """The bounded reader of a body."""

    def __init__(self, body: bytes) -> None:
        if len(body) > limits.EXCHANGE_BYTES_MAX:
            raise errors.FrameError(f"an exchange's message has at most {limits.EXCHANGE_BYTES_MAX} bytes")
        self._body = body
        self._at = 0

    def take(self, size: int) -> bytes:
        """Return the following bytes."""
        if size < 0 or size > len(self._body) - self._at:
            raise errors.FrameError(f"an exchange's message ends before its byte {self._at + size}")
        self._at += size
        return self._body[self._at - size : self._at]

    def number(self, size: int) -> int:
        """Return a little-endian number."""
        return int.from_bytes(self.take(size), "little")

    def count(self) -> int:
        """Return a number as `encode_number` made it, at most 28 bits."""
        if self._at < len(self._body) and self._body[self._at] < 0x80:
            # Nearly all of them have one byte.
            self._at += 1
            return self._body[self._at - 1]
        result = 0
        for shift in range(0, 28, 7):
            byte = self.number(1)
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
        raise errors.FrameError("a count has at most four bytes")

    def rest(self) -> bytes:
        """Return what is left."""
        return self.take(len(self._body) - self._at)

    def end(self) -> None:
        """Say that there is nothing left."""
        if self._at != len(self._body):
            raise errors.FrameError(f"an exchange's message has {len(self._body) - self._at} bytes too many")


def encode_number(number: int) -> bytes:
    """Encode a count: seven bits a byte, lowest first, the top bit says that more follow."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode_located(located: Located) -> bytes:
    """Encode pairs, ids, ranges and lists, each a count and its items (docs/formats-exchange.md)."""
    parts = [encode_number(len(located.pairs))]
    parts += [leaf.to_bytes(6, "little") + item.to_bytes(6, "little") for leaf, item in located.pairs]
    parts.append(encode_number(len(located.ids)))
    parts += [item.to_bytes(6, "little") for item in located.ids]
    parts.append(encode_number(len(located.ranges)))
    parts += [_encode_range(start, stop) for start, stop in located.ranges]
    parts.append(encode_number(len(located.listed)))
    for start, stop, digests in located.listed:
        parts += [_encode_range(start, stop), encode_number(len(digests)), *digests]
    return b"".join(parts)


def _encode_range(start: bytes, stop: bytes | None) -> bytes:
    end = TO_THE_END.to_bytes(2, "little") if stop is None else len(stop).to_bytes(2, "little") + stop
    return len(start).to_bytes(2, "little") + start + end


def decode_located(cursor: Cursor) -> Located:
    """Decode what `encode_located` made, to the end of the body. Raises `FrameError`.

    Ranges rise and do not overlap, so that no message makes us walk a record twice; items are no more than cells of a
    sketch.
    """
    raw = cursor.take(12 * _item_count(cursor))
    pairs = [
        (int.from_bytes(raw[at : at + 6], "little"), int.from_bytes(raw[at + 6 : at + 12], "little"))
        for at in range(0, len(raw), 12)
    ]
    raw = cursor.take(6 * _item_count(cursor))
    ids = [int.from_bytes(raw[at : at + 6], "little") for at in range(0, len(raw), 6)]
    if any(item >= ID_LIMIT for item in ids) or any(max(pair) >= ID_LIMIT for pair in pairs):
        raise errors.FrameError("an id has 47 bits")
    ranges = [_decode_range(cursor) for _ in range(_range_count(cursor))]
    _check_apart(ranges)
    listed: list[Listed] = []
    room = limits.EXCHANGE_CELLS_MAX
    for _ in range(_range_count(cursor)):
        start, stop = _decode_range(cursor)
        raw = cursor.take(6 * _item_count(cursor, room))
        room -= len(raw) // 6
        listed.append(Listed(start, stop, [raw[at : at + 6] for at in range(0, len(raw), 6)]))
    _check_apart([(start, stop) for start, stop, _ in listed])
    cursor.end()
    return Located(pairs, ids, ranges, tuple(listed))


def _item_count(cursor: Cursor, room: int = limits.EXCHANGE_CELLS_MAX) -> int:
    count = cursor.count()
    if count > room:
        raise errors.FrameError(f"{count} items are more than {room}")
    return count


def _range_count(cursor: Cursor) -> int:
    count = cursor.count()
    if count > limits.EXCHANGE_RANGES_MAX:
        raise errors.FrameError(f"{count} ranges are more than {limits.EXCHANGE_RANGES_MAX}")
    return count


def _check_apart(ranges: list[tuple[bytes, bytes | None]]) -> None:
    for (_, stop), (start, _) in pairwise(ranges):
        if stop is None or start < stop:
            raise errors.FrameError("ranges of keys overlap or are out of order")


def _decode_range(cursor: Cursor) -> tuple[bytes, bytes | None]:
    start = _key(cursor, cursor.number(2))
    size = cursor.number(2)
    stop = None if size == TO_THE_END else _key(cursor, size)
    if stop is not None and stop <= start:
        raise errors.FrameError("a range of keys ends before it begins")
    return start, stop


def _key(cursor: Cursor, size: int) -> bytes:
    if size > limits.KEY_BYTES_MAX:
        raise errors.FrameError(f"a key has at most {limits.KEY_BYTES_MAX} bytes, not {size}")
    return cursor.take(size)


def encode_compare(root: bytes, count: int, sequence: int) -> bytes:
    """Return the body of a comparison."""
    return root + count.to_bytes(8, "little") + sequence.to_bytes(8, "little")


class Differs(NamedTuple):
    """A decoded `ExchangeDiffers`."""

    sequence: int
    prefix: bytes
    estimator: bytes


def decode_differs(body: bytes) -> Differs:
    """Decode; raises `FrameError`."""
    cursor = Cursor(body)
    result = Differs(cursor.number(8), cursor.take(PREFIX_BYTES), cursor.take(ESTIMATOR_BYTES))
    cursor.end()
    return result


def encode_prepare(shape: Shape) -> bytes:
    """Return the body that announces a table over records."""
    return _TABLE.pack(shape.ways, shape.width, shape.seed)


def decode_prepare(body: bytes) -> Shape:
    """Decode; raises `FrameError`."""
    cursor = Cursor(body)
    ways, width, seed = _TABLE.unpack(cursor.take(_TABLE.size))
    cursor.end()
    return Shape(False, ways, width, seed).check()


def encode_sketch(shape: Shape, rows_digest: bytes, cells: bytes) -> bytes:
    """Return the body of a sketch."""
    return _SKETCH.pack(shape.by_leaf, shape.ways, shape.width, shape.seed, rows_digest) + cells


def decode_sketch(body: bytes) -> tuple[Shape, bytes, bytes]:
    """Return (shape, digest of rows, cells); raises `FrameError`."""
    cursor = Cursor(body)
    by_leaf, ways, width, seed, digest = _SKETCH.unpack(cursor.take(_SKETCH.size))
    if by_leaf > 1:
        raise errors.FrameError(f"a sketch is over leaves or records, not {by_leaf}")
    shape = Shape(bool(by_leaf), ways, width, seed).check()
    cells = cursor.take(shape.cells_bytes)
    cursor.end()
    return shape, digest, cells


class Tables(NamedTuple):
    """A decoded `ExchangeTables`: the extension's shape, and the responder's cells."""

    sequence: int
    extension: Shape
    first: bytes
    second: bytes


def encode_tables(tables: Tables) -> bytes:
    """Return the body."""
    head = _TABLE.pack(tables.extension.ways, tables.extension.width, tables.extension.seed)
    return tables.sequence.to_bytes(8, "little") + head + tables.first + tables.second


def decode_tables(body: bytes, first: Shape) -> Tables:
    """Decode the answer to a sketch of a shape; raises `FrameError`."""
    cursor = Cursor(body)
    sequence = cursor.number(8)
    ways, width, seed = _TABLE.unpack(cursor.take(_TABLE.size))
    extension = Shape(first.by_leaf, ways, width, seed).check()
    result = Tables(sequence, extension, cursor.take(first.cells_bytes), cursor.take(extension.cells_bytes))
    cursor.end()
    return result


def encode_fetch(sequence: int, rows_digest: bytes, located: Located) -> bytes:
    """Return the body."""
    return sequence.to_bytes(8, "little") + rows_digest + encode_located(located)


def decode_fetch(body: bytes) -> tuple[int, bytes, Located]:
    """Return (sequence, digest of rows, located); raises `FrameError`."""
    cursor = Cursor(body)
    return cursor.number(8), cursor.take(8), decode_located(cursor)


def encode_close(located: Located, *, replace_rows: bool) -> bytes:
    """Return the body: what the responder does not have, and the ranges that its rows cover."""
    return bytes([replace_rows]) + encode_located(located)


def decode_close(body: bytes) -> tuple[Located, bool]:
    """Return (located, whether request and session rows came with it); raises `FrameError`."""
    cursor = Cursor(body)
    flags = cursor.number(1)
    if flags > 1:
        raise errors.FrameError(f"unknown flags {flags} at the end of an exchange")
    return decode_located(cursor), bool(flags)


def body_bytes(message: Request | Reply, attachments: Sequence[bytes | memoryview] = ()) -> tuple[int, int]:
    """Return (bytes that locate, bytes of rows, meta rows and state) of a message."""
    return len(message.body), sum(len(part) for part in attachments)


for _name, _type in (
    ("compare", ExchangeCompare),
    ("equal", ExchangeEqual),
    ("differs", ExchangeDiffers),
    ("prepare", ExchangePrepare),
    ("prepared", ExchangePrepared),
    ("sketch", ExchangeSketch),
    ("fetch", ExchangeFetch),
    ("dump", ExchangeDump),
    ("close", ExchangeClose),
    ("tables", ExchangeTables),
    ("full", ExchangeFull),
):
    registry.register(f"sync.exchange_{_name}", _type)
