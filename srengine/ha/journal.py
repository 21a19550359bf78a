"""The journal: the replicated log of commands behind catalog and members, as everybody but its backends sees it.

A command is *proposed* on any node, becomes an entry with the next index when a majority holds it durably, and is
applied everywhere in the order of indexes by the appliers of `metadata`. Backends implement `Journal` (backends/).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

import msgspec

from srengine import errors

REQUEST_BYTES: Final = 16
_REQUESTS_DRAWN: Final = 256
"""Request ids drawn from the system at a time: to ask it for each costs more than to send the command."""

_requests: Final[deque[bytes]] = deque()
# A forked child would propose under the ids of its parent.
os.register_at_fork(after_in_child=_requests.clear)


def new_request() -> bytes:
    """Return a request id that nobody else has: random bytes. In any thread."""
    try:
        return _requests.pop()
    except IndexError:
        drawn = os.urandom(_REQUESTS_DRAWN * REQUEST_BYTES)
        ids = [drawn[start : start + REQUEST_BYTES] for start in range(0, len(drawn), REQUEST_BYTES)]
        _requests.extend(ids[1:])
        return ids[0]


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
