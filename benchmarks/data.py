"""The records of all benchmarks: the same for every run and every store.

Keys are random bytes, the worst case for a tree. Values look like what services keep: a line of JSON whose names repeat
and whose numbers do not, so that compression has something to do, but not everything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KEY_BYTES = 24
VALUE_BYTES = 128
SEED = 20_24


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a run measures. ``records``: in the store; ``batch``: a durable batch; ``rounds``: of the fast rows."""

    name: str
    records: int
    batch: int
    load_batch: int
    gets: int
    rounds: int
    thread_puts: int
    rival_records: int
    cluster_records: int
    ship_items: int

    @property
    def copy_bytes(self) -> int:
        """What the file of a tablet with all records takes, or more."""
        return 256 * self.records


SIZES = {
    "full": Sizes("full", 1_000_000, 10_000, 100_000, 50_000, 11, 200, 300_000, 1_000_000, 1024),
    "quick": Sizes("quick", 100_000, 10_000, 50_000, 20_000, 7, 100, 100_000, 100_000, 256),
    "tiny": Sizes("tiny", 2_000, 500, 1_000, 200, 2, 4, 1_000, 2_000, 4),
}


class Data:
    """``count`` records as packed arrays (for C loops) and as pairs (for Python faces), in one random order."""

    def __init__(self, count: int, *, seed: int = SEED) -> None:
        """Make the records; about a microsecond each."""
        source = random.Random(seed)
        self.count = count
        self.keys = source.randbytes(count * KEY_BYTES)
        self.values = b"".join(value(number, source) for number in range(count))

    def key(self, number: int) -> bytes:
        """Return one key."""
        return self.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]

    def packed(self, start: int, stop: int) -> tuple[bytes, bytes]:
        """Return a half-open range of records as two packed arrays."""
        return self.keys[start * KEY_BYTES : stop * KEY_BYTES], self.values[start * VALUE_BYTES : stop * VALUE_BYTES]

    def pairs(self, start: int, stop: int) -> list[tuple[bytes, bytes]]:
        """Return a half-open range of records as pairs."""
        keys, values = self.packed(start, stop)
        return [
            (
                keys[number * KEY_BYTES : (number + 1) * KEY_BYTES],
                values[number * VALUE_BYTES : (number + 1) * VALUE_BYTES],
            )
            for number in range(stop - start)
        ]

    def sorted_packed(self) -> tuple[bytes, bytes]:
        """Return all records in key order as two packed arrays."""
        pairs = sorted(self.pairs(0, self.count))
        return b"".join(key for key, _ in pairs), b"".join(held for _, held in pairs)

    def changed(self, numbers: list[int], *, seed: int) -> list[tuple[bytes, bytes]]:
        """Return pairs that give these records new values of the same size."""
        source = random.Random(seed)
        return [(self.key(number), value(number, source)) for number in numbers]


def value(number: int, source: random.Random) -> bytes:
    """Return one value of VALUE_BYTES bytes."""
    line = (
        b'{"id":%d,"owner":"%x","state":"active","balance":%d,"updated":"2024-05-%02dT%02d:%02d:00Z","tags":["a","b"],'
        % (
            number,
            source.getrandbits(64),
            source.getrandbits(30),
            1 + number % 28,
            number % 24,
            number % 60,
        )
    )
    return (line + b'"note":"%032x"}' % source.getrandbits(128))[:VALUE_BYTES].ljust(VALUE_BYTES)


def pack(pairs: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Return pairs as two packed arrays."""
    return b"".join(key for key, _ in pairs), b"".join(held for _, held in pairs)
