"""Messages of a comparison of many tablets at once: what each body says, byte by byte (docs/formats-exchange.md).

    initiator                                       responder
    SharedCompare: where each tablet stands     ->
                                                <-  SharedDiffers: which differ; prefix and estimator over those
    SharedSketch: shape of a table over those   ->  (when the prefix does not tell)
                                                <-  SharedCells: its cells

What follows are the fetches of an ordinary exchange, one for each tablet that differs.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec

from srengine import errors, limits
from srengine._native.merkle import ESTIMATOR_BYTES
from srengine.codec import registry
from srengine.sync.exchange_messages import PREFIX_BYTES, Cursor, Shape, encode_compare, encode_number

PLACE_BYTES: Final = 32
_SHAPE = struct.Struct("<BIQ")
_DIFFERING = struct.Struct("<HQ")


class SharedCompare(msgspec.Struct, frozen=True):
    """Where the initiator stands: for each tablet root 16, count 8, sequence 8."""

    tablets: tuple[str, ...]
    body: bytes


class SharedDiffers(msgspec.Struct, frozen=True):
    """Which tablets differ: count, then u16 place in the list and sequence 8 each; if any: prefix, estimator."""

    body: bytes


class SharedSketch(msgspec.Struct, frozen=True):
    """The shape of the table that is wanted over the leaves of these tablets: ways 1, width 4, seed 8."""

    tablets: tuple[str, ...]
    body: bytes


class SharedCells(msgspec.Struct, frozen=True):
    """For each tablet the sequence at which it was added, 8; then the cells."""

    body: bytes


SharedRequest = SharedCompare | SharedSketch
SharedReply = SharedDiffers | SharedCells


def check_tablets(tablets: tuple[str, ...]) -> None:
    """Raise `FrameError` unless the names rise and are few enough."""
    if not 0 < len(tablets) <= limits.EXCHANGE_TABLETS_MAX:
        raise errors.FrameError(f"1 to {limits.EXCHANGE_TABLETS_MAX} tablets are compared at once, not {len(tablets)}")
    if any(one >= other for one, other in pairwise(tablets)):
        raise errors.FrameError("the tablets of a comparison are named in rising order, each once")


def encode_places(places: list[tuple[bytes, int, int]]) -> bytes:
    """Return the body of a comparison."""
    return b"".join(encode_compare(*place) for place in places)


def decode_places(message: SharedCompare) -> list[bytes]:
    """Return the 32 bytes of each tablet; raises `FrameError`."""
    check_tablets(message.tablets)
    cursor = Cursor(message.body)
    places = [cursor.take(PLACE_BYTES) for _ in message.tablets]
    cursor.end()
    return places


class Differing(NamedTuple):
    """A decoded `SharedDiffers`: (place in the list, sequence) of what differs, prefix, estimator; empty if none."""

    tablets: list[tuple[int, int]]
    prefix: bytes
    estimator: bytes


def encode_differing(differing: Differing) -> bytes:
    """Return the body."""
    parts = [encode_number(len(differing.tablets)), *(_DIFFERING.pack(*one) for one in differing.tablets)]
    return b"".join(parts) + differing.prefix + differing.estimator


def decode_differing(body: bytes, count: int) -> Differing:
    """Decode the answer to a comparison of ``count`` tablets; raises `FrameError`."""
    cursor = Cursor(body)
    wanted = cursor.count()
    if wanted > count:
        raise errors.FrameError(f"{wanted} tablets differ of {count}")
    tablets = [_DIFFERING.unpack(cursor.take(_DIFFERING.size)) for _ in range(wanted)]
    before = -1
    for at, _ in tablets:
        if not before < at < count:
            raise errors.FrameError(f"tablet {at} of {count} has no place behind {before}")
        before = at
    result = Differing(tablets, b"", b"")
    if tablets:
        result = Differing(tablets, cursor.take(PREFIX_BYTES), cursor.take(ESTIMATOR_BYTES))
    cursor.end()
    return result


def encode_shape(shape: Shape) -> bytes:
    """Return the body of a request for cells."""
    return _SHAPE.pack(shape.ways, shape.width, shape.seed)


def decode_shape(message: SharedSketch) -> Shape:
    """Return the shape; raises `FrameError`."""
    check_tablets(message.tablets)
    cursor = Cursor(message.body)
    ways, width, seed = _SHAPE.unpack(cursor.take(_SHAPE.size))
    cursor.end()
    return Shape(True, ways, width, seed).check()


def encode_cells(sequences: list[int], cells: bytes) -> bytes:
    """Return the body."""
    return b"".join(sequence.to_bytes(8, "little") for sequence in sequences) + cells


def decode_cells(body: bytes, count: int, shape: Shape) -> tuple[list[int], bytes]:
    """Return the sequences of ``count`` tablets, and the cells; raises `FrameError`."""
    cursor = Cursor(body)
    sequences = [cursor.number(8) for _ in range(count)]
    cells = cursor.take(shape.cells_bytes)
    cursor.end()
    return sequences, cells


for _name, _type in (
    ("compare", SharedCompare),
    ("differs", SharedDiffers),
    ("sketch", SharedSketch),
    ("cells", SharedCells),
):
    registry.register(f"sync.exchange_shared_{_name}", _type)
