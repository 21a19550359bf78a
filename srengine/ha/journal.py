"""The journal: the replicated log of commands behind catalog and members, as everybody but its backends sees it.

A command is *proposed* on any node, becomes an entry with the next index when a majority holds it durably, and is
applied everywhere in the order of indexes by the appliers of `metadata`. Backends implement `Journal`; `one_node` is
the plain one (the first member leads, nobody else ever does), a consensus group takes its place later.

Entries are chained: each carries the digest of everything before and itself, so equal (index, digest) means equal
journals.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final, Protocol

import msgspec

from srengine import errors, limits
from srengine.types import Position

DIGEST_BYTES: Final = 16
REQUEST_BYTES: Final = 16
TERM: Final = 1
"""Term of all entries until elections exist."""


class Command(msgspec.Struct, frozen=True):
    """What is to change. ``kind`` (``room.verb``) names the applier that reads ``body``.

    ``epoch``: of the leader that put it into the journal; where it is applied under another newest one, it changes
    nothing. A proposer leaves 0: the leader fills it in; one that acts for an epoch states it.
    ``request``: 16 random bytes of the proposer, or none; a command that comes twice is applied once.
    """

    kind: str
    body: bytes
    epoch: int = 0
    request: bytes = b""


class Entry(msgspec.Struct, frozen=True):
    """One place of the journal. ``digest``: of the previous digest and all other fields."""

    index: int
    term: int
    kind: str
    body: bytes
    digest: bytes

    @property
    def command(self) -> Command:
        """What is to change."""
        return Command(self.kind, self.body)


class Journal(Protocol):
    """What a node needs of the cluster's journal, whatever holds it."""

    @property
    def applied_index(self) -> int:
        """Index up to which this node has applied."""
        ...

    async def propose(self, command: Command, *, timeout_s: float = 10.0) -> int:
        """Return the command's index when a majority holds it and this node has applied it: its next read sees it.

        Raises what the applier raises (the entry then stands in the journal and changed nothing), `NoQuorum`,
        `NotReady`, `TimedOut` (whether it will stand is unknown).
        """
        ...

    def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """Yield (index, command) of every applied entry from ``from_index`` on, those of the past first, without
        end.
        """
        ...


def chained(before: bytes, index: int, command: Command, term: int = TERM) -> Entry:
    """Return the entry that follows ``before`` (the previous digest, 16 zero bytes at the beginning).

    >>> chained(bytes(16), 1, Command("a.b", b"")).digest.hex()
    'bffcaa184930f3c6a2b2ccc5e2afa992'
    """
    return Entry(index, term, command.kind, command.body, _digest(before, index, term, command))


def _digest(before: bytes, index: int, term: int, command: Command) -> bytes:
    state = hashlib.blake2b(before, digest_size=DIGEST_BYTES, person=b"srengine-journal")
    kind = command.kind.encode()
    for part in (index.to_bytes(8, "little"), term.to_bytes(8, "little"), len(kind).to_bytes(4, "little"), kind):
        state.update(part)
    state.update(command.body)
    return state.digest()


def check_chain(before: Position, entries: Sequence[Entry]) -> Position:
    """Return the position after ``entries``, or raise `Diverged` when they do not follow ``before`` exactly."""
    index, digest = before.sequence, before.root
    for entry in entries:
        index += 1
        expected = chained(digest, index, entry.command, entry.term)
        if entry != expected:
            raise errors.Diverged(f"journal entry {index} does not follow what is here", index=index)
        digest = entry.digest
    return Position(before.lineage, index, digest, index)


def encode_command(command: Command) -> bytes:
    """Return the command as the data of an entry."""
    return _encoder.encode(command)


def decode_command(data: bytes | memoryview) -> Command:
    """Return the command in an entry's data; `FrameError` for anything else."""
    try:
        command = _command_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise errors.FrameError(f"not a command: {error}") from error
    if not 0 <= command.epoch < 1 << 63 or len(command.request) not in {0, REQUEST_BYTES}:
        raise errors.FrameError(f"a command of epoch {command.epoch} with a request of {len(command.request)} bytes")
    return command


_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_decoder = msgspec.msgpack.Decoder(list[Entry])


def encode_entries(entries: Iterable[Entry]) -> bytes:
    """Return entries as bytes for the wire."""
    return _encoder.encode(list(entries))


def decode_entries(data: bytes | memoryview) -> list[Entry]:
    """Return the entries in ``data``; `FrameError` for anything else. A bounded reader: safe for bytes from
    anywhere.
    """
    if len(data) > limits.JOURNAL_PULL_BYTES_MAX + limits.JOURNAL_ENTRY_BYTES_MAX:
        raise errors.FrameError(f"{len(data)} bytes of journal entries are too many", bytes=len(data))
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise errors.FrameError(f"not a list of journal entries: {error}") from error
