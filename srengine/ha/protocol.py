"""`HAProtocol`: who leads, who belongs, what is agreed on; what every backend of coordination offers a node.

The verbs are those of BDB HA coordination (fencing, leader lookup, electable and observer nodes, unstable nodes,
transfer) and a replicated `journal.Journal`. Built-in backends: ``raft`` (embedded) and ``etcd`` (an existing etcd);
third-party ones are found by the entry point group ``srengine.ha``. One contract suite runs on all of them
(tests/ha/contract).

Two kinds of state, kept apart:

* *Observed*: what the election says at this moment (`Observed`): may be old, may be unknown, decides nothing alone.
* *Agreed*: epochs, members, catalog: applied from the journal, the same on every node at the same index.

A node that the election names may act as leader only after `HAProtocol.fencing` has returned True: then an entry of the
journal says that it owns the newest epoch, and every command that it proposes carries that epoch. An entry of an older
epoch changes nothing wherever it is applied (`errors.StaleEpoch` is its refusal).
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

from srengine import errors
from srengine.ha.journal import Command, Journal
from srengine.ha.members import MemberRole

ENTRY_POINTS: Final = "srengine.ha"
"""Group of entry points; each names a callable that takes a `backends.Surroundings` and returns an `HAProtocol`."""


class Role(enum.Enum):
    """The state of a node as everybody sees it (docs/cli.md, State)."""

    INIT = "INIT"
    """Started, nothing heard yet."""
    FOLLOWER = "FOLLOWER"
    LEADER = "LEADER"
    OBSERVER = "OBSERVER"
    UNKNOWN = "UNKNOWN"
    """Was in contact, has none now; or an election goes on."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the election says. ``leader``: name, None while unknown. ``term``: grows with every election."""

    role: Role
    leader: str | None
    term: int
    reason: str = ""


class Fencing(enum.Enum):
    """How one attempt to insert an epoch ended."""

    SUCCESS = "SUCCESS"
    KEYEXIST = "KEYEXIST"
    """Another node owns that epoch; final."""
    ERROR = "ERROR"
    """It is not known, or could not be tried; tried again."""


class Acknowledge(enum.Enum):
    """When a proposer is answered. What is kept and what is applied does not depend on it."""

    NONE = "none"
    """When the leader has taken the command: it may be lost with the leader, and a refusal is not told."""
    MAJORITY = "majority"
    ALL = "all"
    """When every member that votes has applied it, too."""


class HAProtocol(Journal, Protocol):
    """One backend, on one node. Started and used on the node's event loop.

    Every call may raise `NoQuorum`, `UnknownMaster`, `TimedOut`, `Closed`, besides what it names.
    """

    @property
    def backend(self) -> str:
        """Name of the backend: ``raft``, ``etcd`` or that of an entry point."""
        ...

    async def start(self) -> None:
        """Begin to take part."""
        ...

    async def stop(self) -> None:
        """Stop taking part; whoever waits gets `Closed`. Idempotent."""
        ...

    @property
    def removed(self) -> errors.Removed | None:
        """Why this node belongs to the cluster no more, None while it does: its process must end with it."""
        ...

    @property
    def observed(self) -> Observed:
        """What the election says now."""
        ...

    def observe(self) -> AsyncIterator[Observed]:
        """Yield what the election says, now and at every change, in order, without end; none is left out.

        A node that becomes an observer, or a follower again, is UNKNOWN in between.
        """
        ...

    async def resign(self, reason: str) -> None:
        """Give up leadership, if the election names this node, so that another election begins: fencing failed, or a
        promotion. Nothing happens elsewhere; never raises for a reason of the network.
        """
        ...

    async def fencing(self) -> bool:
        """Insert epoch = newest + 1 for this node; True when this node owns it. Retried as the options say after ERROR;
        KEYEXIST is final. Only a node that the election names calls it.
        """
        ...

    @property
    def epoch(self) -> int:
        """The epoch that this node owns and acts for; 0 when it owns none."""
        ...

    async def propose(
        self, command: Command, *, timeout_s: float = 10.0, acknowledge: Acknowledge = Acknowledge.MAJORITY
    ) -> int:
        """See `journal.Journal.propose`. Epochs and membership are always acknowledged by a majority at least. The
        index is 0 with NONE: it is not known yet.
        """
        ...

    async def get_leader(self) -> str:
        """Return the client address of the leader; `UnknownMaster`."""
        ...

    async def get_leader_name(self) -> str:
        """Return the name of the leader; `UnknownMaster`."""
        ...

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        """Return the names of the members that may become leader (stable followers), sorted."""
        ...

    async def get_observer_nodes(self) -> list[str]:
        """Return the names of the observers, sorted."""
        ...

    async def get_latest_epoch(self) -> int:
        """Return the newest epoch, 0 before the first; linearizable."""
        ...

    async def add_node(
        self,
        name: str,
        node_id: str,
        address: str,
        *,
        role: MemberRole = "follower",
        public_key: str = "",
        ticket: bytes = b"",
    ) -> None:
        """Add a member; a follower begins as an unstable node (a learner). Whoever holds the name or the address, as
        this node knows it, is replaced in the same entry; `Conflict` when that is not so any more (see members.py),
        `Removed` for an id that was removed, `Denied` for a ticket, `InvalidValue`.
        """
        ...

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """Remove a member: `MasterState` for the leader, `MemberNotFound`, `NoQuorum` when what is left alive would be
        no majority and not ``force``.
        """
        ...

    async def set_role(self, name: str, role: MemberRole, *, force: bool = False) -> None:
        """Make a follower an observer, or an observer an (unstable) follower. As `remove_node`."""
        ...

    async def update_address(self, name: str, address: str) -> None:
        """Change a member's address. `MemberNotFound`, `Conflict` when the address is taken."""
        ...

    async def add_unstable_node(self, name: str) -> None:
        """Make a follower a learner until it has caught up. `MemberNotFound`, `MasterState` for the leader."""
        ...

    async def remove_unstable_node(self, name: str) -> None:
        """Make an unstable node a voter; it has caught up. `MemberNotFound`, `NotReady` when it has not."""
        ...

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """Hand leadership over and return the new leader's name. `MasterState` when this is not possible now (nothing
        changed), `MemberNotFound`.
        """
        ...

    @property
    def current(self) -> bool:
        """Whether this node is in contact and has applied all that was called committed `limits.STALENESS_S_MAX` ago,
        or later.
        """
        ...

    async def read_barrier(self, *, timeout_s: float = 10.0) -> int:
        """Return the index that this node has applied and at which reads of its state are linearizable."""
        ...
