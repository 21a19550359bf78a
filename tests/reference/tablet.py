"""A tablet in plain Python, from docs/formats.md alone: digests, roots, conditions, requests, the change log.

Slow and obvious. The kernel must agree with it byte for byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import xxhash

MASK = (1 << 128) - 1
PUT, DELETE = 0, 1
NONE, IF_ABSENT, IF_VERSION, IF_PRESENT = 0, 1, 2, 3
APPLIED, FAILED, NOTHING = 0, 1, 2


def content_checksum(value: bytes, flags: int) -> int:
    return xxhash.xxh3_64_intdigest(value, seed=flags)


def header(key: bytes, flags: int, sequence: int, clock: int, value: bytes) -> bytes:
    """The header of a stored record without version entries: 32 bytes."""
    fixed = struct.pack("<BBHQQQ", 1, flags, 0, sequence, clock, content_checksum(value, flags))
    return fixed + struct.pack("<I", xxhash.xxh3_64_intdigest(key + fixed) & 0xFFFFFFFF)


def record_digest(seed: bytes, key: bytes, flags: int, sequence: int, clock: int, value: bytes) -> int:
    layout = struct.pack("<BBHHBBQQQ", 1, 1, len(key), 0, flags, 0, sequence, clock, content_checksum(value, flags))
    return xxhash.xxh3_128_intdigest(layout + key, seed=int.from_bytes(seed, "little"))


def row_digest(seed: bytes, domain: int, name: bytes, value: bytes) -> int:
    number = int.from_bytes(seed, "little")
    layout = struct.pack(
        "<BBHIIIQQ",
        domain,
        1,
        0,
        len(name),
        len(value),
        0,
        xxhash.xxh3_64_intdigest(name, seed=number),
        xxhash.xxh3_64_intdigest(value, seed=number),
    )
    return xxhash.xxh3_128_intdigest(layout, seed=number)


@dataclass
class Stored:
    value: bytes
    sequence: int
    clock: int
    tombstone: bool


@dataclass
class ReferenceTablet:
    """The state machine; `apply` takes one entry's operations and the clock that the kernel chose."""

    seed: bytes
    records: dict[bytes, Stored] = field(default_factory=dict)
    sequence: int = 0
    purge_mark: int = 0

    def root(self) -> bytes:
        total = sum(
            record_digest(self.seed, key, int(record.tombstone), record.sequence, record.clock, record.value)
            for key, record in self.records.items()
        )
        if self.purge_mark:
            total += row_digest(self.seed, 4, b"purge", struct.pack("<Q", self.purge_mark))
        return (total & MASK).to_bytes(16, "little")

    def live(self) -> dict[bytes, bytes]:
        return {key: record.value for key, record in self.records.items() if not record.tombstone}

    def apply(self, operations, clock: int) -> bytes:
        """Apply (kind, key, value, condition, expected) in order; return one result byte each."""
        results = bytearray()
        for kind, key, value, condition, expected in operations:
            self.sequence += 1
            old = self.records.get(key)
            absent = old is None or old.tombstone
            if (
                (condition == IF_ABSENT and not absent)
                or (condition == IF_PRESENT and absent)
                or (condition == IF_VERSION and (absent or old.sequence != expected))
            ):
                results.append(FAILED)
            elif kind == DELETE and absent:
                results.append(NOTHING)
            else:
                results.append(APPLIED)
                stored = value if kind == PUT else b""
                self.records[key] = Stored(stored, self.sequence, clock, kind == DELETE)
        if not operations:
            self.sequence += 1
        return bytes(results)

    def purge(self, mark: int) -> None:
        self.sequence += 1
        self.records = {
            key: record for key, record in self.records.items() if not (record.tombstone and record.sequence <= mark)
        }
        self.purge_mark = max(self.purge_mark, mark)
