"""Whether the agreed state of this node still is the agreed one, asked from time to time (B17).

Applying the same entries makes the same rows; a row that is changed by anything else (a hand in the file, a fault that
no checksum covers) stays wrong for ever. So every node compares the digest of its state with those of the others at the
same index. It repairs itself when a majority of the voters agrees on another one than its own: it fetches the state of
one of them and puts it in place. Who is alone with its digest cannot know that it is right, so nothing happens without
a majority; while entries are applied all the time the indexes may not meet, and the next round asks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import msgspec

from srengine import errors
from srengine.ha.backends import Answer, Attachments, Surroundings
from srengine.ha.backends.raft_standing import Standing
from srengine.ha.backends.raft_state import JournalState, StateCopies
from srengine.ha.messages import DigestAt, StateDigest
from srengine.ha.quorum import majority
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

ASK_S = 5.0


class Reconciling:
    """Compares and repairs, on every node; answers others."""

    def __init__(
        self, around: Surroundings, standing: Standing, journal: JournalState, copies: StateCopies, period_s: float
    ) -> None:
        self._around = around
        self._standing = standing
        self._journal = journal
        self._copies = copies
        self._period_s = period_s

    async def run(self) -> None:
        """Compare once in a period until cancelled."""
        while True:
            await asyncio.sleep(self._period_s)
            if self._standing.role.leader is None or self._standing.removed is not None:
                continue
            try:
                await self.compare()
            except errors.Error as error:
                _logger.warning("reconciling: %s", error.message, extra={"event": "reconcile_failed"})

    async def serve(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        """Answer `DigestAt`: `NotReady` when this node does not stand at that index."""
        del node, attachments
        assert isinstance(message, DigestAt), message
        index, digest = await asyncio.to_thread(self._journal.machine.described)
        if index != message.index:
            raise errors.NotReady(f"this node has applied {index}", index=index)
        return StateDigest(index, digest), ()

    async def compare(self) -> bool:
        """Compare with the others; return whether this node had to repair itself."""
        index, own = await asyncio.to_thread(self._journal.machine.described)
        voters = {node for node, member in self._standing.members.items() if member.votes}
        others = sorted(voters - {self._around.node_id})
        answers = await asyncio.gather(*(self._ask(node, index) for node in others))
        told = {node: digest for node, digest in zip(others, answers, strict=True) if digest is not None}
        if self._around.node_id in voters:
            told[self._around.node_id] = own
        if not told:
            return False
        digest, count = Counter(told[node] for node in sorted(told)).most_common(1)[0]
        if digest == own or count < majority(len(voters)):
            return False
        source = next(node for node in sorted(told) if told[node] == digest)
        self._around.alarm(
            "state_differs", f"the agreed state at {index} is another one here; it is fetched from {source}"
        )
        await self._copies.replace(source, index)
        self._around.metrics.add("srengine_ha_state_repairs_total")
        self._standing.read_again()
        return True

    async def _ask(self, node: NodeId, index: int) -> bytes | None:
        try:
            reply, _ = await self._around.wire.request(node, DigestAt(index), timeout_s=ASK_S)
        except errors.Error:
            return None
        return reply.digest if isinstance(reply, StateDigest) and reply.index == index else None
