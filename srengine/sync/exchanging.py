"""Exchanges between nodes: the machines of `exchange_machine` driven over the peer port.

::

    follower, or a leader that is wrong                 whoever is right
    Exchanges.become_equal --- requests, in order --->  Answering.answer (depends on nothing kept)
      one transaction that must reach the root          leaves stay warm for a while

What the machine announces is sent while the own side goes on working, so that both sides walk at the same time.

The initiator holds its tablet's writing lock, so it stands still; the responder goes on with its writes. What blocks
(walks, sketches, the transaction) runs in threads. Both sides are bounded: so many at a time, so long for an answer, so
many requests (the machine's rule). Cancelling leaves nothing behind: either the transaction happened or nothing did.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.ha.contact import Channel
from srengine.ha.follower_machine import Path
from srengine.metrics import Metrics
from srengine.storage import Tablet
from srengine.storage.checking import prove
from srengine.storage.merkle import Moment
from srengine.storage.view import decode_meta, decode_place
from srengine.sync.exchange_machine import REPLY_TIMEOUT_S, Apply, Initiator, Outcome, Responder
from srengine.sync.exchange_messages import (
    ExchangeClose,
    ExchangeCompare,
    ExchangeDiffers,
    ExchangeDump,
    ExchangeEqual,
    ExchangeFetch,
    ExchangeFull,
    ExchangePrepare,
    ExchangeSketch,
    ExchangeTables,
    Reason,
    Reply,
    Request,
)
from srengine.sync.quarantine import Quarantine
from srengine.sync.slots import Slot
from srengine.types import Position

Buffer = bytes | bytearray | memoryview
REQUESTS: Final = (ExchangeCompare, ExchangePrepare, ExchangeSketch, ExchangeFetch, ExchangeDump)
_REPLIES: Final = (ExchangeEqual, ExchangeDiffers, ExchangeClose, ExchangeTables, ExchangeFull)


class TabletSide:
    """A tablet as the machines see it."""

    def __init__(self, tablet: Tablet) -> None:
        self.tablet = tablet

    @property
    def place(self) -> tuple[bytes, int, int]:
        """See `exchange_machine.Side`."""
        position = self.tablet.position
        return position.root, position.count, position.sequence

    def stands_at(self, where: bytes) -> bool:
        """See `exchange_machine.Side`."""
        return self.tablet.stands_at(where)

    def moment(self, *, recount: bool = False) -> AbstractContextManager[Moment]:
        """See `exchange_machine.Side`."""
        return self.tablet.leaves.moment(recount=recount)


# --- bodies on the wire ----------------------------------------------------------------------------------------------


def pack(message: Any, attachments: Sequence[bytes] = ()) -> tuple[Any, tuple[bytes, ...]]:
    """Return message and attachments as they travel: a large body goes first among the attachments."""
    if len(message.body) <= limits.EXCHANGE_INLINE_BYTES_MAX:
        return message, tuple(attachments)
    return msgspec.structs.replace(message, body=b""), (message.body, *attachments)


def unpack(message: Any, attachments: Sequence[Buffer]) -> tuple[Any, Sequence[Buffer]]:
    """Undo `pack`. No body is empty by itself."""
    if message.body:
        return message, attachments
    if not attachments:
        raise errors.FrameError("a message of an exchange without a body")
    return msgspec.structs.replace(message, body=bytes(attachments[0])), attachments[1:]


# --- the side that becomes equal -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What an exchange did. ``full_copy``: why the tablet has to be copied whole instead, None: it is equal now.

    ``bytes_moved`` both ways, ``records`` that differed, ``path`` and ``reason`` as status shows them.
    """

    position: Position
    path: Path
    reason: str
    bytes_moved: int
    rounds: int
    records: int
    full_copy: Reason | None = None


class Unproven(errors.Diverged):
    """The authority's rows did not reach its root; nothing changed."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What the authority's state must be to be taken over.

    ``at_least``: no position below this sequence replaces the own one. ``exactly``: this very position or nothing.
    """

    lineage: str
    at_least: int = 0
    exactly: Position | None = None

    def check(self, work: Apply) -> None:
        """Raise `ForeignData` or `Diverged` for a state that must not replace the own one."""
        sequence, root, count = decode_place(work.state)
        for database, name, value in decode_meta(work.meta):
            if (database, name) == (0, b"ancestry") and value[-24:-8].hex() != self.lineage:
                raise errors.ForeignData(
                    f"the peer is of lineage {value[-24:-8].hex()}, this tablet of {self.lineage}", lineage=self.lineage
                )
        if sequence < self.at_least:
            raise errors.Diverged(
                f"the peer stands at {sequence}, the own copy at {self.at_least}; it stays",
                own=self.at_least,
                source=sequence,
            )
        if self.exactly is not None and (sequence, root, count) != tuple(self.exactly)[1:]:
            raise errors.NotReady(f"the peer stands at {sequence} now, not at {self.exactly.sequence} as it said")


class Exchanges:
    """The exchanges that this node begins."""

    def __init__(
        self,
        *,
        quarantine: Quarantine,
        metrics: Metrics,
        warm: WarmLeaves,
        now: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._quarantine = quarantine
        self._metrics = metrics
        self._warm = warm
        self._now = now
        self._rng = rng or random.Random()
        self._room = asyncio.Semaphore(limits.EXCHANGES_MAX)

    async def become_equal(
        self, slot: Slot, peer: str, channel: Channel, goal: Goal, *, recount: bool = False
    ) -> Result:
        """Make this node's copy equal to ``peer``'s, or say that a full copy is needed. The caller holds no lock.

        Raises `Unproven` (nothing changed; `Quarantine` has counted it if the own copy is whole), `NotReady`
        (quarantined, busy, or moved on), `CorruptionError` (a page of the own copy cannot be read) and what the
        transport raises.
        """
        self._quarantine.check(peer)
        async with self._room, slot.writing:
            tablet = slot.opened()
            self._warm.touch(tablet)
            try:
                outcome = await self._run(tablet, slot.spec.tablet_id, channel, goal, recount=recount)
            except errors.FrameError as error:
                await self._failed(tablet, peer, error.message, recount=recount)
                raise
            finally:
                self._warm.touch(tablet)
            self._count(outcome)
            if outcome.unproven and outcome.full_copy is not None:
                why = f"the root was not reached {outcome.unproven} times"
                await self._failed(tablet, peer, why, recount=recount)
                raise Unproven(f"the exchange with {peer} was not proved: {why}", peer=peer)
            if outcome.full_copy is None:
                self._quarantine.proved(peer)
            figures = outcome.figures
            return Result(
                position=tablet.position,
                path=Path.LEAVES if figures.mode == "dump" else Path.SKETCH,
                reason=", ".join(figures.reasons),
                bytes_moved=figures.locating_bytes + figures.record_bytes,
                rounds=figures.rounds,
                records=len(outcome.report),
                full_copy=outcome.full_copy,
            )

    async def _run(self, tablet: Tablet, tablet_id: str, channel: Channel, goal: Goal, *, recount: bool) -> Outcome:
        initiator = Initiator(tablet_id, TabletSide(tablet), self._rng, recount=recount)
        await asyncio.to_thread(initiator.start)
        announced: list[asyncio.Task[None]] = []
        try:
            return await self._steps(initiator, tablet, channel, goal, announced)
        finally:
            for task in announced:
                task.cancel()

    async def _steps(
        self,
        initiator: Initiator,
        tablet: Tablet,
        channel: Channel,
        goal: Goal,
        announced: list[asyncio.Task[None]],
    ) -> Outcome:
        while True:
            effects = initiator.drain()
            if effects.outcome is not None:
                return effects.outcome
            if effects.announce is not None:
                announced.append(asyncio.create_task(_announce(channel, effects.announce.message)))
                await asyncio.to_thread(initiator.announced)
            elif effects.send is not None:
                initiator.tick(self._now())
                message, attachments = pack(effects.send.message)
                try:
                    reply, received = await channel.request(message, attachments, timeout_s=REPLY_TIMEOUT_S)
                except errors.CorruptionError as error:
                    raise errors.NotReady(f"the peer's own copy is damaged: {error.message}") from error
                if not isinstance(reply, _REPLIES):
                    raise errors.FrameError(f"an exchange was answered with {type(reply).__name__}")
                whole, rest = unpack(reply, received)
                await asyncio.to_thread(initiator.step, whole, [bytes(part) for part in rest])
            elif effects.apply is not None:
                goal.check(effects.apply)
                proved = await asyncio.to_thread(_apply, tablet, effects.apply)
                await asyncio.to_thread(functools.partial(initiator.applied, proved=proved))

    async def _failed(self, tablet: Tablet, peer: str, why: str, *, recount: bool) -> None:
        """Count a failed proof against the peer, unless the own copy is the one that does not add up."""
        if not recount and not (await asyncio.to_thread(prove, tablet)).whole:
            return
        if self._quarantine.failed(peer, why):
            self._metrics.add("srengine_exchange_quarantines_total")

    def _count(self, outcome: Outcome) -> None:
        figures, add = outcome.figures, self._metrics.add
        if outcome.full_copy is not None:
            kind = "unproven" if outcome.unproven else "full_copy"
        else:
            kind = "repaired" if outcome.report else "equal"
        add("srengine_exchange_runs_total", outcome=kind, mode=figures.mode or "compare")
        add("srengine_exchange_locating_bytes_total", figures.locating_bytes)
        add("srengine_exchange_record_bytes_total", max(0, figures.record_bytes))
        add("srengine_exchange_rounds_total", figures.rounds)
        add("srengine_exchange_records_total", len(outcome.report))
        for reason in figures.reasons:
            add("srengine_exchange_reasons_total", reason=reason)


async def _announce(channel: Channel, message: Request) -> None:
    """Send what the peer may use. That it could not be sent, or was refused, changes nothing."""
    with contextlib.suppress(errors.Error):
        await channel.request(message, timeout_s=REPLY_TIMEOUT_S)


def _apply(tablet: Tablet, work: Apply) -> bool:
    """Do what the machine says in one transaction; return whether it reached the root. Blocks."""
    try:
        tablet.repair(
            work.rows,
            work.removed,
            work.meta,
            work.state,
            replace_rows=work.replace_rows,
            base=work.base,
            actual=work.actual,
        )
    except errors.Diverged:
        return False
    return True


# --- the side that is right ------------------------------------------------------------------------------------------


class WarmLeaves:
    """Which tablets' leaves are kept in memory, and for how long: each costs a note for every write."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._used: dict[Tablet, float] = {}

    def touch(self, tablet: Tablet) -> None:
        """Note that an exchange uses the leaves."""
        self._used.pop(tablet, None)
        self._used[tablet] = self._now()

    async def expire(self) -> None:
        """Drop what nobody used for a while, and the least recently used ones beyond the bound."""
        before = self._now() - limits.LEAVES_WARM_S
        surplus = len(self._used) - limits.LEAVES_WARM_MAX
        # Least recently used first.
        for place, (tablet, at) in enumerate(list(self._used.items())):
            if at < before or place < surplus:
                self._used.pop(tablet, None)
                if not tablet.closed:
                    # Waits for an exchange that uses them.
                    await asyncio.to_thread(tablet.leaves.drop)

    def __contains__(self, tablet: Tablet) -> bool:
        return tablet in self._used


@dataclass(slots=True)
class Answering:
    """The requests of exchanges that this node answers: a few at a time, a few waiting, the rest come again."""

    metrics: Metrics
    warm: WarmLeaves
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(limits.EXCHANGE_ANSWERS_MAX))
    waiting: int = 0

    async def answer(
        self, tablet: Tablet, request: Request, attachments: Sequence[Buffer]
    ) -> tuple[Reply, tuple[bytes, ...]]:
        """Answer one request. Raises `NotReady` when too many wait, `FrameError` for a malformed one."""
        whole, rest = unpack(request, attachments)
        if rest:
            raise errors.FrameError("a request of an exchange has nothing beside its body")
        if self.waiting >= limits.EXCHANGE_ANSWERS_WAITING_MAX:
            raise errors.NotReady("too many exchanges at a time; come again")
        self.waiting += 1
        try:
            async with self.room:
                self.warm.touch(tablet)
                reply, parts = await asyncio.to_thread(Responder(TabletSide(tablet)).step, whole)
        finally:
            self.waiting -= 1
        message, packed = pack(reply, parts)
        self.metrics.add("srengine_exchange_answers_total", kind=type(reply).__name__.removeprefix("Exchange").lower())
        self.metrics.add(
            "srengine_exchange_sent_bytes_total", len(message.body) + sum(len(attachment) for attachment in packed)
        )
        return message, packed
