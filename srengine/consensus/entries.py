"""What a group's log holds: entries, configurations, hard state.

Terms, indexes and votes are those of Raft (Ongaro and Ousterhout, 2014; Ongaro's thesis for single-step membership
change, pre-vote and leases). Nodes are named by their ids (`types.NodeId`), never by name or address: a wiped directory
is another node.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

import msgspec

from srengine.types import NodeId


class EntryKind(enum.IntEnum):
    """What an entry is for."""

    COMMAND = 0
    """``data`` is the state machine's."""
    NOOP = 1
    """The first entry of a leader's term."""
    CONFIGURATION = 2
    """``configuration`` is in force from the moment the entry is in the log; ``data`` is the state machine's too."""


class Configuration(msgspec.Struct, frozen=True):
    """Who belongs to a group. Both sorted, disjoint. ``voters`` is empty only before a group exists here."""

    voters: tuple[NodeId, ...] = ()
    learners: tuple[NodeId, ...] = ()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Everybody, sorted."""
        return tuple(sorted((*self.voters, *self.learners)))


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One place of the log. ``index`` counts from 1 without gaps; ``term`` never falls along the log."""

    index: int
    term: int
    kind: EntryKind
    data: bytes = b""
    configuration: Configuration | None = None
    """Set exactly when ``kind`` is CONFIGURATION."""


ENTRY_OVERHEAD_BYTES: Final = 64
"""What an entry counts beyond its data, so that empty ones are bounded, too."""
_NODE_BYTES: Final = 40
_data_of: Final = attrgetter("data")
_configuration_of: Final = attrgetter("configuration")


def entry_bytes(entry: Entry) -> int:
    """Return the bytes that an entry counts for in every bound."""
    size = len(entry.data) + ENTRY_OVERHEAD_BYTES
    if entry.configuration is not None:
        size += _NODE_BYTES * len(entry.configuration.nodes)
    return size


def bytes_of(entries: Sequence[Entry]) -> int:
    """Return the `entry_bytes` of all of them, without a call for each."""
    if len(entries) == 1:
        return entry_bytes(entries[0])
    if any(map(_configuration_of, entries)):
        return sum(map(entry_bytes, entries))
    return sum(map(len, map(_data_of, entries))) + ENTRY_OVERHEAD_BYTES * len(entries)


class HardState(msgspec.Struct, frozen=True):
    """What must be durable before a message that depends on it leaves. ``vote``: empty when none was given."""

    term: int = 0
    vote: str = ""


class Floor(msgspec.Struct, frozen=True):
    """What stands in for all entries up to ``index``, which are gone: (0, 0, empty) when none are.

    The state machine of the node has applied up to ``index`` at least, durably, before the log is trimmed to it.
    """

    index: int = 0
    term: int = 0
    configuration: Configuration = Configuration()
