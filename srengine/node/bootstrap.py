"""Becoming a member: a node that belongs to no cluster yet finds out which, founds one, or asks to be let in.

::

    identity with a cluster ------------------------------------------> member
    --join -----------------------------------------------------------> asks a member to be let in, with its ticket
    --initial, and one of the others belongs to a cluster:
        the cluster was founded with this very node id ----------------> takes its first entry, is a voter
        the cluster has this name with another id ---------------------> its directory was lost: asks to be let in again
        the cluster does not know this name ---------------------------> stops with exit 5
    --initial, all others blank, first of the list --------------------> founds: cluster id, first entry, identity
    --initial, all others blank, not the first ------------------------> waits

All first nodes name the same members in the same order and the same cluster; whoever does not is told which one
differs. The founder asks *every* other member: one that holds an identity knows of a cluster that must not be
forgotten. A blank node writes its id down before it tells anybody who may found with it, so the ids in the first entry
stay those of the directories. Every first member begins its log with that same entry: all start from one history.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors, limits
from srengine.ha.members import Bootstrap, Cluster, Member
from srengine.ha.messages import Introduction, Join, Joined, KnownMember
from srengine.node.identity import save_identity
from srengine.node.trust import NODE_TABLE

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_logger = logging.getLogger(__name__)

ASK_AGAIN_S: Final = 0.2
SAY_AGAIN_S: Final = 5.0
JOIN_TIMEOUT_S: Final = 10.0
_FIRST_ENTRY: Final = b"first_entry"
"""Local row: see `Settling.first_entry`."""


class Settling:
    """Brings a node to the point where it has a cluster."""

    def __init__(self, node: Runtime) -> None:
        self._node = node
        self._said_at: dict[str, float] = {}

    async def run(self) -> None:
        """Return when the node's identity names a cluster and its log begins with the cluster's first entry or will be
        filled by a leader.
        """
        node = self._node
        for member in node.options.initial:
            node.ways.know(member.name, member.address, member.public_key)
        if node.identity.cluster_id:
            return
        if not node.options.cluster and not node.identity.cluster_name:
            raise errors.UsageError("a new cluster needs a name: --cluster NAME")
        if node.options.join:
            self.keep_id()
            await self._let_in(node.options.join)
            return
        if not node.options.initial:
            raise errors.UsageError(
                f"{node.options.data} belongs to no cluster yet: --initial must name the first members, or --join one "
                f"member of a running cluster"
            )
        begun = self.first_entry()
        if begun:
            # The crash came between the first entry and the identity.
            self._adopt(begun)
            return
        await self._settle()

    def first_entry(self) -> bytes:
        """Return the body of the command that founded the cluster, as this first member has written it down; empty on
        others.
        """
        return self._node.metadata.get(NODE_TABLE, _FIRST_ENTRY) or b""

    def first_members(self) -> tuple[KnownMember, ...]:
        """Return the members with which the cluster was founded; none on nodes that came later."""
        body = self.first_entry()
        return known(list(msgspec.msgpack.decode(body, type=Bootstrap).members)) if body else ()

    def keep_id(self) -> None:
        """Write the id of a blank directory down: from now on others may know it."""
        node = self._node
        if not node.identity_kept:
            save_identity(node.options.data, node.identity)
            node.identity_kept = True

    def agrees(self, cluster_name: str, initial: tuple[str, ...]) -> bool:
        """Return whether another first node was started for the same cluster as this one."""
        return cluster_name == self._node.identity.cluster_name and initial == self._initial

    @property
    def _initial(self) -> tuple[str, ...]:
        return tuple(f"{member.name}={member.address}" for member in self._node.options.initial)

    # --- with --initial ----------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Ask all others until one knows a cluster, or all are known to be blank and this node is to found one."""
        node = self._node
        others = [member.name for member in node.options.initial if member.name != node.name]
        founder = node.options.initial[0].name == node.name
        told: dict[str, Introduction] = {}
        asking = {asyncio.ensure_future(self._ask(name)): name for name in others}
        try:
            while True:
                if founder and len(told) == len(others):
                    self._found(told)
                    return
                if not asking:
                    await asyncio.sleep(ASK_AGAIN_S)
                    asking = {asyncio.ensure_future(self._ask(name)): name for name in others}
                done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    name, introduction = asking.pop(attempt), attempt.result()
                    if introduction.cluster_id:
                        await self._enter(name, introduction)
                        return
                    self._check_agreement(name, introduction)
                    told[name] = introduction
        finally:
            for attempt in asking:
                attempt.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    def _found(self, told: dict[str, Introduction]) -> None:
        node = self._node
        self.keep_id()
        ids = {name: introduction.node_id for name, introduction in told.items()} | {node.name: node.identity.node_id}
        if len(set(ids.values())) != len(ids):
            raise errors.Conflict("two first nodes show the same id: one directory is a copy of another", ids=ids)
        body = msgspec.msgpack.encode(
            Bootstrap(
                Cluster(secrets.token_hex(16), node.identity.cluster_name),
                tuple(
                    Member(
                        member.name,
                        member.address,
                        number,
                        node_id=ids[member.name],
                        incarnation=1,
                        public_key=member.public_key,
                    )
                    for number, member in enumerate(node.options.initial)
                ),
            )
        )
        self._adopt(body)
        _logger.info(
            "founded cluster %s",
            node.identity.cluster_name,
            extra={"event": "founded", "cluster_id": node.identity.cluster_id},
        )

    def _adopt(self, body: bytes) -> None:
        """Write the cluster's first entry down, then take the cluster's id; both durable, in this order. The log begins
        with the entry as soon as coordination starts.
        """
        node = self._node
        founded = msgspec.msgpack.decode(body, type=Bootstrap)
        number = next(member.number for member in founded.members if member.node_id == node.identity.node_id)
        with node.metadata.transaction() as transaction:
            transaction.put(NODE_TABLE, _FIRST_ENTRY, body)
        node.adopt(replace(node.identity, cluster_id=founded.cluster.cluster_id, number=number))

    async def _enter(self, name: str, told: Introduction) -> None:
        """Take part in the cluster that ``name`` belongs to."""
        node = self._node
        if told.cluster_name != node.identity.cluster_name:
            raise errors.ForeignData(
                f"{name} is of cluster {told.cluster_name}, {node.name} wants {node.identity.cluster_name}"
            )
        founded = _founded(told).members if told.bootstrap else ()
        if any(member.node_id == node.identity.node_id for member in founded):
            self._adopt(told.bootstrap)
            _logger.info("joined cluster %s", told.cluster_name, extra={"event": "joined"})
            return
        names = [member.name for member in told.members]
        if names and node.name not in names:
            raise errors.Conflict(
                f"cluster {told.cluster_name} has the members {', '.join(names)}; {node.name} is none of them: "
                f"let it in with member add, --join and --ticket"
            )
        self.keep_id()
        way = node.ways[name]
        await self._let_in(way.address + (f"#{way.public_key}" if way.public_key else ""))

    def _check_agreement(self, name: str, told: Introduction) -> None:
        node = self._node
        if told.cluster_name != node.identity.cluster_name:
            raise errors.ForeignData(
                f"{name} is started for cluster {told.cluster_name}, {node.name} for {node.identity.cluster_name}"
            )
        if told.initial != self._initial:
            raise errors.Conflict(
                f"--initial of {name} is {','.join(told.initial) or 'empty'}, of {node.name} "
                f"{','.join(self._initial)}: all first nodes name the same members in the same order",
                peer=name,
            )

    # --- being let in ------------------------------------------------------------------------------------------------

    async def _let_in(self, address: str) -> None:
        """Ask the cluster at ``address`` until this node is a member; what it refuses for good is raised."""
        node = self._node
        address, _, key = address.partition("#")
        server_key = bytes.fromhex(key) if key else None
        channel = node.endpoint.channel(address, port="client", server_key=server_key)
        began = node.clock.monotonic_s()
        try:
            while True:
                try:
                    reply = await channel.request(self._wish(), timeout_s=JOIN_TIMEOUT_S + 1)
                    break
                except errors.Error as error:
                    if not error.retryable:
                        raise
                    patience = limits.DUPLICATE_PATIENCE_S
                    if error.details.get("holder_alive") and node.clock.monotonic_s() - began > patience:
                        raise errors.Conflict(
                            f"another process runs as {node.name}, and {node.options.data} is not its directory"
                        ) from error
                    self._say(address, error)
                    await asyncio.sleep(ASK_AGAIN_S)
        finally:
            await channel.close()
        joined = reply.message
        if not isinstance(joined, Joined):
            raise errors.FrameError(f"a wish to join was answered with {type(joined).__name__}")
        if joined.cluster_name != node.identity.cluster_name:
            raise errors.ForeignData(
                f"{address} is of cluster {joined.cluster_name}, {node.name} wants {node.identity.cluster_name}"
            )
        for member in joined.members:
            node.ways.know(member.name, member.address, member.public_key)
        node.told_members = joined.members
        # NB: this directory was not there when the member of this name last ran, if it ever did: it counts for nothing
        # until it is proved.
        node.adopt(replace(node.identity, cluster_id=joined.cluster_id, number=joined.number, distrusted=True))
        _logger.info("let in to cluster %s", joined.cluster_name, extra={"event": "joined", "number": joined.number})

    def _wish(self) -> Join:
        node = self._node
        return Join(
            name=node.name,
            node_id=node.identity.node_id,
            address=node.advertised,
            public_key=node.public_key,
            role=node.options.role,
            ticket=node.options.ticket,
            timeout_s=JOIN_TIMEOUT_S,
        )

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _ask(self, name: str) -> Introduction:
        """Return a member's introduction as soon as it answers."""
        while True:
            try:
                return await self._node.ways[name].introduce()
            except (errors.Unreachable, errors.TimedOut) as error:
                self._say(name, error)
                await asyncio.sleep(ASK_AGAIN_S)

    def _say(self, name: str, error: errors.Error) -> None:
        now = self._node.clock.monotonic_s()
        if now - self._said_at.get(name, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said_at[name] = now
            _logger.info("waiting for %s: %s", name, error.message, extra={"event": "waiting"})


def _founded(told: Introduction) -> Bootstrap:
    try:
        return msgspec.msgpack.decode(told.bootstrap, type=Bootstrap)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise errors.FrameError(f"the first entry that {told.name} tells cannot be read: {error}") from error


def known(members: list[Member]) -> tuple[KnownMember, ...]:
    """Return members as they are told to other nodes."""
    return tuple(
        KnownMember(member.name, member.node_id, member.address, member.number, member.public_key, member.role)
        for member in members
    )
