"""The words of the project as types: ids, positions, records.

See docs/architecture.md for the vocabulary. Everything here is a value: no behaviour beyond rendering and comparing.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NewType

from srengine import errors, limits

NodeId = NewType("NodeId", str)
"""32 hexadecimal digits, random, kept in the data directory. Names and addresses are attributes of it."""
ClusterId = NewType("ClusterId", str)
TabletId = NewType("TabletId", str)
"""32 hexadecimal digits, random, minted when the tablet is created."""
Lineage = NewType("Lineage", str)
"""32 hexadecimal digits: a tablet's history."""
Sequence = NewType("Sequence", int)
"""Place of an operation in a tablet's history; 0 means "before the first"."""

_NAME = re.compile(limits.NAME_PATTERN, re.ASCII)


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may name a cluster, node, database, table, tablet or snapshot.

    Raises `InvalidValue` otherwise; ``what`` is the noun for the message.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        shown = repr(name) if len(repr(name)) < 80 else repr(name)[:76] + "..."
        raise errors.InvalidValue(
            f"{what} {shown} is not a valid name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit",
            what=what,
        )
    return name


class Position(NamedTuple):
    """Where a tablet stands: equal lineage and sequence mean equal root, anything else is damage.

    ``sequence`` counts from 1 (0: nothing applied yet); ``root`` is 16 bytes, the sum modulo 2^128 of the digests of
    all records and deterministic rows; ``count`` is the number of records, tombstones included.
    """

    lineage: str
    sequence: int
    root: bytes
    count: int  # type: ignore[assignment]  # a tuple's own count() is not missed


class Record(NamedTuple):
    """One record as stored. ``version`` is the sequence of the operation that wrote it."""

    key: bytes
    value: bytes
    version: int
    hybrid_clock: int
    tombstone: bool = False


# --- what the two sides of an exchange tell each other (docs/formats-exchange.md) ------------------------------------

KeyRange = tuple[bytes, bytes | None]
"""Keys in [start, stop); stop None: to the end."""
Item = tuple[int, int, int]
"""(id, value, weighted sum) of something that differs, ours minus theirs."""


class Listed(NamedTuple):
    """A range of keys, and the first 6 bytes of the digests of all records in it, or of the wanted ones."""

    start: bytes
    stop: bytes | None
    digests: list[bytes]


class Located(NamedTuple):
    """Where two tablets differ.

    ``pairs``: (leaf id, key id) of records; ``ids``: key ids alone (record mode); ``ranges``: of keys, shipped whole;
    ``listed``: ranges of which the digests are told first.
    """

    pairs: list[tuple[int, int]]
    ids: list[int]
    ranges: list[KeyRange]
    listed: tuple[Listed, ...] = ()


class Actual(NamedTuple):
    """What the records themselves add up to: root, count, live count, records with a change entry."""

    root: bytes
    count: int  # type: ignore[assignment]
    live_count: int
    entries: int


class Found(NamedTuple):
    """What a responder ships: rows of `pairs`, `ids` and `ranges` that it has, and which of them it does not have."""

    rows: bytes
    missing_pairs: list[tuple[int, int]]
    missing_ids: list[int]


class Repair(NamedTuple):
    """What an initiator has to do to be equal; ``report``: the keys that really differ.

    ``rows``: encoded rows to put, ``removed``: keys to take away, ``equal_bytes``: bytes of rows that came for nothing.
    """

    rows: bytes
    removed: list[bytes]
    report: list[bytes]
    equal_bytes: int
