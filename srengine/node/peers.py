"""What a node answers to other nodes about tablets and itself: pulls, fetches, copies, states."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from srengine.ha.messages import Fetch, Ping, Pong, Pull
from srengine.node.repairs import RepairServices
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
        serve(Ping, self._pinged, ports=("peer",))
        serve(ReplicaStates, self._asked_states, ports=("peer",))
        RepairServices(self._node).register()
        self._node.endpoint.serve_stream(Copy, self._copied)

    async def _pulled(self, peer: Peer, message: Pull, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        slot = self._node.sync.slot(message.group)
        position = message.position if slot is None else slot.position
        refused = self._node.contact.judge(message, position)
        if refused is not None:
            return Reply(refused)
        answer = await self._node.sync.pulled(message)
        return Reply(answer.reply, answer.attachments)

    async def _fetched(self, peer: Peer, message: Fetch, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        answer = await self._node.sync.fetched(message)
        return Reply(answer.reply, answer.attachments)

    @staticmethod
    async def _pinged(peer: Peer, message: Ping, attachments: Sequence[memoryview]) -> Reply:
        del peer, message, attachments
        return Reply(Pong())

    async def _copied(self, peer: Peer, message: Copy) -> AsyncIterator[bytes]:
        del peer
        async for item in self._node.sync.copy_stream(message):
            yield item

    async def _asked_states(self, peer: Peer, message: ReplicaStates, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        return Reply(self._node.own_states(message.table))
