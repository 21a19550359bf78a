"""What the nodes of a group say to each other.

Every message names its ``group``, the sender's ``term`` of that group and the ``sender`` (node id, checked by the
driver against the connection's hello). They are posted one way, may be lost, repeated, reordered and late; answers are
messages of their own. Messages of all groups between two nodes share frames (`Bundle`).

========================  ===========================================================================================
`Append`                  leader: entries after (``previous_index``, ``previous_term``); none: a heartbeat
`AppendReply`             follower: what it holds durably now, or why the entries do not fit
`Vote`                    candidate: may I lead ``term``? ``pre``: would you say yes? (nothing is promised)
`VoteReply`               voter
`TimeoutNow`              leader to the one it hands over to: campaign at once
`Install`                 leader: what you lack is gone here; fetch the state behind ``reference``, then go on
`ReadIndex`               follower: which index must I have applied to answer a linearizable read?
`ReadIndexReply`          leader, after it has confirmed that it leads
========================  ===========================================================================================
"""

from __future__ import annotations

import msgspec

from srengine.codec import registry
from srengine.consensus.entries import Configuration, Entry
from srengine.types import NodeId


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Entries or a heartbeat. ``commit_index``: of the leader, the receiver takes the part of it that it holds.

    ``round``: grows with each heartbeat of this leadership; echoed, so that a late answer renews nothing newer.
    ``nonce``, ``barrier``: an entry of this term, made after the leader heard this nonce of the receiver, stands at
    ``barrier`` and is committed without counting the receiver (`machine`, "Trust"); 0: no such thing is said.
    """

    group: str
    term: int
    sender: NodeId
    previous_index: int
    previous_term: int
    commit_index: int
    round: int
    entries: tuple[Entry, ...] = ()
    nonce: int = 0
    barrier: int = 0


class AppendReply(msgspec.Struct, frozen=True, tag="append_reply"):
    """``success``: the log is equal to the leader's up to ``match_index``, durably. Else ``previous_index`` is what did
    not fit of the request, and ``match_index`` the last place at or before it whose term, ``conflict_term``, is not
    above the request's: nothing between the two can fit.

    ``round``: that of the request; 0 when the request's term was over, which ``term`` tells: then it answers nothing.

    ``votes``: this node may vote (`effects.Trust`): only then its promise counts for the leader's lease and contact and
    its entries for commitment. ``nonce``: 0 exactly when it may; else random for each start, see `Append`.
    """

    group: str
    term: int
    sender: NodeId
    success: bool
    match_index: int
    round: int
    previous_index: int = 0
    conflict_term: int = 0
    votes: bool = True
    nonce: int = 0


class Vote(msgspec.Struct, frozen=True, tag="vote"):
    """Ask for a vote. A ``pre`` vote asks with the term that would be. ``transfer``: the leader handed over
    (TimeoutNow), so promises to it do not stand in the way.
    """

    group: str
    term: int
    sender: NodeId
    last_index: int
    last_term: int
    pre: bool = False
    transfer: bool = False


class VoteReply(msgspec.Struct, frozen=True, tag="vote_reply"):
    """``term``: the voter's own, or for a granted pre-vote the one asked for. A refused pre-vote says ``pre``, too."""

    group: str
    term: int
    sender: NodeId
    granted: bool
    pre: bool = False


class TimeoutNow(msgspec.Struct, frozen=True, tag="timeout_now"):
    """Campaign at once; sent after the lease was given up and the target holds everything."""

    group: str
    term: int
    sender: NodeId


class Install(msgspec.Struct, frozen=True, tag="install"):
    """Entries up to ``index`` are gone at the leader. ``reference`` is opaque here: what the receiver's service needs
    to fetch the state at (index, index_term) or later. It is the heartbeat of a receiver that needs it, too: repeated
    until the receiver holds ``index``, answered by an `AppendReply` each time.
    """

    group: str
    term: int
    sender: NodeId
    round: int
    index: int
    index_term: int
    configuration: Configuration
    reference: bytes = b""


class ReadIndex(msgspec.Struct, frozen=True, tag="read_index"):
    """``token`` is the asker's."""

    group: str
    term: int
    sender: NodeId
    token: int


class ReadIndexReply(msgspec.Struct, frozen=True, tag="read_index_reply"):
    """``index`` 0: this node does not lead (or could not confirm it)."""

    group: str
    term: int
    sender: NodeId
    token: int
    index: int


Message = Append | AppendReply | Vote | VoteReply | TimeoutNow | Install | ReadIndex | ReadIndexReply


class Bundle(msgspec.Struct, frozen=True):
    """Messages of all groups from one node to another, in order."""

    messages: tuple[Message, ...]


registry.register("consensus.bundle", Bundle)
