"""Messages of the sync room that are not those of every group (see `srengine.ha.messages`)."""

from __future__ import annotations

import msgspec

from srengine.codec import registry
from srengine.types import Position


class Copy(msgspec.Struct, frozen=True):
    """Ask on the bulk port for a snapshot of a tablet: answered by the items of `srengine.snapshot` as a stream.

    ``since``: a delta behind that position; None: a full copy. ``resume``: the mark of a copy that was interrupted.
    """

    tablet: str
    replica: str
    since: Position | None = None
    resume: bytes | None = None


class ReplicaStates(msgspec.Struct, frozen=True):
    """Ask a node for the state of its own replicas (of one table, when given)."""

    table: str = ""


class ReplicaState(msgspec.Struct, frozen=True):
    """One replica, as docs/cli.md (State) shows it. ``verified_at``: Unix seconds when its root was last proved, 0:
    never.
    """

    table: str
    tablet: str
    number: int
    node: str
    leader: str
    state: str
    sequence: int
    behind: int
    root: bytes
    count: int
    live_count: int
    term: int = 1
    verified_at: float = 0.0
    bytes_received: int = 0
    bytes_received_total: int = 0
    path: str = ""
    reason: str = ""
    trusted: bool = True


class ReplicaStatesReply(msgspec.Struct, frozen=True):
    """The replicas of the answering node, and what it says of itself."""

    replicas: tuple[ReplicaState, ...]
    name: str = ""
    node_id: str = ""
    state: str = ""
    ready: bool = True
    why: str = ""
    journal_index: int = 0
    disk_used: int = 0
    disk_free: int = 0
    alarms: tuple[str, ...] = ()


registry.register("sync.copy", Copy)
registry.register("sync.replica_states", ReplicaStates)
registry.register("sync.replica_states_reply", ReplicaStatesReply)
