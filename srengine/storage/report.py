"""What a check of stored data found, as values that a program can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

DAMAGES_MAX: Final = 10_000
"""Damages kept in one report; the rest is only counted."""


class Damage(NamedTuple):
    """One damaged thing. What does not apply is None.

    ``kind`` is a stable word: missing, foreign, truncated, meta, page-number, page-header, node, key-order, overflow,
    used-twice, beyond-end, free-list, lost-page, tree, record, change, root, count, row, fenced, permissions, file; of
    a node's log: hard-state, floor, tail, mark, entry, missing-entry, replaced-entry, stray-entry, log; of its
    epochs: epoch.
    ``file`` is relative to the checked directory; ``key`` is a record's.
    """

    kind: str
    file: str
    detail: str
    tablet: str | None = None
    page: int | None = None
    key: bytes | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the key as hexadecimal."""
        return {
            "kind": self.kind,
            "file": self.file,
            "tablet": self.tablet,
            "page": self.page,
            "key": None if self.key is None else self.key.hex(),
            "detail": self.detail,
        }


@dataclass(slots=True)
class VerifyReport:
    """The result of a check: clean if and only if nothing is damaged.

    ``tablets``, ``records`` (tombstones included), ``pages`` and ``bytes`` say how much was read, so that "nothing
    found" cannot mean "nothing looked at". ``dropped`` counts damages past `DAMAGES_MAX`.
    """

    tablets: int = 0
    records: int = 0
    pages: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    dropped: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    def add(self, damage: Damage) -> None:
        """Record a damage, or count it when there are too many."""
        if len(self.damages) < DAMAGES_MAX:
            self.damages.append(damage)
        else:
            self.dropped += 1

    def include(self, other: VerifyReport) -> None:
        """Add what another check found and read."""
        self.tablets += other.tablets
        self.records += other.records
        self.pages += other.pages
        self.bytes += other.bytes
        self.dropped += other.dropped
        for damage in other.damages:
            self.add(damage)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as ``srengine verify -o json`` prints it."""
        return {
            "clean": self.clean,
            "tablets": self.tablets,
            "records": self.records,
            "pages": self.pages,
            "bytes": self.bytes,
            "damages": [damage.as_dict() for damage in self.damages],
            "damages_dropped": self.dropped,
        }
