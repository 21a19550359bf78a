"""The sectors of a write-ahead log in plain Python, from docs/formats-log.md and srengine/storage/wal.py alone.

Slow and obvious. The kernel must agree with it byte for byte, and `wal.open` with `records`.
"""

from __future__ import annotations

import struct

import xxhash

SECTOR = 512
HEAD = struct.Struct("<QQIIII")  # checksum, digest, generation, record, place, total
ROOM = SECTOR - HEAD.size
MASK = (1 << 64) - 1


class Damaged(Exception):
    """Something that is not explained by a loss of power."""


def checksum(sector: bytes, identity: int, number: int) -> int:
    return xxhash.xxh3_64_intdigest(sector[8:], seed=(identity + number) & MASK)


def sectors(record: bytes, first: int, identity: int, generation: int, number: int) -> list[bytes]:
    """Return what a record is on the disk, from sector ``first`` on."""
    found = []
    for place in range(max(1, -(-len(record) // ROOM))):
        part = record[place * ROOM : (place + 1) * ROOM]
        head = HEAD.pack(0, xxhash.xxh3_64_intdigest(record), generation, number, place, len(record))
        sector = head + part + bytes(ROOM - len(part))
        found.append(struct.pack("<Q", checksum(sector, identity, first + place)) + sector[8:])
    return found


def heads(content: bytes, identity: int) -> tuple[list[tuple[int, int, int, int, int, int]], list[int]]:
    """Return (sector, generation, record, place, total, digest) of each sound sector, and which are not sound."""
    found, unsound = [], []
    for number in range(len(content) // SECTOR):
        sector = content[number * SECTOR : (number + 1) * SECTOR]
        if not any(sector):
            continue
        stored, digest, generation, record, place, total = HEAD.unpack_from(sector)
        if stored == checksum(sector, identity, number):
            found.append((number, generation, record, place, total, digest))
        else:
            unsound.append(number)
    return found, unsound


def records(content: bytes, identity: int, generation: int) -> list[bytes]:
    """Return the records of a generation that were written whole. `Damaged`."""
    sound, unsound = heads(content, identity)
    if unsound or any(found[1] > generation for found in sound):
        raise Damaged
    live = {found[0]: found for found in sound if found[1] == generation}
    result: list[bytes] = []
    at = 0
    while at in live:
        _, _, number, place, total, digest = live[at]
        count = max(1, -(-total // ROOM))
        wanted = [(at + i, generation, len(result), i, total, digest) for i in range(count)]
        if (number, place) != (len(result), 0) or [live.get(at + i) for i in range(count)] != wanted:
            break
        parts = [content[(at + i) * SECTOR + HEAD.size : (at + i + 1) * SECTOR] for i in range(count)]
        result.append(b"".join(parts)[:total])
        if xxhash.xxh3_64_intdigest(result[-1]) != digest:
            raise Damaged
        at += count
    if any(found[2] > len(result) for found in live.values()):
        raise Damaged
    return result
