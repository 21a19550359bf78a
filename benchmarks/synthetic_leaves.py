"""Two replicas of any size of which only what differs exists: what an exchange between them costs in bytes and rounds.

Whatever is equal cancels out of every sum that the two sides compare: estimator, sketches, leaves. So a pair of
tablets with ten million records and a thousand differences is, to the exchange, the thousand differences and the
number of leaves. This gives the machine exactly that: ids, values and digests drawn at random, leaves met as often as
chance has it, a boundary key among 32, the kernel's own sketches. Two things are modelled, not computed: which leaves
with several differences can be told apart (by the rule of `srengine.storage.merkle`: a pair, each ours or theirs
against ours), and what a list of such a leaf holds (33 digests).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from srengine._native import merkle
from srengine.sync.exchange_machine import Figures, Initiator
from srengine.sync.exchange_responder_machine import Responder
from srengine.types import Actual, Found, Item, Listed, Located, Repair

ID_BITS = 47
LISTED_RECORDS = 33


@dataclass
class Difference:
    """A record that differs: its id, the leaf it is in, and its value on either side (0: it is not there)."""

    item: int
    leaf: int
    values: tuple[int, int]


@dataclass
class World:
    """What differs between two replicas of ``records`` records."""

    records: int
    differences: list[Difference]
    by_leaf: dict[int, list[Difference]] = field(default_factory=dict)
    boundaries: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Sort what differs by leaf."""
        for difference in self.differences:
            self.by_leaf.setdefault(difference.leaf, []).append(difference)


def make(records: int, count: int, seed: int) -> World:
    """One third only here, one third only there, one third updated."""
    rng = random.Random(f"{records}/{count}/{seed}")
    leaves = records // 32
    ids = random.Random(records)
    start = ids.getrandbits(ID_BITS)

    def leaf_id() -> int:
        # The leaves' ids are a fixed sequence without repetition: an odd step modulo 2^47.
        return (start + rng.randrange(leaves) * 0x5DEECE66D1F3) % (1 << ID_BITS)

    differences, boundaries = [], set()
    for number in range(count):
        item, values = rng.getrandbits(ID_BITS), (rng.getrandbits(40) or 1, rng.getrandbits(40) or 1)
        if number < count // 3:
            values = (values[0], 0)
        elif number < 2 * (count // 3):
            values = (0, values[1])
        leaf = leaf_id()
        if 0 in values and rng.randrange(32) == 0:
            boundaries.add(item)
        differences.append(Difference(item, leaf, values))
    return World(records, differences, boundaries=boundaries)


class Moment:
    """One side at one moment."""

    sequence = 0
    root = b"\0" * 16
    state = b""
    rows_digest = b"\0" * 16
    dump = b""

    def __init__(self, world: World, side: int) -> None:
        """Look at one side of the world."""
        self._world, self._side = world, side
        self.root = bytes([side]) * 16
        self.count = world.records
        self.leaf_count = world.records // 32

    @property
    def actual(self) -> Actual:
        """Not asked for: nothing is recounted."""
        raise NotImplementedError

    def _own(self) -> Iterator[tuple[Difference, int]]:
        for difference in self._world.differences:
            if difference.values[self._side]:
                yield difference, difference.values[self._side]

    @property
    def estimator(self) -> bytes:
        """The buckets over what differs, as docs/formats-exchange.md says."""
        buckets = [0] * merkle.ESTIMATOR_BYTES
        for difference, value in self._own():
            item = difference.item
            group = 4 * ((item & 0xFFFFFFFF) * 40 >> 32)
            for lane in range(4):
                step = value >> lane & 1
                buckets[group + lane] += -step if item >> 43 + lane & 1 else step
            if item >> 37 & 63 == 0:
                step = value & 1
                buckets[160 + (item >> 32 & 31)] += -step if item >> 46 & 1 else step
        return bytes(bucket & 0xFF for bucket in buckets)

    def sketch(self, *, by_leaf: bool, ways: int, width: int, seed: int) -> merkle.Sketch:
        """Return a table over what differs."""
        table = merkle.Sketch(width, seed, by_leaf=by_leaf, ways=ways)
        for difference, value in self._own():
            if not by_leaf:
                table.add(difference.item, value)
            else:
                table.add(difference.leaf, value, value * difference.item)
                if difference.item in self._world.boundaries:
                    # It takes the second half of its leaf with it: sixteen records' worth of equal sums change places.
                    moved, weight = 16 << 39, (16 << 39) * difference.leaf
                    table.add(difference.leaf, -moved, -weight)
                    table.add(difference.item, moved, weight)
        return table

    def prepare(self, *, ways: int, width: int, seed: int) -> None:
        """Nothing: what is not walked takes no time."""

    def fill(self, table: merkle.Sketch) -> None:
        """Not asked for: one tablet."""
        raise NotImplementedError

    def own_leaves(self, items: list[Item]) -> set[int]:
        """Not asked for: one tablet."""
        raise NotImplementedError

    def peel(self, sketches: list[merkle.Sketch]) -> list[Item] | None:
        """Read what differs."""
        return merkle.peel(sketches)

    def resolve(self, items: list[Item]) -> Located:
        """Locate what differs in leaves: alone, as a pair of ours, or by a list."""
        pairs, ranges = [], []
        for leaf in {item[0] for item in items}:
            inside = self._world.by_leaf.get(leaf, [])
            missing_here = sum(not difference.values[self._side] for difference in inside)
            if len(inside) == 1 or (len(inside) == 2 and missing_here < 2):
                pairs += [(leaf, difference.item) for difference in inside]
            elif inside:
                ranges.append((leaf.to_bytes(8, "big"), (leaf + 1).to_bytes(8, "big")))
        pairs += [(item, item) for item, _, _ in items if item in self._world.boundaries]
        return Located(sorted(set(pairs)), [], sorted(ranges))

    def list_ranges(self, located: Located) -> Located:
        """List what could not be told, as `srengine.storage.merkle` does above a kilobyte of rows."""
        listed = [Listed(start, stop, [b"sixsix"] * LISTED_RECORDS) for start, stop in located.ranges]
        return located._replace(ranges=[], listed=tuple(listed))

    def compare_listed(self, listed: tuple[Listed, ...]) -> tuple[list[bytes], tuple[Listed, ...]]:
        """Say that one record of each list is not here."""
        return [], tuple(Listed(start, stop, digests[:1]) for start, stop, digests in listed)

    def differing_leaves(self, dump: bytes | memoryview) -> Located:
        """Not asked for: it does not come to a dump."""
        raise NotImplementedError

    def rows_of(self, located: Located, since: int | None, *, bytes_max: int) -> Found:
        """Say which of the located records are not here; the rows themselves cost what they cost."""
        here = {difference.item for difference, _ in self._own()}
        return Found(
            b"",
            [pair for pair in located.pairs if pair[1] not in here],
            [item for item in located.ids if item not in here],
        )

    def meta(self, *, with_rows: bool) -> bytes:
        """Nothing."""
        return b""

    def settle(self, rows: bytes, absent: Located, extra: list[bytes]) -> Repair:
        """Nothing: what was located has been counted."""
        return Repair(b"", [], [], 0)

    @staticmethod
    def sequence_of(state: bytes) -> int:
        """Both stand still."""
        return 0

    @staticmethod
    def merge_rows(older: bytes, newer: bytes) -> bytes:
        """Nothing."""
        return b""


class Side:
    """One side of the world."""

    def __init__(self, world: World, side: int) -> None:
        """Look at side 0, the initiator, or 1, the responder."""
        self._moment = Moment(world, side)
        self.place = (self._moment.root, world.records, 0)

    def stands_at(self, where: bytes) -> bool:
        """They differ."""
        return False

    @contextmanager
    def moment(self, *, recount: bool = False) -> Iterator[Moment]:
        """Return the moment, which is always the same."""
        yield self._moment


def locate(world: World, seed: int, *, records: bool = False) -> Figures:
    """Run the exchange's machine up to the repair."""
    initiator = Initiator("t", Side(world, 0), random.Random(seed), prefer_records=records)
    responder = Responder(Side(world, 1))
    initiator.start()
    while True:
        effects = initiator.drain()
        if effects.announce is not None:
            responder.step(effects.announce.message)
            initiator.announced()
            continue
        if effects.send is None:
            assert effects.outcome is None, effects.outcome
            return initiator.figures
        initiator.step(*responder.step(effects.send.message))
