"""A tablet in plain Python with the replica face of the real one: positions, deltas, roots, half-applied copies.

Everything that a method did is durable when it returns, like the real tablet; `ReferenceTablet.copy` is what a backup
of the directory would hold. Used by the simulations of groups; the arithmetic is that of docs/formats.md only in spirit
(a sum of digests), which is all that replication relies on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

from srengine import errors
from srengine.types import Position

Row = tuple[bytes, int, bytes | None]
"""key, sequence, value (None: tombstone)"""


class ReferenceDelta(NamedTuple):
    base_sequence: int
    base_root: bytes | None
    rows: tuple[Row, ...]
    position: Position


def _digest(row: Row) -> int:
    key, sequence, value = row
    text = b"%d|%b|%d|%b" % (len(key), key, sequence, b"\x00" if value is None else b"\x01" + value)
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def root_of(rows: Iterable[Row]) -> bytes:
    """Return the root of a set of rows, from nothing."""
    return (sum(map(_digest, rows)) % (1 << 128)).to_bytes(16, "little")


class ReferenceTablet:
    """One replica's copy."""

    def __init__(self, lineage: str, *, ring_entries: int = 1 << 30) -> None:
        self.lineage = lineage
        self.records: dict[bytes, Row] = {}
        self.sequence = 0
        self.filling = False
        self._ring_entries = ring_entries
        self._root = 0
        self._ring: dict[int, bytes] = {0: bytes(16)}

    @property
    def root(self) -> bytes:
        return self._root.to_bytes(16, "little")

    @property
    def position(self) -> Position:
        return Position(self.lineage, self.sequence, self.root, len(self.records))

    @property
    def whole(self) -> bool:
        """Whether the records give the root that the copy carries."""
        return root_of(self.records.values()) == self.root

    def rot(self, change: Callable[[dict[bytes, Row]], None]) -> None:
        """Change records behind the engine's back: the carried root stays what it was."""
        change(self.records)

    def forge(self, key: bytes, value: bytes) -> None:
        """Change a record with everything that belongs to it: whole, and of another history."""
        old = self.records.get(key)
        self._put((key, old[1] if old else self.sequence, value))
        self._ring = {self.sequence: self.root}

    def repair_by(self, other: ReferenceTablet, *, recount: bool) -> Position:
        """Become equal as an exchange does; `Diverged` when the sums do not reach the root of ``other``."""
        if not other.whole or not (recount or self.whole):
            raise errors.Diverged("the root was not reached")
        return self.replace_by(other)

    def root_at(self, sequence: int) -> bytes | None:
        return self._ring.get(sequence)

    def reopened(self) -> Self:
        """Return what a start finds on the disk: the ring of roots is gone but for the current one."""
        other = self.copy()
        other._ring = {other.sequence: other.root}
        return other

    def copy(self) -> Self:
        other = type(self)(self.lineage, ring_entries=self._ring_entries)
        other.records = dict(self.records)
        other.sequence, other.filling, other._root = self.sequence, self.filling, self._root
        other._ring = dict(self._ring)
        return other

    def apply(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> Position:
        """Write pairs (None deletes) as one entry."""
        for key, value in pairs:
            self._put((key, self.sequence + 1, value))
            self.sequence += 1
        self._remember()
        return self.position

    def _put(self, row: Row) -> None:
        old = self.records.get(row[0])
        if old is not None:
            self._root -= _digest(old)
        self._root = (self._root + _digest(row)) % (1 << 128)
        self.records[row[0]] = row

    def _remember(self) -> None:
        self._ring[self.sequence] = self.root
        while len(self._ring) > self._ring_entries:
            del self._ring[next(iter(self._ring))]

    def delta_since(self, sequence: int, *, rows_max: int) -> ReferenceDelta | None:
        rows = sorted((row for row in self.records.values() if row[1] > sequence), key=lambda row: row[1])
        if len(rows) > rows_max:
            return None
        return ReferenceDelta(sequence, self.root_at(sequence), tuple(rows), self.position)

    def apply_delta(self, delta: ReferenceDelta) -> Position:
        if delta.base_sequence != self.sequence or (delta.base_root is not None and delta.base_root != self.root):
            raise errors.Diverged(f"the delta starts at {delta.base_sequence}, the tablet stands at {self.sequence}")
        trial = self.copy()
        for row in delta.rows:
            trial._put(row)
        if trial.root != delta.position.root or len(trial.records) != delta.position.count:
            raise errors.Diverged(f"the delta does not end at the root of {delta.position.sequence}")
        self.records, self._root, self.sequence = trial.records, trial._root, delta.position.sequence
        self._remember()
        return self.position

    def replace_by(self, other: ReferenceTablet) -> Position:
        """Switch to a proved full copy."""
        self.lineage, self.records, self.sequence = other.lineage, dict(other.records), other.sequence
        self._root, self.filling = other._root, False
        self._ring = {self.sequence: self.root}
        return self.position
