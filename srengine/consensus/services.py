"""What the driver needs of the world around it, and what it tells about itself."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from srengine import errors, limits
from srengine.consensus.effects import Effects, Input, Role
from srengine.consensus.entries import Entry, Floor
from srengine.consensus.messages import Bundle
from srengine.types import NodeId


class Machine(Protocol):
    """A group's machine: `machine.RaftMachine`."""

    @property
    def next_deadline(self) -> float:
        """Return when `tick` has something to do if nothing comes before; infinite: never."""
        ...

    trusted: bool
    """Whether this node may vote and lead in the group."""

    @property
    def awaited_index(self) -> int | None:
        """Return the lowest index behind which a peer that is there still lacks entries of this leader; None: none."""
        ...

    def step(self, given: Input) -> None:
        """Take one input."""
        ...

    def tick(self, now: float) -> None:
        """Take the time."""
        ...

    def pass_time(self, now: float) -> None:
        """`tick` before `next_deadline`: take the time, and nothing else happens."""
        ...

    def drain(self) -> Effects:
        """Return what is to be done; `effects.NOTHING` itself when there is nothing."""
        ...


class StateMachine(Protocol):
    """What a group's committed entries are applied to."""

    @property
    def applied(self) -> Floor:
        """Return what it holds durably; read on the loop, too."""
        ...

    def apply(self, entries: Sequence[Entry]) -> None:
        """Apply committed entries, of every kind, in order, each once; when this returns they are visible.

        Called in the driver's apply thread, never twice at a time. `DiskFull`: nothing of it happened, and it is called
        again. Any other exception ends the group on this node.
        """
        ...

    def apply_now(self, entries: Sequence[Entry]) -> bool:
        """`apply` on the event loop, if that takes no more than moments: no disk, no waiting for anybody; return
        whether it was done. Called while nothing else is applied; `apply` is called instead after False.
        """
        ...

    def flush(self) -> None:
        """Make durable what is visible: `applied` says so then; as it was: not now, it is called again in a while.
        Called as `apply` is, in the same thread, and may fail in the same ways; never while everything is durable.
        `apply_now` may be called meanwhile.
        """
        ...


class StateSource(Protocol):
    """Offers a group's whole state to nodes that lack entries which are gone."""

    def reference(self, floor: Floor) -> bytes:
        """Return what another node needs to fetch a state at ``floor.index`` or later from this one."""
        ...


class StateSink(Protocol):
    """Fetches a group's whole state from another node."""

    async def fetch(self, source: NodeId, floor: Floor, reference: bytes) -> Callable[[], Floor]:
        """Fetch a state at ``floor.index`` or later and prove it, without touching the one in place.

        Return a function that puts it in place durably and returns its floor; it is called in the apply thread, after
        everything that was handed to it. Raises a typed error when the state cannot be had.
        """
        ...


class PostChannel(Protocol):
    """What the driver needs of `transport.Channel`."""

    on_down: Callable[[errors.Error], None] | None

    @property
    def connected(self) -> bool:
        """Return whether a connection stands."""
        ...

    def post(self, message: Bundle) -> bool:
        """See `transport.Channel`."""
        ...

    def wake(self) -> None:
        """See `transport.Channel`."""
        ...


class Peers(Protocol):
    """Finds the way to a node."""

    def channel(self, node: NodeId) -> PostChannel | None:
        """Return the channel to the node's peer port, the same one while it is good; None: its address is not known."""
        ...


class Health(enum.Enum):
    """How the log's disk is."""

    OK = "ok"
    SLOW = "slow"
    """A transaction takes longer than it may; leadership is given up."""
    FULL = "full"
    """No space: nothing is promised until there is, which is tried again by itself."""
    FENCED = "fenced"
    """It failed; final for this process."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """``persist_s_max``: a transaction of the log that takes longer is reported as slow.

    ``entries_kept``, ``bytes_kept``: what stays in a group's log behind what is applied, for nodes that lag a little;
    beyond either the log is trimmed. What a node that is there still lacks stays up to ``bytes_kept``.
    """

    persist_s_max: float = 0.5
    entries_kept: int = 10_000
    bytes_kept: int = 64 * limits.MIB

    def __post_init__(self) -> None:
        assert self.persist_s_max > 0, self.persist_s_max
        assert self.entries_kept >= 0, self.entries_kept
        assert self.bytes_kept >= 0, self.bytes_kept


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """How a group stands on this node, for people and metrics. ``leader`` None: not known."""

    role: Role
    term: int
    leader: NodeId | None
    floor_index: int
    last_index: int
    applied_index: int
    """As far as the state machine shows entries."""
    waiting: int
    """Proposals, reads and transfers that wait for their end."""
    trusted: bool
    damage: str | None
    """What was found damaged in the log and is not made good yet."""
    failed: errors.Error | None
    """Why the group takes part no more."""
