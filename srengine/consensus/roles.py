"""What a machine remembers besides term, vote and log: one class for each role, and nothing that does not apply.

::

    Follower --time-out, Hint--> PreCandidate --majority would--> Candidate --majority did--> Leader
        ^------- refused, or a leader is heard -----+--------------------+                       |
        +-------- higher term, no contact with a majority, own disk hangs, StepDown, removed ----+

A follower that is no voter (learner, removed, no group yet) never leaves its role. `TimeoutNow` and a group of one skip
the PreCandidate.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from srengine.consensus.progress import Progress
from srengine.types import NodeId


@dataclass(slots=True)
class Follower:
    """Also a learner, and a node without a group."""

    campaign_at: float
    """When to stand for election (a non-voter: when to call the leader unknown), unless a leader is heard before."""
    timeout_s: float
    """How long the silence of a leader is borne; drawn anew each time this role is entered."""
    leader: NodeId | None = None
    """Who leads the current term, as far as known."""
    round: int = 0
    """The leader's newest heartbeat; for an answer that it did not just ask for."""
    early_campaigns: int = 0
    """How many more campaigns follow each other quickly: the leader is probably dead."""


@dataclass(slots=True)
class PreCandidate:
    """Asks who would vote for it; nothing is promised and the term stays."""

    votes: dict[NodeId, bool]
    campaign_at: float
    early_campaigns: int


@dataclass(slots=True)
class Candidate:
    """Stands for election in the current term."""

    votes: dict[NodeId, bool]
    campaign_at: float
    early_campaigns: int
    transfer: bool
    """The last leader asked for it."""


@dataclass(slots=True)
class Inquiry:
    """A follower's question to the leader, on behalf of several reads."""

    number: int
    tokens: list[tuple[int, float]]
    """(token, when it expires)."""
    ask_at: float
    """When to ask again."""


@dataclass(slots=True)
class WaitingRead:
    """A linearizable read at a leader."""

    origin: NodeId | None
    """Who asked; None: this node."""
    token: int
    index: int = 0
    """The commit index after the read was asked for; 0 until an entry of the own term is committed."""
    round: int = 0
    """The first heartbeat round that began after ``index`` was set; 0: it has not begun."""


@dataclass(slots=True)
class Transferring:
    """Leadership is being handed over; proposals are refused."""

    target: NodeId
    token: int
    until: float


@dataclass(slots=True)
class Departing:
    """A removed node that has to learn of it."""

    index: int
    """The entry that removed it."""
    until: float
    told_round: int = 0
    """The heartbeat round that first told it that ``index`` is committed; 0: none yet."""


@dataclass(slots=True)
class Leader:
    """Leads the current term."""

    first_index: int
    """The first entry of the term: until it is committed, reads and changes of membership wait."""
    elected_at: float
    peers: dict[NodeId, Progress]
    """Everybody else of the configuration, and those that are departing."""
    heartbeat_at: float
    """When the next heartbeat round is due."""
    news_at: float = float("inf")
    """When those hear that more is committed who were not told yet; infinite when nobody waits for it."""
    round: int = 0
    """The newest heartbeat round; counts from 1."""
    rounds: deque[tuple[int, float]] = field(default_factory=deque)
    """(round, when it began), the last ROUNDS_KEPT_MAX."""
    contact_at: float = float("-inf")
    """The newest moment after which a majority, this node included, is known to have followed."""
    leases: bool = True
    """False after a TimeoutNow: its target may campaign at any time in this term, past every promise."""
    uncommitted: deque[tuple[int, int]] = field(default_factory=deque)
    """(index, bytes) of own entries that are not committed."""
    uncommitted_bytes: int = 0
    reads: deque[WaitingRead] = field(default_factory=deque)
    transfer: Transferring | None = None
    departing: dict[NodeId, Departing] = field(default_factory=dict)


State = Follower | PreCandidate | Candidate | Leader
