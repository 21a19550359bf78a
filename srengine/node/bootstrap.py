"""Becoming a member: a node that belongs to no cluster yet finds out which, or the first one founds it.

::

    identity with a cluster ---------------------------------> member (the first one only with its catalog)
    no identity, first of --initial, everybody else blank ---> founds: cluster id, first journal entry, identity
    no identity, first, somebody else has an identity -------> stops with exit 5: its own data was lost
    no identity, not first ----------------------------------> waits for the first one's cluster id and takes it

All first nodes name the same members in the same order and the same cluster; whoever does not is told which one
differs. The founder asks *every* other member: one that holds an identity knows of a cluster that must not be
forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors
from srengine.ha.journal import Command, chained
from srengine.ha.journal_store import JournalStore
from srengine.ha.members import BOOTSTRAP, Bootstrap, Cluster, Member, read_cluster
from srengine.ha.messages import Introduction

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_logger = logging.getLogger(__name__)

ASK_AGAIN_S: Final = 0.2
SAY_AGAIN_S: Final = 5.0


class Settling:
    """Brings a node to the point where it has a cluster."""

    def __init__(self, node: Runtime) -> None:
        self._node = node
        self._said_at: dict[str, float] = {}

    async def run(self) -> None:
        """Return when the node's identity names a cluster."""
        node = self._node
        for member in node.options.initial:
            node.ways.know(member.name, member.address, member.public_key)
        if node.identity.cluster_id:
            self._check_catalog()
            return
        if not node.options.initial:
            raise errors.UsageError(
                f"{node.options.data} belongs to no cluster yet: --initial must name the first members"
            )
        if not node.options.cluster and not node.identity.cluster_name:
            raise errors.UsageError("a new cluster needs a name: --cluster NAME")
        if node.options.initial[0].name == node.name:
            await self._found()
        else:
            await self._join()

    def _check_catalog(self) -> None:
        node = self._node
        if node.identity.number == 0 and read_cluster(node.metadata) is None:
            raise errors.ForeignData(
                f"{node.options.data} belongs to cluster {node.identity.cluster_name} "
                f"({node.identity.cluster_id}), but its catalog is gone: put meta/ or the whole directory back from a "
                f"copy (an older one is brought up to date)",
                cluster_id=node.identity.cluster_id,
            )

    # --- founding ----------------------------------------------------------------------------------------------------

    async def _found(self) -> None:
        node = self._node
        begun = read_cluster(node.metadata)
        if begun is not None:
            # The crash came between the first entry and the identity.
            node.adopt(replace(node.identity, cluster_id=begun.cluster_id, cluster_name=begun.name, number=0))
            return
        await asyncio.gather(*(self._blank(member.name) for member in node.options.initial if member.name != node.name))
        cluster = Cluster(secrets.token_hex(16), node.identity.cluster_name)
        members = tuple(
            Member(member.name, member.address, number, public_key=member.public_key)
            for number, member in enumerate(node.options.initial)
        )
        body = msgspec.msgpack.encode(Bootstrap(cluster, members))
        store = JournalStore(node.metadata, cluster.cluster_id)
        if store.position.sequence == 0:
            store.append([chained(bytes(16), 1, Command(BOOTSTRAP, body))])
        entry = store.entry(1)
        assert entry is not None
        refusal = node.machine.apply(entry.index, entry.term, entry.command).refusal
        if refusal is not None:
            raise refusal
        founded = read_cluster(node.metadata)
        assert founded is not None
        node.adopt(replace(node.identity, cluster_id=founded.cluster_id, number=0))
        _logger.info("founded cluster %s", founded.name, extra={"event": "founded", "cluster_id": founded.cluster_id})

    async def _blank(self, name: str) -> None:
        """Return when the member has said that it belongs to no cluster and wants the same one."""
        told = await self._ask(name)
        if told.cluster_id:
            raise errors.ForeignData(
                f"{name} already belongs to cluster {told.cluster_name} ({told.cluster_id}), and "
                f"{self._node.options.data} holds nothing of it: {self._node.name} does not found another "
                f"one; put its directory back from a copy (an older one is brought up to date)",
                cluster_id=told.cluster_id,
                peer=name,
            )
        self._check_agreement(name, told)

    async def _join(self) -> None:
        """Take the cluster of the first member, once it has one."""
        node = self._node
        names = [member.name for member in node.options.initial]
        while True:
            told = await self._ask(names[0])
            if told.initial:
                self._check_agreement(names[0], told)
            if told.cluster_name != node.identity.cluster_name:
                raise errors.ForeignData(
                    f"{names[0]} is of cluster {told.cluster_name}, {node.name} wants {node.identity.cluster_name}"
                )
            if told.cluster_id and told.members:
                if node.name not in told.members:
                    raise errors.Conflict(
                        f"cluster {told.cluster_name} has the members {', '.join(told.members)}; {node.name} is "
                        f"none of them, and joining a running cluster is not possible yet"
                    )
                number = told.members.index(node.name)
                if number == 0:
                    raise errors.ForeignData(f"{node.name} founded cluster {told.cluster_name} and lost its directory")
                node.adopt(replace(node.identity, cluster_id=told.cluster_id, number=number))
                _logger.info("joined cluster %s", told.cluster_name, extra={"event": "joined"})
                return
            await asyncio.sleep(ASK_AGAIN_S)

    def _check_agreement(self, name: str, told: Introduction) -> None:
        node = self._node
        if told.cluster_name != node.identity.cluster_name:
            raise errors.ForeignData(
                f"{name} is started for cluster {told.cluster_name}, {node.name} for {node.identity.cluster_name}"
            )
        mine = tuple(f"{member.name}={member.address}" for member in node.options.initial)
        if told.initial != mine:
            raise errors.Conflict(
                f"--initial of {name} is {','.join(told.initial) or 'empty'}, of {node.name} {','.join(mine)}: "
                f"all first nodes name the same members in the same order",
                peer=name,
            )

    async def _ask(self, name: str) -> Introduction:
        """Return a member's introduction as soon as it answers."""
        while True:
            try:
                return await self._node.ways[name].introduce()
            except (errors.Unreachable, errors.TimedOut) as error:
                now = self._node.clock.monotonic_s()
                if now - self._said_at.get(name, -SAY_AGAIN_S) >= SAY_AGAIN_S:
                    self._said_at[name] = now
                    _logger.info("waiting for %s: %s", name, error.message, extra={"event": "waiting"})
                await asyncio.sleep(ASK_AGAIN_S)
