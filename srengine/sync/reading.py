"""What a read found, and reading itself: records of keys, pairs of a range, both with the version they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from srengine.storage import Tablet
from srengine.types import Record

PAIR_OVERHEAD_BYTES = 8


class Found(NamedTuple):
    """Records of the first keys, in their order; None: there is none, or a tombstone.

    ``depends_on``: the highest version met, tombstones included: the answer may leave once that is committed.
    """

    records: list[Record | None]
    depends_on: int


class Range(NamedTuple):
    """Pairs of a range; ``done``: nothing of it is left. ``depends_on``: the sequence of the view that was read."""

    pairs: list[tuple[bytes, bytes]]
    done: bool
    depends_on: int


def read_keys(tablet: Tablet, keys: Sequence[bytes], *, bytes_max: int) -> Found:
    """Look keys up, at least one, then while the values fit into ``bytes_max``. Blocks."""
    records: list[Record | None] = []
    depends_on = size = 0
    for key in keys:
        record = tablet.get_record(key, tombstones=True)
        if record is not None:
            size += len(record.value)
            if records and size > bytes_max:
                break
            depends_on = max(depends_on, record.version)
        records.append(None if record is None or record.tombstone else record)
    return Found(records, depends_on)


def read_range(
    tablet: Tablet,
    *,
    start: bytes | None,
    stop: bytes | None,
    reverse: bool,
    limit: int,
    bytes_max: int,
    keys_only: bool,
) -> Range:
    """Read pairs in key order from one view, at least one unless there is none. ``limit`` 0: no limit. Blocks."""
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    with tablet.view() as view:
        depends_on = view.position.sequence
        for key, value in view.scan(start=start, stop=stop, reverse=reverse, limit=limit + 1 if limit else None):
            shown = b"" if keys_only else value
            size += len(key) + len(shown) + PAIR_OVERHEAD_BYTES
            if pairs and (size > bytes_max or (limit and len(pairs) >= limit)):
                return Range(pairs, done=False, depends_on=depends_on)
            pairs.append((key, shown))
    return Range(pairs, done=True, depends_on=depends_on)
