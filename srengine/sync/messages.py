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
    scrubbed_at: float = 0.0
    """Unix seconds when all records were last read and found to give the root, 0: never in this run."""
    scrub_records: int = 0
    """Records that the scrub under way has read; of the last one when none is."""
    repairs: int = 0
    """Repairs of this copy in this run, by exchange or record by record."""
    quarantined: tuple[str, ...] = ()
    """Replicas of this tablet with which the node does not exchange for now."""


class FetchRows(msgspec.Struct, frozen=True):
    """Ask a replica for the sound records of some keys; it answers those it has."""

    tablet: str
    keys: tuple[bytes, ...]


class FoundRows(msgspec.Struct, frozen=True):
    """Rows (docs/formats.md) travel as the one attachment."""

    count: int


class CheckKeys(msgspec.Struct, frozen=True):
    """Ask a replica to read these keys: damaged records are put right, and what it finds is compared.

    ``versions``: what the leader found at ``sequence``, 0: no record; compared only when the replica stands there, too.
    """

    tablet: str
    sequence: int
    keys: tuple[bytes, ...]
    versions: tuple[int, ...]


class CheckedKeys(msgspec.Struct, frozen=True):
    """How many of them the replica has otherwise; it doubts its copy then. ``compared``: whether it stood there."""

    different: int
    compared: bool


class Compare(msgspec.Struct, frozen=True):
    """Ask a replica whether it stands where this one does: root 16, count 8, sequence 8, as in an exchange."""

    tablet: str
    body: bytes


class Compared(msgspec.Struct, frozen=True):
    """One byte: 0 equal, 1 different at the same sequence, 2 at another sequence, which says nothing."""

    body: bytes


class RunRound(msgspec.Struct, frozen=True):
    """Ask a node to check its replicas (of one table) now, to compare them with their leaders, and to repair."""

    table: str = ""
    timeout_s: float = 600.0


class Round(msgspec.Struct, frozen=True):
    """What a round did with one replica, as docs/cli.md (sync run) shows it."""

    table: str
    tablet: int
    tablet_id: str
    node: str
    leader: str
    outcome: str
    records: int = 0
    damages: int = 0
    repaired: int = 0
    bytes: int = 0
    rounds: int = 0
    path: str = ""
    reason: str = ""


class RoundsReply(msgspec.Struct, frozen=True):
    """The rounds of the answering node."""

    rounds: tuple[Round, ...]


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
registry.register("sync.fetch_rows", FetchRows)
registry.register("sync.found_rows", FoundRows)
registry.register("sync.check_keys", CheckKeys)
registry.register("sync.checked_keys", CheckedKeys)
registry.register("sync.compare", Compare)
registry.register("sync.compared", Compared)
registry.register("sync.run_round", RunRound)
registry.register("sync.rounds", RoundsReply)
