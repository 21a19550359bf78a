"""Leaves, estimator and sketches in plain Python, from docs/formats-exchange.md alone. Slow and obvious."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from tests.reference.tablet import MASK

ID_BITS = 47
BUCKETS = 192


def key_hash(seed: bytes, key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key, seed=int.from_bytes(seed, "little"))


def value_of(digest: int) -> int:
    return (digest & (1 << 64) - 1) >> 24 or 1


@dataclass
class Leaf:
    key: bytes
    id: int
    sum: int = 0
    value_sum: int = 0
    weighted: int = 0
    count: int = 0

    def fields(self) -> tuple[bytes, int, bytes, int, int, int]:
        return (
            self.key,
            self.id,
            (self.sum & MASK).to_bytes(16, "little"),
            self.value_sum & (1 << 64) - 1,
            self.weighted & MASK,
            self.count,
        )


def leaves(seed: bytes, digests: dict[bytes, int], boundary_bits: int = 5, id_bits: int = ID_BITS) -> list[Leaf]:
    """Leaves of the records {key: digest}."""
    shift = 64 - id_bits
    result = [Leaf(b"", key_hash(seed, b"") >> shift)]
    for key in sorted(digests):
        hashed = key_hash(seed, key)
        if hashed & (1 << boundary_bits) - 1 == 0:
            result.append(Leaf(key, hashed >> shift))
        leaf, value = result[-1], value_of(digests[key])
        leaf.sum += digests[key]
        leaf.value_sum += value
        leaf.weighted += value * (hashed >> shift)
        leaf.count += 1
    return result


def estimator(seed: bytes, digests: dict[bytes, int]) -> bytes:
    buckets = [0] * BUCKETS
    for key, digest in digests.items():
        wide, value = key_hash(seed, key) >> 17, value_of(digest)
        group = (wide & 0xFFFFFFFF) * 40 >> 32
        for lane in range(4):
            step = value >> lane & 1
            buckets[4 * group + lane] += -step if wide >> 43 + lane & 1 else step
        if wide >> 37 & 63 == 0:
            step = value & 1
            buckets[160 + (wide >> 32 & 31)] += -step if wide >> 46 & 1 else step
    return bytes(bucket & 0xFF for bucket in buckets)


def places(item: int, seed: int, width: int, ways: int) -> list[int]:
    hashed = xxhash.xxh3_128_intdigest(item.to_bytes(8, "little"), seed=seed)
    low, high = hashed & (1 << 64) - 1, hashed >> 64
    fifth = low + high * 0x9E3779B97F4A7C15 >> 32
    parts = [hashed, hashed >> 32, hashed >> 64, hashed >> 96, fifth]
    return [i * width + ((parts[i] & 0xFFFFFFFF) * width >> 32) for i in range(ways)]


class Sketch:
    """A table of some subtables; the cells are plain integers that never wrap until they are encoded."""

    def __init__(self, width: int, seed: int, *, by_leaf: bool, ways: int = 3) -> None:
        self.width, self.seed, self.by_leaf, self.ways = width, seed, by_leaf, ways
        self.cells = [[0, 0, 0] for _ in range(ways * width)]

    def add(self, item: int, value: int, weighted: int = 0) -> None:
        for place in places(item, self.seed, self.width, self.ways):
            cell = self.cells[place]
            cell[0] += value
            cell[1] += value * item
            cell[2] += weighted

    def encode(self) -> bytes:
        widths = (6, 12, 12) if self.by_leaf else (6, 11)
        return b"".join(
            (part & (1 << 8 * width) - 1).to_bytes(width, "little")
            for cell in self.cells
            for part, width in zip(cell, widths, strict=False)
        )
