"""What we compare the exchange with: a level-by-level walk of a fixed Merkle tree, written plainly.

Records fall into a fixed number of leaves by the hash of their key (about 32 a leaf); an inner node is the sum of its
``fan_out`` children. One round trip a level: "children of these nodes", answered by their digests (8 bytes each); in
the end the leaves' records are listed (8 bytes each), which is what Cassandra, Riak and their like do, in spirit.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

DIGEST_BYTES = 8
ID_BYTES = 8
NODE_BYTES = 4
MASK = (1 << 64) - 1


class Cost(NamedTuple):
    """Bytes both ways, round trips, and the keys that were found to differ."""

    bytes: int
    rounds: int
    found: set[bytes]


class Tree:
    """A tree over {key: digest}; every level is a list of sums."""

    def __init__(self, records: dict[bytes, int], fan_out: int, expected: int) -> None:
        """Sum ``records`` up; ``expected`` fixes the number of leaves, which both sides must agree on beforehand."""
        leaves = 1
        self.depth = 0
        while leaves * 32 < expected:
            leaves *= fan_out
            self.depth += 1
        self.fan_out = fan_out
        self.buckets: list[list[bytes]] = [[] for _ in range(leaves)]
        self.records = records
        sums = [0] * leaves
        for key, digest in records.items():
            place = xxhash.xxh3_64_intdigest(key) % leaves
            self.buckets[place].append(key)
            sums[place] = (sums[place] + digest) & MASK
        self.levels = [sums]
        while len(self.levels[-1]) > 1:
            below = self.levels[-1]
            self.levels.append([sum(below[at : at + fan_out]) & MASK for at in range(0, len(below), fan_out)])
        self.levels.reverse()

    def move(self, key: bytes, digest: int | None) -> None:
        """Set or remove one record, and adjust the path to the root."""
        place = xxhash.xxh3_64_intdigest(key) % len(self.buckets)
        before = self.records.pop(key, None)
        if before is None:
            self.buckets[place].append(key)
        if digest is None:
            self.buckets[place].remove(key)
        else:
            self.records[key] = digest
        step = (digest or 0) - (before or 0)
        for level in reversed(self.levels):
            level[place] = (level[place] + step) & MASK
            place //= self.fan_out


def walk(here: Tree, there: Tree) -> Cost:
    """Find what differs, one level a round trip."""
    size, rounds = DIGEST_BYTES, 1
    nodes = [0] if here.levels[0] != there.levels[0] else []
    for mine, theirs in zip(here.levels[1:], there.levels[1:], strict=True):
        if not nodes:
            break
        rounds += 1
        size += len(nodes) * (NODE_BYTES + here.fan_out * DIGEST_BYTES)
        children = [node * here.fan_out + child for node in nodes for child in range(here.fan_out)]
        nodes = [child for child in children if mine[child] != theirs[child]]
    found: set[bytes] = set()
    if nodes:
        rounds += 1
        for node in nodes:
            size += NODE_BYTES + len(there.buckets[node]) * ID_BYTES
            for key in {*here.buckets[node], *there.buckets[node]}:
                if here.records.get(key) != there.records.get(key):
                    found.add(key)
    return Cost(size, rounds, found)
