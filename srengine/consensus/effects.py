"""What goes into a group's machine and what comes out: the contract between `machine.RaftMachine` and its driver.

Time: the driver calls ``tick(now)`` (CLOCK_BOOTTIME) before each turn of `step`, with the time read *after* the turn's
inputs arrived, and again at ``next_deadline``. A voter counts its promises from there.

The driver's duties, in this order, for every `Effects`, until `drain` has nothing more (``while effects := drain()``)::

    receive -> step -> persist -> send -> apply

1. *persist*: hard state, truncation and new entries of all groups in one durable transaction. A driver that cannot
   persist stops or fences the group; it never sends what depends on it.
2. After it, ``step(Persisted(...))`` for each group that had something to persist (more effects may follow), and then
   *send*. Messages may be lost.
3. *apply*: committed entries in order, each once, whoever leads then. The driver tells ``step(Applied(index))`` once
   they are durable in the state machine.
4. *install*: after everything that was handed to *apply*: fetch the state, put it in place durably, reset the log to
   its floor, then ``step(Installed(...))``, or ``step(InstallFailed(...))`` (after a pause: the leader offers it again
   at its next heartbeat). Nothing is handed to *apply* between the two.

What depends on nothing that is to be persisted comes in an `Effects` of its own, before the one that persists: the
messages of a leader do not wait for its next entries.

Between a `drain` with something to persist and its ``Persisted`` the driver steps nothing into that group; it goes on
to `tick` and `drain` it, so that a leader beats on, and gives up when its own disk hangs. What such a drain says may be
sent at once: it depends on nothing that is being persisted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import msgspec

from srengine.consensus.entries import Configuration, Entry, Floor, HardState
from srengine.consensus.messages import Message
from srengine.types import NodeId

# --- what goes in ----------------------------------------------------------------------------------------------------


class Received(msgspec.Struct, frozen=True):
    """A message for this group arrived; its sender was checked."""

    message: Message


class Propose(msgspec.Struct, frozen=True):
    """Append ``data`` if this node leads; answered by `Accepted` or `Refused` with the token.

    With ``configuration`` it is a change of membership: single-step (one voter more or less, any learners), refused
    while another is not committed or before an entry of the own term is committed (`Why.BUSY`). Whether those who are
    left are alive and caught up is the caller's question: see `RaftMachine.progress`.
    """

    token: int
    data: bytes
    configuration: Configuration | None = None


class Read(msgspec.Struct, frozen=True):
    """Answer with a `ReadReady` when reads at that index are linearizable; a follower asks the leader."""

    token: int


class Persisted(msgspec.Struct, frozen=True):
    """Everything drained so far is durable; ``last_index`` is the log's."""

    last_index: int


class Applied(msgspec.Struct, frozen=True):
    """The state machine holds everything up to ``index`` durably."""

    index: int


class Installed(msgspec.Struct, frozen=True):
    """The state at ``floor`` is in place, durably, and the log begins behind it: entries after it stay if the entry at
    it has its term or it lies below the log's former floor. It may be later than what `InstallState` offered.
    """

    floor: Floor


class InstallFailed(msgspec.Struct, frozen=True):
    """The state could not be fetched; the leader will offer it again."""

    index: int


class Trimmed(msgspec.Struct, frozen=True):
    """The log was trimmed to this floor, which the machine named by `RaftMachine.floor_at`: applied durably.

    ``reference``: where followers that need what is gone fetch the state (`messages.Install`); None: as before. At its
    start the driver of a log with a floor steps one with that floor, to say the reference.
    """

    floor: Floor
    reference: bytes | None = None


class Transfer(msgspec.Struct, frozen=True):
    """Hand leadership to ``target`` (None: to the voter that holds most). It worked when `RoleChanged` says so; else
    `Refused` says why, also when the time for it is over (then this node goes on to lead, without leases in this term).
    """

    token: int
    target: NodeId | None = None


class Hint(msgspec.Struct, frozen=True):
    """The connection to ``peer`` closed, or it refused hello: if it leads, it may be dead. Starts a candidate early,
    shortens no promise.
    """

    peer: NodeId


class StepDown(msgspec.Struct, frozen=True):
    """Give up leadership: the own disk overran its time, or the process ends. Nothing happens on a follower."""

    reason: str


class Trust(msgspec.Struct, frozen=True):
    """Whether this node may vote: False until its directory is known not to be behind what it once promised.

    ``held``: (term, index) of the furthest log that any voter was found to hold, where votes are given back although
    most directories are lost: whoever holds less gets no vote of this node, and it does not stand itself.
    """

    trusted: bool
    held: tuple[int, int] = (0, 0)


Input = (
    Received
    | Propose
    | Read
    | Persisted
    | Applied
    | Installed
    | InstallFailed
    | Trimmed
    | Transfer
    | Hint
    | StepDown
    | Trust
)

# --- what comes out --------------------------------------------------------------------------------------------------


class Persist(msgspec.Struct, frozen=True):
    """Make this durable: first cut the log so that ``entries[0].index`` is next (when there are any), then append."""

    hard_state: HardState | None = None
    entries: tuple[Entry, ...] = ()


class Outgoing(msgspec.Struct, frozen=True):
    """One message to one node."""

    target: NodeId
    message: Message


class Accepted(msgspec.Struct, frozen=True):
    """The proposal is in the own log at (index, term). It is decided when an entry is applied at that index: it is this
    one exactly when the terms are equal.
    """

    token: int
    index: int
    term: int


class Why(enum.Enum):
    """Why a proposal, read or transfer was refused; nothing of it happened."""

    NOT_LEADER = "not leader"
    BUSY = "busy"
    """A change of membership or a transfer is going on, or the term has no committed entry yet: try again."""
    INVALID = "invalid"
    """The configuration is not one step away, or has no voter; the entry is too large; the target is no voter."""
    FULL = "full"
    """Too much is not committed yet."""


class Refused(msgspec.Struct, frozen=True):
    """``leader``: who leads as far as known."""

    token: int
    why: Why
    leader: NodeId | None
    message: str = ""


class ReadReady(msgspec.Struct, frozen=True):
    """Wait until ``index`` is applied, then read. Index 0: leadership could not be confirmed; ask again."""

    token: int
    index: int


class InstallState(msgspec.Struct, frozen=True):
    """Fetch and put in place the state at ``floor`` from ``source``; see the driver's duties."""

    source: NodeId
    floor: Floor
    reference: bytes


class Role(enum.Enum):
    """What the node is in this group."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"
    LEARNER = "learner"


class RoleChanged(msgspec.Struct, frozen=True):
    """For the log, the metrics and the service above. ``leader``: None while unknown."""

    role: Role
    term: int
    leader: NodeId | None
    reason: str


class Effects(msgspec.Struct, frozen=True):
    """In the order of the driver's duties; see the module's text."""

    persist: Persist | None = None
    send: tuple[Outgoing, ...] = ()
    apply: tuple[Entry, ...] = ()
    accepted: tuple[Accepted, ...] = ()
    refused: tuple[Refused, ...] = ()
    reads: tuple[ReadReady, ...] = ()
    install: InstallState | None = None
    roles: tuple[RoleChanged, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self != NOTHING


NOTHING = Effects()


# --- what a machine is given -----------------------------------------------------------------------------------------


class LogReader(Protocol):
    """The group's durable log, as of the last *persist*. Reading it is a pure function of what was persisted."""

    @property
    def floor(self) -> Floor:
        """What stands in for the trimmed entries."""
        ...

    @property
    def last_index(self) -> int:
        """Index of the last entry, the floor's when there is none."""
        ...

    def term_at(self, index: int) -> int | None:
        """Return the term at ``index``; None below the floor or above the last. The floor's own term is known."""
        ...

    def entries(self, start: int, stop: int, bytes_max: int) -> tuple[Entry, ...]:
        """Return entries in [start, stop), at least one if there is one, then up to ``bytes_max``."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ``0 < heartbeat_s < lease_s <= election_s_min < election_s_max``.

    ``lease_s``: a voter promises, with every answer to a heartbeat, to vote for nobody for so long from receipt; the
    leader counts it from sending, less ``drift`` (a fraction). A voter that has just started promises it to whoever may
    have had its word. ``lease_reads``: whether a leader with a lease answers reads without asking the others.
    ``news_s``: how long the news that more is committed may wait for a message to go with.
    """

    heartbeat_s: float = 0.1
    lease_s: float = 0.5
    election_s_min: float = 1.0
    election_s_max: float = 2.0
    drift: float = 0.01
    lease_reads: bool = False
    news_s: float = 0.0

    def __post_init__(self) -> None:
        assert 0 < self.heartbeat_s < self.lease_s <= self.election_s_min < self.election_s_max, self
        assert 0 <= self.drift < 1, self.drift
        assert 0 <= self.news_s <= self.heartbeat_s, self.news_s
