"""What a node answers to other nodes about proofs and repairs: exchanges, single records, comparisons, rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from srengine import errors
from srengine.sync.exchange_messages import Request
from srengine.sync.exchanging import REQUESTS
from srengine.sync.messages import CheckKeys, Compare, FetchRows, Round, RoundsReply, RunRound
from srengine.transport import Peer, Reply

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

ROUND_TIMEOUT_S_MAX = 86_400.0


class RepairServices:
    """Handlers of the peer port; only members of the same cluster get there."""

    def __init__(self, node: Runtime) -> None:
        self._node = node

    def register(self) -> None:
        """Put the handlers on the port."""
        serve = self._node.endpoint.serve
        for request in REQUESTS:
            serve(request, self._exchanged, ports=("peer",))
        serve(FetchRows, self._fetched_rows, ports=("peer",))
        serve(CheckKeys, self._checked_keys, ports=("peer",))
        serve(Compare, self._compared, ports=("peer",))
        serve(RunRound, self._ran_round, ports=("peer",))

    async def _exchanged(self, peer: Peer, message: Request, attachments: Sequence[memoryview]) -> Reply:
        reply, parts = await self._node.sync.exchanged(peer.name or "", message, attachments)
        return Reply(reply, parts)

    async def _fetched_rows(self, peer: Peer, message: FetchRows, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        found, rows = await self._node.sync.rows_fetched(message)
        return Reply(found, (rows,))

    async def _checked_keys(self, peer: Peer, message: CheckKeys, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        return Reply(await self._node.sync.keys_checked(message))

    async def _compared(self, peer: Peer, message: Compare, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        return Reply(await self._node.sync.compared(message))

    async def _ran_round(self, peer: Peer, message: RunRound, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        checked = msgspec.structs.replace(message, timeout_s=checked_round_timeout(message.timeout_s))
        return Reply(await self._node.sync.rounds(checked))


def checked_round_timeout(timeout_s: float) -> float:
    """Return the time that a round may take; `InvalidValue` for what cannot be meant."""
    if not 0 < timeout_s <= ROUND_TIMEOUT_S_MAX:
        raise errors.InvalidValue(f"a round of {timeout_s} s is not within 0 to {ROUND_TIMEOUT_S_MAX:g}")
    return timeout_s


async def run_rounds(node: Runtime, table: str, timeout_s: float) -> list[dict[str, Any]]:
    """Have every member check, compare and repair its replicas (of one table); return one object for each replica.

    A member that does not answer is listed with its replicas as ``unreachable``.
    """
    message = RunRound(table, checked_round_timeout(timeout_s))

    async def ask(name: str) -> tuple[Round, ...] | errors.Error:
        if name == node.name:
            return (await node.sync.rounds(message)).rounds
        try:
            reply = await node.ways[name].request(message, timeout_s=timeout_s + 5.0)
        except errors.Error as error:
            return error
        return reply.message.rounds if isinstance(reply.message, RoundsReply) else ()

    names = [member.name for member in node.members]
    answers = dict(zip(names, await asyncio.gather(*(ask(name) for name in names)), strict=True))
    rounds: list[Round] = []
    for name, answer in answers.items():
        if not isinstance(answer, errors.Error):
            rounds += answer
            continue
        for known in sorted(node.tables):
            if table not in {"", known}:
                continue
            rounds += [
                Round(known, tablet.number, tablet.id, name, tablet.leader, "unreachable", reason=answer.message)
                for tablet in node.tables[known].tablets
                if name in tablet.nodes
            ]
    rounds.sort(key=lambda each: (each.table, each.tablet, each.node))
    return [msgspec.structs.asdict(each) for each in rounds]
