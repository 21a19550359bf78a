"""What a node answers about members (list, add, remove, move, role, transfer), to nodes that join, and about registers.

Any node takes these: the backend carries changes to the leader. Only `Join` is judged by the leader itself, because it
knows who is alive: a member whose directory was lost may come back under its name with a new id, without a ticket, once
its old process is silent and when it shows the same key.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from srengine import errors, types
from srengine.client import messages
from srengine.ha import registers
from srengine.ha.members import Member, MemberRole, find_removed, membership_digest, read_membership, was_removed
from srengine.ha.membership import mint_ticket, ticket_digest
from srengine.ha.messages import Join, Joined
from srengine.ha.protocol import Role
from srengine.node.bootstrap import known
from srengine.node.options import ROLES, split_address
from srengine.node.services import Within, checked_timeout
from srengine.transport import Peer, Reply

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

TIMEOUT_S: Final = 10.0
_KEY: Final = re.compile(r"[0-9A-Fa-f]{64}", re.ASCII)
UNKNOWN_END: Final = "the change is not known to be done or not yet"


class MembershipServices:
    """Handlers for clients and for nodes that join."""

    def __init__(self, node: Runtime) -> None:
        self._node = node

    def register(self) -> None:
        """Put the handlers on the ports."""
        serve = self._node.endpoint.serve
        serve(messages.ListMembers, self.list_members)
        serve(messages.AddMember, self.add_member)
        serve(messages.RemoveMember, self.remove_member)
        serve(messages.UpdateAddress, self.update_address)
        serve(messages.SetRole, self.set_role)
        serve(messages.TransferLeader, self.transfer_leader)
        serve(messages.PutRegister, self.put_register)
        serve(messages.GetRegister, self.get_register)
        serve(Join, self.join, ports=("client", "peer"))

    # --- members -----------------------------------------------------------------------------------------------------

    async def list_members(self, peer: Peer, message: messages.ListMembers, attachments: Sequence[memoryview]) -> Reply:
        """Answer linearizably."""
        del peer, message, attachments
        node = self._node
        await node.wait_catalog(TIMEOUT_S)
        version, digest = await asyncio.to_thread(
            lambda: (read_membership(node.machine.store).version, membership_digest(node.machine.store).hex())
        )
        return Reply(
            messages.MemberList(
                tuple(
                    messages.MemberInfo(
                        member.name,
                        member.node_id,
                        node.address_of(member.name),
                        member.role,
                        member.stable,
                        member.incarnation,
                        member.public_key,
                    )
                    for member in node.agreed.members
                ),
                leader=node.backend.observed.leader or "",
                version=version,
                digest=digest,
            )
        )

    async def add_member(self, peer: Peer, message: messages.AddMember, attachments: Sequence[memoryview]) -> Reply:
        """Mint a ticket."""
        del peer, attachments
        types.check_name(message.name, "node")
        node = self._node
        await node.wait_catalog(checked_timeout(message.timeout_s))
        holder = node.agreed.member(message.name)
        if holder is not None and (holder.name == node.name or node.wire.connected(holder.name)):
            raise errors.Conflict(f"{message.name} is a member and alive", name=message.name)
        if message.public_key and not _KEY.fullmatch(message.public_key):
            raise errors.InvalidValue("a public key has 64 hexadecimal digits")
        if node.public_key and not message.public_key:
            raise errors.InvalidValue("this cluster runs with keys: the new node's is needed (node init prints it)")
        secret, command = mint_ticket(_role(message.role), message.name, message.public_key.lower())
        await node.backend.propose(command, timeout_s=checked_timeout(message.timeout_s))
        return Reply(messages.Ticket(message.name, secret))

    async def remove_member(
        self, peer: Peer, message: messages.RemoveMember, attachments: Sequence[memoryview]
    ) -> Reply:
        """Remove one."""
        del peer, attachments
        node = self._node
        async with Within(checked_timeout(message.timeout_s), UNKNOWN_END):
            await node.wait_catalog(checked_timeout(message.timeout_s))
            if message.name == node.agreed.first and node.agreed.tables and len(node.agreed.members) > 1:
                raise errors.MasterState(
                    f"{message.name} leads all tablets in this version, and there are tables: it stays",
                    name=message.name,
                )
            await node.backend.remove_node(message.name, force=message.force)
        return self._changed(message.name)

    async def update_address(
        self, peer: Peer, message: messages.UpdateAddress, attachments: Sequence[memoryview]
    ) -> Reply:
        """Note where a member is now."""
        del peer, attachments
        split_address(message.address)
        async with Within(checked_timeout(message.timeout_s), UNKNOWN_END):
            await self._node.backend.update_address(message.name, message.address)
        return self._changed(message.name)

    async def set_role(self, peer: Peer, message: messages.SetRole, attachments: Sequence[memoryview]) -> Reply:
        """Make one a follower or an observer."""
        del peer, attachments
        async with Within(checked_timeout(message.timeout_s), UNKNOWN_END):
            await self._node.backend.set_role(message.name, _role(message.role))
        return self._changed(message.name)

    async def transfer_leader(
        self, peer: Peer, message: messages.TransferLeader, attachments: Sequence[memoryview]
    ) -> Reply:
        """Hand leadership over."""
        del peer, attachments
        leader = await self._node.backend.transfer_leader(
            message.target or None, timeout_s=checked_timeout(message.timeout_s)
        )
        return self._changed(leader)

    def _changed(self, name: str) -> Reply:
        return Reply(messages.Changed(name, read_membership(self._node.machine.store).version))

    # --- letting nodes in --------------------------------------------------------------------------------------------

    async def join(self, peer: Peer, message: Join, attachments: Sequence[memoryview]) -> Reply:
        """Let a node in, at the leader; elsewhere ask the leader."""
        del attachments
        node = self._node
        timeout_s = checked_timeout(message.timeout_s)
        if not node.bootstrapped:
            raise errors.NotReady(f"{node.name} is starting")
        if node.backend.observed.role is not Role.LEADER:
            leader = node.backend.observed.leader
            if leader is None or peer.port == "peer":
                raise errors.UnknownMaster(f"{node.name} does not lead, and knows nobody who does")
            return await node.ways[leader].request(message, timeout_s=timeout_s)
        await node.wait_catalog(timeout_s)
        removed = find_removed(node.machine.store, message.node_id)
        if removed is not None:
            raise was_removed(removed)
        member = node.agreed.by_id(message.node_id)
        if member is None:
            ticket = self._judge(peer, message)
            async with Within(timeout_s, UNKNOWN_END):
                await node.backend.add_node(
                    message.name,
                    message.node_id,
                    message.address,
                    role=_role(message.role) if ticket else self._old(message).role,
                    public_key=message.public_key,
                    ticket=ticket,
                )
            await node.wait_catalog(timeout_s)
            member = node.agreed.by_id(message.node_id)
        if member is None or member.name != message.name:
            raise errors.Conflict(f"{message.node_id} is not the id of {message.name}", name=message.name)
        return Reply(
            Joined(node.identity.cluster_id, node.identity.cluster_name, member.number, known(node.agreed.members))
        )

    def _judge(self, peer: Peer, message: Join) -> bytes:
        """Return the digest of the ticket, empty when none is needed; raise why the node is not let in."""
        del peer
        types.check_name(message.name, "node")
        split_address(message.address)
        if message.ticket:
            return ticket_digest(message.ticket)
        holder = self._node.agreed.member(message.name)
        if holder is None:
            raise errors.Denied(f"{message.name} is no member: it needs a ticket (member add {message.name})")
        if holder.public_key != message.public_key:
            raise errors.Denied(f"{message.name} shows another key than it had: it needs a ticket")
        if self._node.wire.connected(message.name) or message.name == self._node.name:
            raise errors.NotReady(f"another process runs as {message.name}", holder_alive=True)
        return b""

    def _old(self, message: Join) -> Member:
        holder = self._node.agreed.member(message.name)
        assert holder is not None, message.name
        return holder

    # --- registers ---------------------------------------------------------------------------------------------------

    async def put_register(self, peer: Peer, message: messages.PutRegister, attachments: Sequence[memoryview]) -> Reply:
        """Put it into the journal."""
        del peer, attachments
        command = msgspec.structs.replace(
            registers.put_register(message.name, message.value, if_version=message.if_version), request=message.request
        )
        index = await self._node.backend.propose(command, timeout_s=checked_timeout(message.timeout_s))
        return Reply(messages.Register(message.name, message.value, index))

    async def get_register(self, peer: Peer, message: messages.GetRegister, attachments: Sequence[memoryview]) -> Reply:
        """Read it linearizably."""
        del peer, attachments
        await self._node.backend.read_barrier(timeout_s=checked_timeout(message.timeout_s))
        found = registers.read_register(self._node.machine.store, message.name)
        if found is None:
            raise errors.NotFound(f"there is no register {message.name}", name=message.name)
        return Reply(messages.Register(message.name, found.value, found.version))


def _role(role: Any) -> MemberRole:
    if role not in ROLES:
        raise errors.InvalidValue(f"a member is {' or '.join(ROLES)}, not {str(role)[:40]!r}")
    return cast("MemberRole", role)
