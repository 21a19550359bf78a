"""The chunk kernel in plain Python, from docs/formats-snapshot.md: heads, digests, rows. Slow and obvious."""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

HEAD = struct.Struct("<4sBBBBQIIIHHQQQ16s16sQ")
DIGEST_AT = HEAD.size
KEY_BYTES_MAX = 511
VALUE_BYTES_MAX = 64 * 1024 * 1024
ROW = struct.Struct("<BBHIQQ")


class Row(NamedTuple):
    key: bytes
    value: bytes | None
    """None: a tombstone"""
    sequence: int
    hybrid_clock: int = 0
    versions: bytes = b""


def xxh128(data: bytes) -> bytes:
    """Return XXH3-128 as srengine stores it: low half first, little-endian."""
    return xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")


def seal(
    kind: int,
    encoding: int,
    flags: int,
    ordinal: int,
    raw_bytes: int,
    row_count: int,
    after_key: bytes,
    last_key: bytes,
    view_sequence: int,
    after_sequence: int,
    last_sequence: int,
    snapshot: bytes,
    source: bytes,
    stored: bytes,
) -> bytes:
    fixed = HEAD.pack(
        b"SRSN",
        1,
        kind,
        encoding,
        flags,
        ordinal,
        raw_bytes,
        len(stored),
        row_count,
        len(after_key),
        len(last_key),
        view_sequence,
        after_sequence,
        last_sequence,
        snapshot,
        source,
        0,
    )
    return fixed + xxh128(fixed + after_key + last_key + xxh128(stored)) + after_key + last_key


def reseal(item: bytes, **changes: object) -> bytes:
    """Return an item with fields of its head (or ``stored``) replaced and the digest right again: a liar's item."""
    names = [
        "magic",
        "format",
        "kind",
        "encoding",
        "flags",
        "ordinal",
        "raw_bytes",
        "stored_bytes",
        "row_count",
        "after_bytes",
        "last_bytes",
        "view_sequence",
        "after_sequence",
        "last_sequence",
        "snapshot",
        "source",
        "reserved",
    ]
    fields = dict(zip(names, HEAD.unpack(item[: HEAD.size]), strict=True))
    keys_at = HEAD.size + 16
    after_key = item[keys_at : keys_at + fields["after_bytes"]]
    last_key = item[keys_at + fields["after_bytes"] : keys_at + fields["after_bytes"] + fields["last_bytes"]]
    stored = item[keys_at + len(after_key) + len(last_key) :]
    if "stored" in changes:
        stored = changes.pop("stored")
        fields["stored_bytes"] = len(stored)
        if not fields["encoding"]:
            fields["raw_bytes"] = len(stored)
    if "after_key" in changes:
        after_key = changes.pop("after_key")
        fields["after_bytes"] = len(after_key)
    if "last_key" in changes:
        last_key = changes.pop("last_key")
        fields["last_bytes"] = len(last_key)
    assert set(changes) <= set(fields), changes
    fields |= changes
    fixed = HEAD.pack(*fields.values())
    return fixed + xxh128(fixed + after_key + last_key + xxh128(stored)) + after_key + last_key + stored


def fold(running: bytes, digest: bytes) -> bytes:
    return xxh128(running + digest)


def encode_rows(rows: list[Row]) -> bytes:
    return b"".join(
        ROW.pack(
            row.value is None,
            len(row.versions) // 16,
            len(row.key),
            len(row.value or b""),
            row.sequence,
            row.hybrid_clock,
        )
        + row.key
        + row.versions
        + (row.value or b"")
        for row in rows
    )


def decode_rows(data: bytes) -> list[Row]:
    """Return the rows, or raise ValueError: the rules of a row alone."""
    rows = []
    at = 0
    while at < len(data):
        if len(data) - at < ROW.size:
            raise ValueError("header cut off")
        flags, versions, key_bytes, value_bytes, sequence, clock = ROW.unpack_from(data, at)
        if flags > 1 or versions > 64 or not 1 <= key_bytes <= KEY_BYTES_MAX or value_bytes > VALUE_BYTES_MAX:
            raise ValueError("field out of range")
        if (flags and value_bytes) or sequence == 0:
            raise ValueError("impossible row")
        at += ROW.size
        need = key_bytes + 16 * versions + value_bytes
        if len(data) - at < need:
            raise ValueError("row cut off")
        key = data[at : at + key_bytes]
        entries = data[at + key_bytes : at + key_bytes + 16 * versions]
        value = None if flags else data[at + key_bytes + 16 * versions : at + need]
        rows.append(Row(key, value, sequence, clock, entries))
        at += need
    return rows


def check_rows(
    data: bytes, *, by_key: bool, after_key: bytes, after_sequence: int, sequence_max: int
) -> tuple[int, bytes, int]:
    rows = decode_rows(data)
    key, sequence = after_key, after_sequence
    for row in rows:
        if row.sequence > sequence_max:
            raise ValueError("ahead of its view")
        if by_key and row.key <= key:
            raise ValueError("keys do not rise")
        if not by_key and row.sequence <= sequence:
            raise ValueError("sequences do not rise")
        key, sequence = row.key, row.sequence
    return (len(rows), rows[-1].key, rows[-1].sequence) if rows else (0, b"", 0)
