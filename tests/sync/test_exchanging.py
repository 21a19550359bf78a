"""Exchanges as nodes drive them: a channel between two copies, peers that lie, quarantine, bounds, cancellation."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from srengine import errors, limits
from srengine._native import merkle
from srengine.metrics import Metrics
from srengine.storage import Batch, encode_operations
from srengine.storage.merkle import Moment
from srengine.sync import exchange_machine
from srengine.sync.exchange_messages import (
    ExchangeClose,
    ExchangeCompare,
    ExchangeEqual,
    ExchangePrepare,
    ExchangePrepared,
    ExchangeSketch,
    Reason,
)
from srengine.sync.exchanging import Answering, Exchanges, Goal, Unproven, WarmLeaves, pack, unpack
from srengine.sync.quarantine import Quarantine
from tests.sync.copies import LINEAGE, TABLET, Side

Lie = Callable[[Any, tuple[bytes, ...]], tuple[Any, tuple[bytes, ...]]]


class Bench:
    """Two copies and the exchange between them; ``lie`` changes what the peer answers."""

    def __init__(self, path: Path) -> None:
        self.here, self.there = Side(path / "here"), Side(path / "there")
        self.now = 0.0
        self.alarms: list[str] = []
        self.metrics = Metrics()
        self.warm = WarmLeaves(lambda: self.now)
        self.quarantine = Quarantine(lambda: self.now, lambda event, text: self.alarms.append(f"{event}: {text}"))
        self.exchanges = Exchanges(
            quarantine=self.quarantine,
            metrics=self.metrics,
            warm=self.warm,
            now=lambda: self.now,
            rng=random.Random(1),
        )
        self.answering = Answering(self.metrics, self.warm)
        self.lie: Lie = lambda reply, parts: (reply, parts)
        self.asked: list[Any] = []
        self.asking = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def request(
        self, message: Any, attachments: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[Any, Sequence[bytes]]:
        self.asked.append(message)
        self.asking.set()
        if self.hold is not None:
            await self.hold.wait()
        reply, parts = await self.answering.answer(self.there.tablet, message, attachments)
        return self.lie(reply, parts)

    def stream(self, message: Any, *, timeout_s: float, proved: bool = False) -> Any:
        raise AssertionError("an exchange streams nothing")

    async def run(self, **options: Any) -> Any:
        goal = options.pop("goal", Goal(LINEAGE, at_least=self.here.slot.position.sequence))
        return await self.exchanges.become_equal(self.here.slot, "peer", self, goal, **options)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.here.close()
    made.there.close()


def same(bench: Bench) -> bool:
    """Whether both stand at one place. Their clocks differ, so equal content alone would not do."""
    return bench.here.slot.position == bench.there.slot.position


def differ(bench: Bench, records: int, *, apart: int = 1) -> None:
    """Let the copies tell two histories: the same sequences, other hybrid clocks in ``records`` of them."""
    puts = [(0, b"%08d" % number, b"base", 0, 0) for number in range(2000)]
    bench.there.tablet.apply([Batch(encode_operations(puts))])
    delta = bench.there.tablet.delta_since(0, bytes_max=limits.MIB)
    assert delta is not None
    bench.here.tablet.apply_delta(delta)
    assert same(bench)
    for side, text in ((bench.here, b"one"), (bench.there, b"other")):
        puts = [(0, b"%08d" % (number * apart), text, 0, 0) for number in range(records)]
        side.tablet.apply([Batch(encode_operations(puts))])


def test_copies_become_equal(bench: Bench) -> None:
    """K11: an exchange over a channel makes the copies equal in two round trips and says what it cost."""
    differ(bench, 3)
    result = asyncio.run(bench.run())
    assert same(bench)
    assert (result.path.value, result.records, result.rounds) == ("sketch", 3, 2)
    assert bench.here.tablet.verify().clean
    assert bench.metrics.value("srengine_exchange_records_total") >= 3
    assert (
        bench.metrics.value("srengine_exchange_runs_total", outcome="repaired", mode="leaf")
        + bench.metrics.value("srengine_exchange_runs_total", outcome="repaired", mode="prefix")
        + bench.metrics.value("srengine_exchange_runs_total", outcome="repaired", mode="record")
        >= 1
    )


def test_both_sides_walk_their_records_at_the_same_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """K11: by records, the peer makes its table while this node makes its own: each waits here for the other."""
    monkeypatch.setattr(exchange_machine, "ANNOUNCED_RECORDS_MIN", 0)
    monkeypatch.setattr(exchange_machine, "LEAF_MODE_RECORDS_MAX", 0)
    both = threading.Barrier(2, timeout=30.0)
    walked = []
    walk = Moment._walk

    def meet(moment: Moment, table: merkle.Sketch | None) -> None:
        if table is not None:
            walked.append(both.wait())
        walk(moment, table)

    monkeypatch.setattr(Moment, "_walk", meet)
    differ(bench, 60, apart=31)
    result = asyncio.run(bench.run())
    assert same(bench)
    assert sorted(walked) == [0, 1]
    assert (result.records, result.rounds) == (60, 2)
    assert [type(message) for message in bench.asked] == [ExchangeCompare, ExchangePrepare, ExchangeSketch]


def test_a_refused_announcement_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """K11: a peer that does not know announcements, or has no time for them, is asked for its records all the same."""
    monkeypatch.setattr(exchange_machine, "ANNOUNCED_RECORDS_MIN", 0)
    monkeypatch.setattr(exchange_machine, "LEAF_MODE_RECORDS_MAX", 0)

    def lie(reply: Any, parts: tuple[bytes, ...]) -> tuple[Any, tuple[bytes, ...]]:
        if isinstance(reply, ExchangePrepared):
            raise errors.NotReady("too many exchanges at a time; come again")
        return reply, parts

    bench.lie = lie
    differ(bench, 60, apart=31)
    result = asyncio.run(bench.run())
    assert same(bench)
    assert (result.records, result.rounds) == (60, 2)


def test_equal_copies_cost_one_message(bench: Bench) -> None:
    """K11: a comparison of equal copies is one message of 32 bytes, answered by 8."""
    differ(bench, 1)
    asyncio.run(bench.run())
    bench.asked.clear()
    result = asyncio.run(bench.run())
    assert (result.rounds, result.bytes_moved, len(bench.asked)) == (1, 40, 1)
    assert isinstance(bench.asked[0], ExchangeCompare)


def test_too_different_copies_are_left_to_a_full_copy(bench: Bench) -> None:
    """An exchange that would move more than a quarter says so and changes nothing."""
    differ(bench, 1500)
    before = bench.here.slot.position
    result = asyncio.run(bench.run())
    assert result.full_copy is Reason.TOO_DIFFERENT
    assert bench.here.slot.position == before


def forged(reply: Any, parts: tuple[bytes, ...]) -> tuple[Any, tuple[bytes, ...]]:
    """Change a byte of the rows that close an exchange."""
    if isinstance(reply, ExchangeClose) and len(parts) == 3 and parts[0]:
        rows = bytearray(parts[0])
        rows[-1] ^= 1
        return reply, (bytes(rows), *parts[1:])
    return reply, parts


def test_a_lying_peer_changes_nothing_and_is_quarantined(bench: Bench) -> None:
    """F47: rows that do not reach the promised root change nothing; after three exchanges the peer is left alone for a
    while, an alarm names it, and after that time it is asked again.
    """
    differ(bench, 2)
    before = bench.here.slot.position
    bench.lie = forged
    for _ in range(limits.EXCHANGE_UNPROVEN_MAX):
        with pytest.raises(Unproven):
            asyncio.run(bench.run())
    assert bench.here.slot.position == before
    assert bench.here.tablet.verify().clean
    assert bench.quarantine.out == ("peer",)
    assert bench.metrics.value("srengine_exchange_quarantines_total") == 1
    assert [alarm for alarm in bench.alarms if alarm.startswith("peer_quarantined")]
    bench.lie = lambda reply, parts: (reply, parts)
    asked = len(bench.asked)
    with pytest.raises(errors.NotReady, match="quarantined"):
        asyncio.run(bench.run())
    assert len(bench.asked) == asked, "a quarantined peer is not even asked"
    bench.now += limits.QUARANTINE_S + 1
    asyncio.run(bench.run())
    assert same(bench)
    assert bench.quarantine.out == ()


def test_malformed_answers_count_as_failed_proofs(bench: Bench) -> None:
    """F47: a peer that answers out of place or with broken bodies is quarantined, too."""
    differ(bench, 2)
    bench.lie = lambda reply, parts: (
        (reply, parts) if isinstance(reply, ExchangeEqual) else (msgspec.structs.replace(reply, body=b"\x07"), ())
    )
    for _ in range(limits.EXCHANGE_UNPROVEN_MAX):
        with pytest.raises(errors.FrameError):
            asyncio.run(bench.run())
    assert bench.quarantine.out == ("peer",)


def test_own_damage_is_not_the_peers_fault(bench: Bench) -> None:
    """F47: an exchange that fails because the own copy rots counts nothing against the peer; with a recount it ends
    equal.
    """
    from tests.node.rot import raw

    differ(bench, 2)
    bench.here.store.close()
    with raw(bench.here.path, TABLET) as (transaction, records, _):
        assert transaction.delete(b"%08d" % 1500, db=records)
    bench.here = Side.reopened(bench.here)
    for _ in range(limits.EXCHANGE_UNPROVEN_MAX + 1):
        with pytest.raises(Unproven):
            asyncio.run(bench.run())
    assert bench.quarantine.out == ()
    result = asyncio.run(bench.run(recount=True))
    assert result.records == 3
    assert same(bench)
    assert bench.here.tablet.verify().clean


def test_nothing_replaces_what_is_ahead(bench: Bench) -> None:
    """K04, F14: a peer that is behind, of another lineage, or elsewhere than it said is no source."""
    differ(bench, 2)
    bench.here.tablet.apply([Batch(encode_operations([(0, b"more", b"here", 0, 0)]))])
    before = bench.here.slot.position
    with pytest.raises(errors.Diverged, match="it stays"):
        asyncio.run(bench.run())
    with pytest.raises(errors.ForeignData):
        asyncio.run(bench.run(goal=Goal("ee" * 16)))
    with pytest.raises(errors.NotReady, match="as it said"):
        asyncio.run(bench.run(goal=Goal(LINEAGE, exactly=before)))
    assert bench.here.slot.position == before
    assert bench.quarantine.out == ()


def test_cancelled_exchange_leaves_nothing_behind(bench: Bench) -> None:
    """A cancelled exchange changes nothing and holds nothing: the next one goes through."""

    async def story() -> None:
        bench.hold = asyncio.Event()
        running = asyncio.ensure_future(bench.run())
        await bench.asking.wait()
        assert bench.here.slot.writing.locked()
        running.cancel()
        await asyncio.wait([running])
        assert not bench.here.slot.writing.locked()
        bench.hold = None
        await bench.run()

    differ(bench, 2)
    asyncio.run(story())
    assert same(bench)


def test_too_many_requests_wait_or_come_again(bench: Bench) -> None:
    """A node answers a few requests at a time, lets a few wait and tells the rest to come again."""

    async def story() -> int:
        async with bench.answering.room, bench.answering.room:
            position = bench.there.slot.position
            body = position.root + position.count.to_bytes(8, "little") + position.sequence.to_bytes(8, "little")
            request = ExchangeCompare(TABLET, body)
            waiting = [
                asyncio.ensure_future(bench.answering.answer(bench.there.tablet, request, ()))
                for _ in range(limits.EXCHANGE_ANSWERS_WAITING_MAX)
            ]
            # One turn of the loop: all of them stand at the door.
            await asyncio.sleep(0)
            assert bench.answering.waiting == limits.EXCHANGE_ANSWERS_WAITING_MAX
            with pytest.raises(errors.NotReady):
                await bench.answering.answer(bench.there.tablet, request, ())
        return len(await asyncio.gather(*waiting))

    assert asyncio.run(story()) == limits.EXCHANGE_ANSWERS_WAITING_MAX


def test_warm_leaves_are_dropped(bench: Bench) -> None:
    """Leaves that no exchange uses for a while are given back."""
    differ(bench, 2)
    asyncio.run(bench.run())
    tablet = bench.there.tablet
    assert tablet.leaves.tree.warm
    bench.now += limits.LEAVES_WARM_S + 1
    asyncio.run(bench.warm.expire())
    assert not tablet.leaves.tree.warm
    assert tablet not in bench.warm


def test_large_bodies_travel_as_attachments() -> None:
    """A body beyond the bound goes beside the message and comes back whole; one without any body is refused."""
    large = ExchangeCompare(TABLET, b"x" * (limits.EXCHANGE_INLINE_BYTES_MAX + 1))
    message, parts = pack(large, (b"rows",))
    assert (message.body, len(parts)) == (b"", 2)
    assert unpack(message, parts) == (large, (b"rows",))
    small = ExchangeCompare(TABLET, b"x" * 32)
    assert unpack(*pack(small)) == (small, ())
    with pytest.raises(errors.FrameError):
        unpack(ExchangeCompare(TABLET, b""), ())
