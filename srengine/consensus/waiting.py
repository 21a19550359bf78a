"""Who waits for a group: proposals, reads and transfers, each with a token, a future and a time-out.

::

    proposal   Propose --> Accepted(index, term) --> an entry is applied at index --> same term: decided, else Conflict
    read       Read ----> ReadReady(index) --------> index is visible ------------> the index
    transfer   Transfer --> another node leads -----------------------------------> its id

Every one of them ends exactly once: so, by a refusal, by its time-out, or because the group or the node stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, assert_never

from srengine import errors
from srengine.alarm import Alarm
from srengine.consensus.effects import Accepted, ReadReady, Refused, Why
from srengine.consensus.entries import Entry
from srengine.types import NodeId

WAITING_MAX: Final = 65_536
"""Proposals, reads and transfers of a group that may wait at a time."""

PROPOSAL: Final = "proposal"
READ: Final = "read"
TRANSFER: Final = "transfer"


@dataclass(slots=True, eq=False)
class _Waiting:
    future: asyncio.Future[Any]
    what: str
    deadline: float
    timeout_s: float
    index: int = 0
    """Proposal: its place in the log, 0 before it is accepted. Read: what must be visible, 0 before that is known."""
    term: int = 0


class WaitingRoom:
    """Everybody who waits for one group."""

    def __init__(self, group: str, loop: asyncio.AbstractEventLoop) -> None:
        self._group = group
        self._loop = loop
        self._next_token = 1
        self._waiting: dict[int, _Waiting] = {}
        self._proposed: dict[int, list[int]] = {}
        """Tokens of accepted proposals by index."""
        self._reads: set[int] = set()
        """Tokens of reads that know their index."""
        self._alarm = Alarm(loop, self._look)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, token: int) -> bool:
        return token in self._waiting

    def begin(self, what: str, timeout_s: float) -> tuple[int, asyncio.Future[Any]]:
        """Return a token and the future that ends with it. `NotReady` when too many wait."""
        if len(self._waiting) >= WAITING_MAX:
            raise errors.NotReady(f"{WAITING_MAX} proposals and reads wait for {self._group}", group=self._group)
        token = self._next_token
        self._next_token += 1
        future: asyncio.Future[Any] = self._loop.create_future()
        deadline = self._loop.time() + timeout_s
        self._waiting[token] = _Waiting(future, what, deadline, timeout_s)
        self._alarm.at(deadline)
        return token, future

    def _look(self, now: float) -> float:
        """Let those go whose time is over; return when the next one's is."""
        for token, waiting in list(self._waiting.items()):
            if waiting.deadline <= now:
                message = f"a {waiting.what} in {self._group} did not end in {waiting.timeout_s:.3g} s"
                self.end(token, errors.TimedOut(message, group=self._group))
        return min((waiting.deadline for waiting in self._waiting.values()), default=float("inf"))

    def end(self, token: int, result: object) -> None:
        """Let one go, with a value or an error; nothing happens when it has gone already."""
        waiting = self._waiting.pop(token, None)
        if waiting is None:
            return
        self._reads.discard(token)
        if waiting.future.done():  # cancelled
            return
        if isinstance(result, errors.Error):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)

    def end_all(self, error: Callable[[], errors.Error]) -> None:
        """Let all go with an error, each with one of its own."""
        for token in list(self._waiting):
            self.end(token, error())
        self._proposed.clear()
        self._alarm.cancel()

    def accepted(self, accepted: Accepted) -> None:
        """Note where a proposal is in the log: it is decided when an entry is applied there."""
        waiting = self._waiting.get(accepted.token)
        if waiting is not None:
            waiting.index, waiting.term = accepted.index, accepted.term
            self._proposed.setdefault(accepted.index, []).append(accepted.token)

    def refused(self, refused: Refused) -> None:
        """Tell why nothing happened of a proposal, read or transfer."""
        self.end(refused.token, _refusal(self._group, refused))

    def read_ready(self, read: ReadReady, visible: int, leader: NodeId | None) -> None:
        """Note what a read waits for; index 0: nobody could confirm one."""
        waiting = self._waiting.get(read.token)
        if waiting is None:
            return
        if read.index == 0:
            self.end(read.token, no_leader(self._group, leader))
        elif read.index <= visible:
            self.end(read.token, visible)
        else:
            waiting.index = read.index
            self._reads.add(read.token)

    def applied(self, entry: Entry) -> None:
        """Decide the proposals at the place of an entry that is applied."""
        for token in self._proposed.pop(entry.index, ()):
            waiting = self._waiting.get(token)
            if waiting is None:
                continue
            if waiting.term == entry.term:
                self.end(token, (entry.index, entry.term))
            else:
                message = f"another leader's entry took the place {entry.index} of {self._group}: it was not decided"
                self.end(token, errors.Conflict(message, group=self._group, index=entry.index))

    def visible(self, index: int) -> None:
        """Let the reads go that waited for ``index`` or less to be visible."""
        for token in [token for token in self._reads if self._waiting[token].index <= index]:
            self.end(token, index)

    def replaced(self, index: int) -> None:
        """Give up the proposals up to ``index``: a state took the place of the entries, and does not tell of them."""
        for place in [place for place in self._proposed if place <= index]:
            for token in self._proposed.pop(place):
                message = f"a state at {index} took the place of the log of {self._group}: the outcome is not known"
                self.end(token, errors.TimedOut(message, group=self._group))

    def leads(self, leader: NodeId) -> None:
        """End transfers: another node leads."""
        for token, waiting in list(self._waiting.items()):
            if waiting.what == TRANSFER:
                self.end(token, leader)


def _refusal(group: str, refused: Refused) -> errors.Error:
    match refused.why:
        case Why.NOT_LEADER:
            return no_leader(group, refused.leader)
        case Why.BUSY | Why.FULL:
            what = refused.message or refused.why.value
            return errors.NotReady(f"{group} cannot take it now: {what}", group=group, why=refused.why.value)
        case Why.INVALID:
            return errors.InvalidValue(f"{group} refuses it: {refused.message or 'invalid'}", group=group)
    assert_never(refused.why)


def no_leader(group: str, leader: NodeId | None) -> errors.Error:
    """Return what somebody is told who asked a node that does not lead."""
    if leader is None:
        return errors.NoLeader(f"nobody is known to lead {group}", group=group)
    return errors.NotLeader(f"{leader} leads {group}", group=group, leader=leader)
