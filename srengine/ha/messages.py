"""What the nodes of a group say to each other: one question, one answer, the same for the journal and for every tablet.

A replica sends `Pull` to the leader: an acknowledgement of what it holds durably, and the question for more. The leader
of a group that starts and lacks something sends `Fetch` to a replica. Both are answered by `PullReply`; rows travel as
attachments (journal: one, the entries; tablet: three, rows, meta and state of a `Delta`).
"""

from __future__ import annotations

import msgspec

from srengine.codec import registry
from srengine.types import Position

JOURNAL_GROUP = "journal"
"""Name of the journal's group; tablets' groups are named by their id."""


class ProcessId(msgspec.Struct, frozen=True):
    """One run of a node, see `roster_machine.Process`."""

    node_id: str
    boot_number: int
    nonce: str


class Pull(msgspec.Struct, frozen=True):
    """Say "I hold this durably; what comes next?".

    ``number`` grows with every question of a process, so that a duplicated or late frame is recognised.
    ``leader_seen``: the highest process of the leader's node that this replica has ever seen, which tells a restored
    leader that it is one.
    """

    group: str
    replica: str
    process: ProcessId
    number: int
    position: Position
    term: int = 1
    copied: bool = False
    trusted: bool = True
    filling: bool = False
    committed_known: int = 0
    leader_seen: ProcessId | None = None
    check: str = ""
    """A value of `srengine.ha.proof.Check`: what came out when the replica added its records up."""


class Fetch(msgspec.Struct, frozen=True):
    """Ask for what comes after a position: read-only, counts for nothing; a leader that recovers asks it."""

    group: str
    replica: str
    position: Position
    filling: bool = False


class PullReply(msgspec.Struct, frozen=True):
    """The answer.

    ``state`` is a value of `follower_machine.SourceState`, or ``stale_boot`` or ``duplicate``
    (`roster_machine.Verdict`; ``highest`` is the boot number to get above). ``source``: the answering copy's position.
    With ``delta``: it starts at (``base_sequence``, ``base_root``) and ends at ``target``.
    """

    state: str
    source: Position
    process: ProcessId
    committed: int = 0
    term: int = 1
    target: Position | None = None
    base_sequence: int = 0
    base_root: bytes | None = None
    meta_raw_bytes: int = 0
    """Size of the delta's meta rows when they travel as one zstd frame; 0: they travel as they are."""
    highest: int = 0
    reason: str = ""


registry.register("ha.pull", Pull)
registry.register("ha.fetch", Fetch)
registry.register("ha.pull_reply", PullReply)


class Propose(msgspec.Struct, frozen=True):
    """Ask the leader to put a command into the journal.

    ``epoch``: 0, or the one that the proposer acts for; ``request``: its id, the same when it is asked again.
    ``force``: a change of membership may cost the quorum. ``acknowledge``: a value of `protocol.Acknowledge`.
    """

    kind: str
    body: bytes
    timeout_s: float = 10.0
    epoch: int = 0
    request: bytes = b""
    force: bool = False
    acknowledge: str = "majority"


class Proposed(msgspec.Struct, frozen=True):
    """The command was decided at ``index`` and is applied at the leader. A refusal is answered by its error."""

    index: int


class Introduce(msgspec.Struct, frozen=True):
    """Say "this is me, who are you?". Asked on the client port before anything else is known of the other node."""

    name: str = ""
    cluster_name: str = ""
    initial: tuple[str, ...] = ()


class KnownMember(msgspec.Struct, frozen=True):
    """A member as a node tells another of it."""

    name: str
    node_id: str
    address: str
    number: int
    public_key: str = ""
    role: str = "follower"


class Introduction(msgspec.Struct, frozen=True):
    """What a node says of itself. ``cluster_id`` is empty while it belongs to none; ``initial``: ``name=address`` of
    its ``--initial``; peer and bulk addresses as bound (the host may be a wildcard: take the one that was asked).
    """

    name: str
    node_id: str
    cluster_name: str
    cluster_id: str = ""
    initial: tuple[str, ...] = ()
    peer_address: str = ""
    bulk_address: str = ""
    boot_number: int = 0
    members: tuple[KnownMember, ...] = ()
    """The cluster's members in the order of their numbers, as far as this node knows them."""
    bootstrap: bytes = b""
    """Body of the command that founded the cluster; every first member begins its log with it."""


class Join(msgspec.Struct, frozen=True):
    """Ask any member to be let in: a new node with its ticket, or a member whose directory was lost (``name`` is known,
    ``node_id`` is another one, and the old one is silent).
    """

    name: str
    node_id: str
    address: str
    public_key: str = ""
    role: str = "follower"
    ticket: str = ""
    timeout_s: float = 10.0


class Joined(msgspec.Struct, frozen=True):
    """The node is a member now, an unstable one or an observer."""

    cluster_id: str
    cluster_name: str
    number: int
    members: tuple[KnownMember, ...]


class Ping(msgspec.Struct, frozen=True):
    """Ask for nothing but an answer, to see how long the way is."""


class Pong(msgspec.Struct, frozen=True):
    """The answer."""


class ClaimVote(msgspec.Struct, frozen=True):
    """Say "this is what I am since I started; do you remember more of me?" (`claims_machine`)."""

    name: str
    process: ProcessId
    term: int
    last_index: int
    copied: bool = False


class Remembered(msgspec.Struct, frozen=True):
    """What the asked node remembers of the asker. ``verdict``: of `roster_machine`; ``highest``: boot number seen.

    ``held_term``, ``held_index``: of the last entry of the asked node's own log.
    """

    process: ProcessId
    verdict: str
    highest: int
    term: int = 0
    last_index: int = 0
    trusted: bool = True
    held_term: int = 0
    held_index: int = 0


class AwaitApplied(msgspec.Struct, frozen=True):
    """Answer when you have applied ``index``; `TimedOut` after ``timeout_s``. How a leader learns that a node has
    caught up, or that all have a command.
    """

    index: int
    timeout_s: float


class AppliedAt(msgspec.Struct, frozen=True):
    """This node has applied ``index``, which may be more than was asked for."""

    index: int


class TransferLeader(msgspec.Struct, frozen=True):
    """Ask the leader to hand over; ``target``: a node's id, empty: to the best one."""

    target: str = ""
    timeout_s: float = 10.0


class Transferred(msgspec.Struct, frozen=True):
    """This node id leads now."""

    leader: str


class FetchState(msgspec.Struct, frozen=True):
    """Ask for the agreed state at ``index`` or later; answered by a stream of items (state.py)."""

    index: int


class Belongs(msgspec.Struct, frozen=True):
    """Ask whether the sender still is a member; the answer is `MemberStanding`, or the error `Removed`."""


class MemberStanding(msgspec.Struct, frozen=True):
    """``member``: as far as the answering node has applied, ``index``."""

    member: bool
    index: int


class DigestAt(msgspec.Struct, frozen=True):
    """Ask for the digest of the agreed state at ``index``; `NotReady` from a node that does not stand there now."""

    index: int


class StateDigest(msgspec.Struct, frozen=True):
    """The digest of the agreed state at ``index``."""

    index: int
    digest: bytes


registry.register("ha.digest_at", DigestAt)
registry.register("ha.state_digest", StateDigest)
registry.register("ha.await_applied", AwaitApplied)
registry.register("ha.applied_at", AppliedAt)
registry.register("ha.transfer_leader", TransferLeader)
registry.register("ha.transferred", Transferred)
registry.register("ha.fetch_state", FetchState)
registry.register("ha.belongs", Belongs)
registry.register("ha.standing", MemberStanding)
registry.register("ha.propose", Propose)
registry.register("ha.proposed", Proposed)
registry.register("ha.introduce", Introduce)
registry.register("ha.introduction", Introduction)
registry.register("ha.join", Join)
registry.register("ha.joined", Joined)
registry.register("ha.ping", Ping)
registry.register("ha.pong", Pong)
registry.register("ha.claim_vote", ClaimVote)
registry.register("ha.remembered", Remembered)
