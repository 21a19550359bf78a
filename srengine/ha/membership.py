"""Which change of membership is allowed now, and what it means for the group: pure functions for the leader.

The table of members decides who belongs (members.py); the group's `Configuration` decides who votes. They are changed
by one and the same entry, so they must never disagree: `plan` runs the applier on an overlay, derives the configuration
of what comes out, and refuses what must not be done at this moment. The leader makes one change after the other, each
planned on the applied one before it, so what was planned is never refused when it is applied.

Guards, in this order: what the applier refuses; the leader is neither removed nor made a learner (`MasterState`); at
most one voter more or less (single-step change); the voters that are alive must be a majority of the new voters
(`NoQuorum`, unless forced: that is how a cluster is given up or rescued, not how it is run).

*Group size*, in the words of BDB HA: followers are counted without the unstable ones while there are any (the
"override"), so a joiner that has not caught up never makes a majority larger. With learners that is what a
configuration says anyway; `group_size` gives the numbers.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from srengine import errors
from srengine.consensus.entries import Configuration
from srengine.ha.journal import Command
from srengine.ha.members import (
    BOOTSTRAP,
    COMMANDS,
    EXPIRE_TICKET,
    MINT_TICKET,
    ExpireTicket,
    Member,
    MemberRole,
    MembersApplier,
    MintTicket,
    Ticket,
    read_members,
)
from srengine.ha.quorum import majority
from srengine.ha.tables import Overlay, Readable
from srengine.types import NodeId

TICKET_S: Final = 3600.0
"""A leader that has seen a ticket unused for so long proposes its end."""
_TICKET_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What to propose. ``configuration``: to be in force with the entry; None when it stays as it is."""

    command: Command
    configuration: Configuration | None


class GroupSize(NamedTuple):
    """Numbers of a membership. ``override``: 0 when no node is unstable, else followers without the unstable ones."""

    followers: int
    unstable: int
    observers: int
    voters: int
    learners: int
    override: int


def is_membership(kind: str) -> bool:
    """Return whether commands of this kind go through `plan`."""
    return kind in COMMANDS


def configuration_of(members: Iterable[Member]) -> Configuration:
    """Return who votes and who learns."""
    voters = tuple(sorted(NodeId(member.node_id) for member in members if member.votes))
    learners = tuple(sorted(NodeId(member.node_id) for member in members if not member.votes))
    return Configuration(voters, learners)


def group_size(members: Sequence[Member]) -> GroupSize:
    """Return the numbers of B12.

    >>> three = [Member(f"n{number}", "", number) for number in range(3)]
    >>> group_size(three).override
    0
    >>> group_size([*three, Member("n3", "", 3, stable=False)]).override
    3
    """
    followers = sum(member.role == "follower" for member in members)
    unstable = sum(member.role == "follower" and not member.stable for member in members)
    observers = len(members) - followers
    voters = followers - unstable
    return GroupSize(followers, unstable, observers, voters, unstable + observers, voters if unstable else 0)


def plan(
    rows: Readable, command: Command, *, index: int, leader: NodeId, alive: Collection[NodeId], force: bool = False
) -> Plan:
    """Return how to make a change, or raise why not.

    ``rows`` are applied up to the entry before ``index``, the change before this one included. ``alive``: the nodes
    that the leader has heard lately, itself included. Raises what the applier raises, `MasterState`, `NoQuorum`.
    """
    assert is_membership(command.kind), command.kind
    if command.kind == BOOTSTRAP:
        raise errors.Conflict(f"the cluster runs: {command.kind} is not for it", kind=command.kind)
    before = read_members(rows)
    overlay = Overlay(rows)
    try:
        MembersApplier().apply(overlay, index, command.kind, command.body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise errors.InvalidValue(f"the body of {command.kind} cannot be read: {error}", kind=command.kind) from error
    old, new = configuration_of(before), configuration_of(read_members(overlay))
    if leader in old.voters and leader not in new.voters:
        name = next(member.name for member in before if member.node_id == leader)
        raise errors.MasterState(f"{name} leads; transfer the leadership first", name=name)
    if len(set(old.voters) ^ set(new.voters)) > 1:
        raise errors.InvalidValue("one change of membership adds or takes away at most one voter")
    if old.voters != new.voters and not force:
        there = len(set(new.voters) & set(alive))
        if there < majority(len(new.voters)):
            raise errors.NoQuorum(
                f"only {there} of the {len(new.voters)} voters that would be left are alive; nothing was changed",
                alive=there,
                voters=len(new.voters),
            )
    return Plan(command, None if new == old else new)


# --- tickets ---------------------------------------------------------------------------------------------------------


def mint_ticket(role: MemberRole = "follower", name: str = "", public_key: str = "") -> tuple[str, Command]:
    """Return a new ticket's secret, for a person, and the command that makes it valid."""
    secret = secrets.token_hex(_TICKET_BYTES)
    ticket = MintTicket(ticket_digest(secret), role, name, public_key)
    return secret, Command(MINT_TICKET, msgspec.msgpack.encode(ticket))


def ticket_digest(secret: str) -> bytes:
    """Return what the journal knows of a ticket."""
    return hashlib.blake2b(secret.encode(), digest_size=16, person=b"srengine-ticket").digest()


@dataclass(slots=True)
class TicketKeeper:
    """When tickets end, by the clock of a leader: each new leader begins to count anew.

    ``since``: digest -> when this leader first saw it, seconds.
    """

    since: dict[bytes, float] = field(default_factory=dict)

    def due(self, now: float, tickets: Sequence[Ticket]) -> list[Command]:
        """Return commands that end those that were seen unused for `TICKET_S`, in order of their digests."""
        self.since = {ticket.digest: self.since.get(ticket.digest, now) for ticket in tickets}
        return [
            Command(EXPIRE_TICKET, msgspec.msgpack.encode(ExpireTicket(digest)))
            for digest, since in sorted(self.since.items())
            if now - since >= TICKET_S
        ]
