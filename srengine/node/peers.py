"""What a node answers to other nodes: pulls, fetches, proposals, copies, states."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from srengine import errors
from srengine.ha.journal import Command
from srengine.ha.messages import JOURNAL_GROUP, Fetch, Propose, Proposed, Pull
from srengine.ha.one_node import LeadingJournal, entries_after
from srengine.node.repairs import RepairServices
from srengine.node.services import TIMEOUT_S_MAX
from srengine.sync.messages import Copy, ReplicaStates
from srengine.transport import Peer, Reply

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime


class PeerServices:
    """Handlers of the peer and bulk ports; only members of the same cluster get there (`Runtime` admits them)."""

    def __init__(self, node: Runtime) -> None:
        self._node = node

    def register(self) -> None:
        """Put the handlers on the ports."""
        serve = self._node.endpoint.serve
        serve(Pull, self._pulled, ports=("peer",))
        serve(Fetch, self._fetched, ports=("peer",))
        serve(Propose, self._proposed, ports=("peer",))
        serve(ReplicaStates, self._asked_states, ports=("peer",))
        RepairServices(self._node).register()
        self._node.endpoint.serve_stream(Copy, self._copied)

    async def _pulled(self, peer: Peer, message: Pull, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        slot = None if message.group == JOURNAL_GROUP else self._node.sync.slot(message.group)
        position = self._node.journal_store.position if slot is None else slot.position
        refused = self._node.contact.judge(message, position)
        if refused is not None:
            return Reply(refused)
        if message.group == JOURNAL_GROUP:
            if not isinstance(self._node.journal, LeadingJournal):
                raise errors.NotLeader(
                    f"{self._node.name} does not lead the journal", leader=self._node.address_of(self._node.first)
                )
            reply, rows = await self._node.journal.answer(message)
            return Reply(reply, rows)
        answer = await self._node.sync.pulled(message)
        return Reply(answer.reply, answer.attachments)

    async def _fetched(self, peer: Peer, message: Fetch, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        if message.group == JOURNAL_GROUP:
            reply, rows = await entries_after(self._node.journal_store, message.position, self._node.contact)
            return Reply(reply, rows)
        answer = await self._node.sync.fetched(message)
        return Reply(answer.reply, answer.attachments)

    async def _proposed(self, peer: Peer, message: Propose, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        if not self._node.leads:
            raise errors.NotLeader(
                f"{self._node.name} does not lead the journal", leader=self._node.address_of(self._node.first)
            )
        index = await self._node.journal.propose(
            Command(message.kind, message.body), timeout_s=min(message.timeout_s, TIMEOUT_S_MAX)
        )
        return Reply(Proposed(index))

    async def _copied(self, peer: Peer, message: Copy) -> AsyncIterator[bytes]:
        del peer
        async for item in self._node.sync.copy_stream(message):
            yield item

    async def _asked_states(self, peer: Peer, message: ReplicaStates, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        return Reply(self._node.own_states(message.table))
