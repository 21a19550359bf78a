"""The attachments of the client protocol: records of a read and pairs of a scan as one run of bytes each.

Little-endian, packed, nothing between items::

    pair    u32 key_bytes | u32 value_bytes | key | value
    record  u8 found | u64 version | u64 hybrid_clock | u32 value_bytes | value      (found 0: all others 0)

Readers are bounded: they look at no byte outside the buffer, allocate nothing before its size was compared with what is
there, and raise `FrameError` for anything that is not exactly a run of ``count`` items.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from srengine import errors, limits

_PAIR: Final = struct.Struct("<II")
_RECORD: Final = struct.Struct("<BQQI")
PAIR_HEADER_BYTES: Final = _PAIR.size
RECORD_HEADER_BYTES: Final = _RECORD.size


class PackedRecord(NamedTuple):
    """What a read found for one key. ``value`` is None when there is no record; then both numbers are 0."""

    value: bytes | None
    version: int = 0
    hybrid_clock: int = 0


def pack_pairs(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the pairs as one run of bytes."""
    parts: list[bytes] = []
    for key, value in pairs:
        parts.append(_PAIR.pack(len(key), len(value)))
        parts.append(key)
        parts.append(value)
    return b"".join(parts)


def unpack_pairs(buffer: bytes | memoryview, count: int) -> list[tuple[bytes, bytes]]:
    """Return exactly ``count`` pairs; `FrameError` when the bytes say anything else."""
    data = bytes(buffer)
    pairs: list[tuple[bytes, bytes]] = []
    offset = 0
    for _ in range(_checked_count(count, len(data), PAIR_HEADER_BYTES)):
        if len(data) - offset < PAIR_HEADER_BYTES:
            raise _short(offset)
        key_bytes, value_bytes = _PAIR.unpack_from(data, offset)
        offset += PAIR_HEADER_BYTES
        if not limits.KEY_BYTES_MIN <= key_bytes <= limits.KEY_BYTES_MAX or value_bytes > limits.VALUE_BYTES_MAX:
            raise errors.FrameError(f"a pair of {key_bytes} and {value_bytes} bytes at byte {offset}")
        if len(data) - offset < key_bytes + value_bytes:
            raise _short(offset)
        middle = offset + key_bytes
        end = middle + value_bytes
        pairs.append((data[offset:middle], data[middle:end]))
        offset = end
    if offset != len(data):
        raise errors.FrameError(f"{len(data) - offset} bytes behind the last pair")
    return pairs


def pack_records(records: Iterable[PackedRecord]) -> bytes:
    """Return what was found for each key as one run of bytes."""
    parts: list[bytes] = []
    for value, version, hybrid_clock in records:
        if value is None:
            parts.append(_RECORD.pack(0, 0, 0, 0))
        else:
            parts.append(_RECORD.pack(1, version, hybrid_clock, len(value)))
            parts.append(value)
    return b"".join(parts)


def unpack_records(buffer: bytes | memoryview, count: int) -> list[PackedRecord]:
    """Return exactly ``count`` records; `FrameError` when the bytes say anything else."""
    data = bytes(buffer)
    records: list[PackedRecord] = []
    offset = 0
    for _ in range(_checked_count(count, len(data), RECORD_HEADER_BYTES)):
        if len(data) - offset < RECORD_HEADER_BYTES:
            raise _short(offset)
        found, version, hybrid_clock, value_bytes = _RECORD.unpack_from(data, offset)
        offset += RECORD_HEADER_BYTES
        if found not in {0, 1} or (found == 0 and (version or hybrid_clock or value_bytes)):
            raise errors.FrameError(f"a record with found={found} at byte {offset}")
        if value_bytes > limits.VALUE_BYTES_MAX or len(data) - offset < value_bytes:
            raise _short(offset)
        end = offset + value_bytes
        value = data[offset:end] if found else None
        records.append(PackedRecord(value, version, hybrid_clock))
        offset = end
    if offset != len(data):
        raise errors.FrameError(f"{len(data) - offset} bytes behind the last record")
    return records


def single(attachments: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """Return the one attachment that a reply must have (none at all counts as empty); `FrameError` otherwise."""
    if not attachments:
        return b""
    if len(attachments) != 1:
        raise errors.FrameError(f"{len(attachments)} attachments where one belongs")
    return attachments[0]


def _checked_count(count: int, data_bytes: int, header_bytes: int) -> int:
    if count < 0 or count * header_bytes > data_bytes:
        raise errors.FrameError(f"{count} items cannot be in {data_bytes} bytes")
    return count


def _short(offset: int) -> errors.FrameError:
    return errors.FrameError(f"the attachment ends inside an item that starts near byte {offset}")
