"""Members of the cluster: names, addresses, identities and what each may decide; an applier of the journal.

A member is a *node id* (a directory, see node/identity.py) under a *name* at an *address*. Ids vote, names are for
people, addresses change. Each admission of an id has an *incarnation*: the index of the journal at which it was
admitted, so the later of two is known everywhere without a clock.

::

                    add, follower                    caught up
    (stranger) ───────────────────────► unstable ─────────────► stable: votes, may lead
        │                                  ▲  ◄─────────────────── │
        │ add, observer                    │    make unstable      │
        └──────────────► observer ◄────────┴───────────────────────┘   set role
                             all of them ── remove, or replaced by a later id ──► removed, for ever

Rules, decided when applied, the same everywhere:

* An *unstable* follower is a learner of the group: it holds entries and counts for nothing until it has caught up. The
  mark is a row, so a change of leader keeps it. An *observer* never counts.
* One id, one name, one address. Whoever is added under a name or address in use *replaces* its holder, in the same
  entry, and must say whom it means (id and incarnation): if that one does not hold it any more, nothing is removed
  (`Conflict`).
* Removed ids stay removed; the row says since which epoch. Their nodes are told so. A directory that was wiped has
  another id and may come back under the old name.
* A *ticket* admits one node, once. Its secret is shown to a person; the journal holds its digest. No clock decides
  here: a ticket ends by use, or by an entry (`ExpireTicket`) that a leader proposes when it has seen it for long
  enough.

===================  ==================  ==============================================================================
table                key                 value
===================  ==================  ==============================================================================
``members``          name                `Member`
``members_removed``  ``n`` + node id     `RemovedMember`; the latest `REMOVED_KEPT`
``members_removed``  ``i`` + index, 8    the node id that was removed there
                     bytes, big endian
``member_events``    index, 8 bytes big  `MemberEvent`; the latest `EVENTS_KEPT`
                     endian, ordinal, 1
``membership``       ``membership``      `Membership`
``tickets``          digest              `Ticket`
``cluster``          ``cluster``         `Cluster`
===================  ==================  ==============================================================================

Which change is allowed now, and which configuration of the group it means, is the leader's business: membership.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from srengine import errors, types
from srengine.ha.epochs import newest_epoch
from srengine.ha.tables import Readable, Tables
from srengine.transport import addresses

MEMBER_TABLE: Final = "members"
REMOVED_TABLE: Final = "members_removed"
EVENT_TABLE: Final = "member_events"
MEMBERSHIP_TABLE: Final = "membership"
TICKET_TABLE: Final = "tickets"
CLUSTER_TABLE: Final = "cluster"

BOOTSTRAP: Final = "ha.bootstrap"
ADD: Final = "ha.add_member"
REMOVE: Final = "ha.remove_member"
UPDATE_ADDRESS: Final = "ha.update_address"
SET_STABLE: Final = "ha.set_stable"
SET_ROLE: Final = "ha.set_role"
MINT_TICKET: Final = "ha.mint_ticket"
EXPIRE_TICKET: Final = "ha.expire_ticket"

EVENTS_KEPT: Final = 1000
REMOVED_KEPT: Final = 4096
"""A removed id that is forgotten is a stranger: it is refused all the same, but not told why."""
TICKETS_MAX: Final = 64

_CLUSTER: Final = b"cluster"
_MEMBERSHIP: Final = b"membership"
_NODE_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)

MemberRole = Literal["follower", "observer"]
Event = Literal["joined", "unstable", "stable", "left", "replaced", "address", "role"]


class Member(msgspec.Struct, frozen=True):
    """One member.

    ``address``: client port. ``number``: the order of joining, those of the bootstrap first. ``node_id``: empty while
    the node has not shown itself (only before consensus). ``incarnation``: index at which the id was admitted.
    ``stable``: of a follower: it votes.
    """

    name: str
    address: str
    number: int
    node_id: str = ""
    incarnation: int = 0
    public_key: str = ""
    role: MemberRole = "follower"
    stable: bool = True

    @property
    def votes(self) -> bool:
        """Whether it may vote and lead."""
        return self.role == "follower" and self.stable


class RemovedMember(msgspec.Struct, frozen=True):
    """An id that was a member. ``epoch``: the newest one when it was removed."""

    name: str
    node_id: str
    incarnation: int
    epoch: int
    index: int


class MemberEvent(msgspec.Struct, frozen=True):
    """What happened to a member at an index."""

    index: int
    event: Event
    name: str
    node_id: str
    detail: str = ""


class Membership(msgspec.Struct, frozen=True):
    """``version``: grows with every change of members. ``next_number``: for the next one that joins. ``events`` and
    ``removed``: rows of those tables.
    """

    version: int = 0
    next_number: int = 0
    events: int = 0
    removed: int = 0


class Cluster(msgspec.Struct, frozen=True):
    """Name and id of the cluster; minted once."""

    cluster_id: str
    name: str


class Ticket(msgspec.Struct, frozen=True):
    """The right to join once, as ``role``, under ``name`` (empty: any), with ``public_key`` (empty: any; where keys are
    used, nodes let a joiner in by it).
    """

    digest: bytes
    role: MemberRole
    name: str
    index: int
    public_key: str = ""


# --- commands --------------------------------------------------------------------------------------------------------


class Bootstrap(msgspec.Struct, frozen=True):
    """The first entry of every journal."""

    cluster: Cluster
    members: tuple[Member, ...]


class Holder(msgspec.Struct, frozen=True):
    """Exactly this admission of exactly this id."""

    node_id: str
    incarnation: int


class AddMember(msgspec.Struct, frozen=True):
    """Admit an id: `Conflict`, `Removed`, `Denied` (the ticket), `InvalidValue`. See the module's text for
    ``replaces``.
    """

    name: str
    node_id: str
    address: str
    role: MemberRole = "follower"
    public_key: str = ""
    replaces: Holder | None = None
    ticket: bytes = b""
    """Digest; empty: none is needed, whoever proposed this was allowed to."""


class RemoveMember(msgspec.Struct, frozen=True):
    """Remove an id: `MemberNotFound` when the name is not (any more) its."""

    name: str
    node_id: str


class UpdateAddress(msgspec.Struct, frozen=True):
    """A member moved: `MemberNotFound`, `Conflict` when another one is there."""

    name: str
    node_id: str
    address: str


class SetStable(msgspec.Struct, frozen=True):
    """A follower has caught up and votes, or is made a learner again: `MemberNotFound`; `Conflict` for an observer."""

    name: str
    node_id: str
    stable: bool


class SetRole(msgspec.Struct, frozen=True):
    """A follower becomes an observer, or an observer an unstable follower: `MemberNotFound`."""

    name: str
    node_id: str
    role: MemberRole


class MintTicket(msgspec.Struct, frozen=True):
    """Allow one node to join: `QuotaExceeded` when too many tickets are about."""

    digest: bytes
    role: MemberRole = "follower"
    name: str = ""
    public_key: str = ""


class ExpireTicket(msgspec.Struct, frozen=True):
    """A ticket ends unused."""

    digest: bytes


Change = Bootstrap | AddMember | RemoveMember | UpdateAddress | SetStable | SetRole | MintTicket | ExpireTicket
COMMANDS: Final[dict[str, type[msgspec.Struct]]] = {
    BOOTSTRAP: Bootstrap,
    ADD: AddMember,
    REMOVE: RemoveMember,
    UPDATE_ADDRESS: UpdateAddress,
    SET_STABLE: SetStable,
    SET_ROLE: SetRole,
    MINT_TICKET: MintTicket,
    EXPIRE_TICKET: ExpireTicket,
}


class MembersApplier:
    """Applies the commands above."""

    kinds: Sequence[str] = tuple(COMMANDS)
    tables: Sequence[str] = (
        MEMBER_TABLE,
        REMOVED_TABLE,
        EVENT_TABLE,
        MEMBERSHIP_TABLE,
        TICKET_TABLE,
        CLUSTER_TABLE,
    )

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        """See `tables.Applier`."""
        _Change(tables, index).decide(msgspec.msgpack.decode(body, type=COMMANDS[kind]))


class _Change:
    """One command on its way into the tables."""

    def __init__(self, tables: Tables, index: int) -> None:
        self._tables = tables
        self._index = index
        self._events = 0

    def decide(self, command: msgspec.Struct) -> None:
        match command:
            case Bootstrap():
                self._bootstrap(command)
            case AddMember():
                self._add(command)
            case RemoveMember():
                member = self._member(command.name, command.node_id)
                self._remove(member, "left")
                self._raise_version()
            case UpdateAddress():
                self._update_address(command)
            case SetStable():
                self._set_stable(command)
            case SetRole():
                self._set_role(command)
            case MintTicket():
                self._mint(command)
            case ExpireTicket():
                if not self._tables.delete(TICKET_TABLE, _digest_key(command.digest)):
                    raise errors.NotFound("there is no such ticket")
            case _:
                raise AssertionError(command)

    # --- the commands ------------------------------------------------------------------------------------------------

    def _bootstrap(self, command: Bootstrap) -> None:
        if self._index != 1:
            raise errors.Conflict("the cluster exists already", index=self._index)
        types.check_name(command.cluster.name, "cluster")
        for what in ("name", "address", "node_id"):
            values = [getattr(member, what) for member in command.members if getattr(member, what)]
            if len(set(values)) != len(values):
                raise errors.InvalidValue(f"two first members have the same {what}")
        ids = [member.node_id for member in command.members if member.node_id]
        if ids and len(ids) != len(command.members):
            raise errors.InvalidValue("some first members have an id and some have none")
        for member in command.members:
            types.check_name(member.name, "node")
            if member.node_id:
                _check_node_id(member.node_id)
            self._put(msgspec.structs.replace(member, incarnation=self._index if member.node_id else 0))
            if member.node_id:
                self._happened("joined", member)
                self._happened("stable" if member.votes else "unstable", member)
        self._tables.put(CLUSTER_TABLE, _CLUSTER, msgspec.msgpack.encode(command.cluster))
        self._note(version=1, next_number=len(command.members))

    def _add(self, command: AddMember) -> None:
        types.check_name(command.name, "node")
        addresses.check(command.address)
        _check_node_id(command.node_id)
        removed = find_removed(self._tables, command.node_id)
        if removed is not None:
            raise was_removed(removed)
        members = read_members(self._tables)
        for member in members:
            if member.node_id == command.node_id:
                raise errors.Conflict(f"{command.node_id} is a member already: {member.name}", name=member.name)
        if command.ticket:
            self._use_ticket(command)
        number = self._membership().next_number
        holders = [member for member in members if command.name == member.name or command.address == member.address]
        for holder in holders:
            same = command.replaces == Holder(holder.node_id, holder.incarnation)
            if not same:
                what = "name" if holder.name == command.name else "address"
                raise errors.Conflict(
                    f"the {what} is that of {holder.name} ({holder.node_id or 'not seen yet'})", name=holder.name
                )
            self._remove(holder, "replaced")
            if holder.name == command.name:
                number = holder.number
        if command.replaces is not None and not holders:
            raise errors.Conflict("the node to replace holds neither the name nor the address any more")
        added = Member(
            name=command.name,
            address=command.address,
            number=number,
            node_id=command.node_id,
            incarnation=self._index,
            public_key=command.public_key,
            role=command.role,
            stable=command.role == "observer",
        )
        self._put(added)
        self._happened("joined", added)
        if not added.stable:
            self._happened("unstable", added)
        self._note(next_number=max(number + 1, self._membership().next_number))
        self._raise_version()

    def _use_ticket(self, command: AddMember) -> None:
        stored = self._tables.get(TICKET_TABLE, _digest_key(command.ticket))
        if stored is None:
            raise errors.Denied("there is no such ticket: it was used, has expired, or never was one")
        ticket = msgspec.msgpack.decode(stored, type=Ticket)
        if ticket.role != command.role or ticket.name not in {"", command.name}:
            raise errors.Denied(f"the ticket is for {ticket.name or 'any name'} as {ticket.role}")
        if ticket.public_key not in {"", command.public_key}:
            raise errors.Denied("the ticket is for a node with another key")
        self._tables.delete(TICKET_TABLE, command.ticket)

    def _update_address(self, command: UpdateAddress) -> None:
        addresses.check(command.address)
        member = self._member(command.name, command.node_id)
        for other in read_members(self._tables):
            if other.address == command.address and other.name != command.name:
                raise errors.Conflict(f"the address is that of {other.name}", name=other.name)
        if member.address == command.address:
            return
        changed = msgspec.structs.replace(member, address=command.address)
        self._put(changed)
        self._happened("address", changed, f"{member.address} to {command.address}")
        self._raise_version()

    def _set_stable(self, command: SetStable) -> None:
        member = self._member(command.name, command.node_id)
        if member.role == "observer":
            raise errors.Conflict(f"{member.name} is an observer", name=member.name)
        if member.stable == command.stable:
            return
        changed = msgspec.structs.replace(member, stable=command.stable)
        self._put(changed)
        self._happened("stable" if command.stable else "unstable", changed)
        self._raise_version()

    def _set_role(self, command: SetRole) -> None:
        member = self._member(command.name, command.node_id)
        if member.role == command.role:
            return
        changed = msgspec.structs.replace(member, role=command.role, stable=command.role == "observer")
        self._put(changed)
        self._happened("role", changed, f"{member.role} to {command.role}")
        if not changed.stable:
            self._happened("unstable", changed)
        self._raise_version()

    def _mint(self, command: MintTicket) -> None:
        key = _digest_key(command.digest)
        if command.name:
            types.check_name(command.name, "node")
        if len(read_tickets(self._tables)) >= TICKETS_MAX:
            raise errors.QuotaExceeded(f"{TICKETS_MAX} tickets wait to be used")
        ticket = Ticket(command.digest, command.role, command.name, self._index, command.public_key)
        self._tables.put(TICKET_TABLE, key, msgspec.msgpack.encode(ticket))

    # --- their parts -------------------------------------------------------------------------------------------------

    def _member(self, name: str, node_id: str) -> Member:
        member = find_member(self._tables, name)
        if member is None or member.node_id != node_id:
            raise errors.MemberNotFound(f"{name[:128]} ({node_id[:32]}) is no member", name=name[:128])
        return member

    def _put(self, member: Member) -> None:
        self._tables.put(MEMBER_TABLE, member.name.encode(), msgspec.msgpack.encode(member))

    def _remove(self, member: Member, event: Event) -> None:
        self._tables.delete(MEMBER_TABLE, member.name.encode())
        if member.node_id:
            epoch, _ = newest_epoch(self._tables)
            row = RemovedMember(member.name, member.node_id, member.incarnation, epoch, self._index)
            self._tables.put(REMOVED_TABLE, b"n" + member.node_id.encode(), msgspec.msgpack.encode(row))
            self._tables.put(REMOVED_TABLE, b"i" + self._index.to_bytes(8, "big"), member.node_id.encode())
            count = self._membership().removed + 1
            if count > REMOVED_KEPT:
                count -= 1
                oldest, forgotten = next(self._tables.scan(REMOVED_TABLE, b"i", b"j"))
                self._tables.delete(REMOVED_TABLE, oldest)
                self._tables.delete(REMOVED_TABLE, b"n" + forgotten)
            self._note(removed=count)
        self._happened(event, member)

    def _happened(self, event: Event, member: Member, detail: str = "") -> None:
        row = MemberEvent(self._index, event, member.name, member.node_id, detail)
        key = self._index.to_bytes(8, "big") + bytes([self._events])
        self._events += 1
        self._tables.put(EVENT_TABLE, key, msgspec.msgpack.encode(row))
        count = self._membership().events + 1
        if count > EVENTS_KEPT:
            count -= 1
            oldest, _ = next(self._tables.scan(EVENT_TABLE))
            self._tables.delete(EVENT_TABLE, oldest)
        self._note(events=count)

    def _membership(self) -> Membership:
        return read_membership(self._tables)

    def _raise_version(self) -> None:
        self._note(version=self._membership().version + 1)

    def _note(self, **changed: int) -> None:
        after = msgspec.structs.replace(self._membership(), **changed)
        self._tables.put(MEMBERSHIP_TABLE, _MEMBERSHIP, msgspec.msgpack.encode(after))


def _check_node_id(node_id: str) -> None:
    if _NODE_ID.fullmatch(node_id) is None:
        raise errors.InvalidValue(f"{node_id[:64]!r} is no node id (32 hexadecimal digits)")


def _digest_key(digest: bytes) -> bytes:
    if len(digest) != 16:
        raise errors.InvalidValue("a ticket's digest has 16 bytes")
    return digest


# --- reading ---------------------------------------------------------------------------------------------------------


def read_members(rows: Readable) -> list[Member]:
    """Return the members in the order of their numbers."""
    members = [msgspec.msgpack.decode(value, type=Member) for _, value in rows.scan(MEMBER_TABLE)]
    return sorted(members, key=lambda member: (member.number, member.name))


def find_member(rows: Readable, name: str) -> Member | None:
    """Return a member by its name; None for a stranger."""
    stored = rows.get(MEMBER_TABLE, name.encode()) if 0 < len(name.encode()) <= 128 else None
    return None if stored is None else msgspec.msgpack.decode(stored, type=Member)


def find_removed(rows: Readable, node_id: str) -> RemovedMember | None:
    """Return when and as what an id was removed; None when it never was."""
    stored = rows.get(REMOVED_TABLE, b"n" + node_id.encode()) if _NODE_ID.fullmatch(node_id) else None
    return None if stored is None else msgspec.msgpack.decode(stored, type=RemovedMember)


def was_removed(row: RemovedMember) -> errors.Removed:
    """Return the error that tells a removed node that it is one."""
    return errors.Removed(
        f"{row.name} ({row.node_id}) was removed in epoch {row.epoch}",
        name=row.name,
        node_id=row.node_id,
        epoch=row.epoch,
        index=row.index,
    )


def read_events(rows: Readable) -> list[MemberEvent]:
    """Return what happened to members, oldest first."""
    return [msgspec.msgpack.decode(value, type=MemberEvent) for _, value in rows.scan(EVENT_TABLE)]


def read_membership(rows: Readable) -> Membership:
    """Return version and next number; zeros before the bootstrap."""
    stored = membership_row(rows)
    return Membership() if stored is None else msgspec.msgpack.decode(stored, type=Membership)


def membership_row(rows: Readable) -> bytes | None:
    """Return the row behind `read_membership`: another one after each change, and cheaper to compare."""
    return rows.get(MEMBERSHIP_TABLE, _MEMBERSHIP)


def membership_digest(rows: Readable) -> bytes:
    """Return 16 bytes over version and members: equal on all nodes at the same index."""
    state = hashlib.blake2b(digest_size=16, person=b"srengine-members")
    state.update(read_membership(rows).version.to_bytes(8, "little"))
    for key, value in rows.scan(MEMBER_TABLE):
        for part in (key, value):
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
    return state.digest()


def read_tickets(rows: Readable) -> list[Ticket]:
    """Return the tickets that wait to be used."""
    return [msgspec.msgpack.decode(value, type=Ticket) for _, value in rows.scan(TICKET_TABLE)]


def read_cluster(rows: Readable) -> Cluster | None:
    """Return the cluster, None before the bootstrap."""
    stored = rows.get(CLUSTER_TABLE, _CLUSTER)
    return None if stored is None else msgspec.msgpack.decode(stored, type=Cluster)
