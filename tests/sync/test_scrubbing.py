"""The scrub without nodes: how fast it reads, when, and what it does with what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from srengine import errors, limits
from srengine.metrics import Metrics
from srengine.storage import Batch, encode_operations
from srengine.storage.checking import prove
from srengine.sync.exchanging import WarmLeaves
from srengine.sync.scrubbing import Scrubber
from tests.node import rot
from tests.sync.copies import TABLET, Side

COUNT, SIZE = 4000, 500


class Time:
    """A clock that stands still but for pauses, which it counts."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic_s(self) -> float:
        return self.now

    boottime_s = monotonic_s

    def wall_ms(self) -> int:
        return int(self.now * 1000)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Keeping:
    """Stands for a keeper: proves, and notes what it is asked to heal."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.healed: list[tuple[list[bytes], list[bytes]]] = []
        self.unread: list[str] = []
        self.heals = True

    async def prove(self) -> Any:
        return prove(self.side.tablet)

    async def heal(self, values: list[bytes], changes: list[bytes], why: str) -> bool:
        self.healed.append((values, changes))
        return self.heals

    def unreadable(self, error: errors.Error) -> None:
        self.unread.append(error.message)


class Group:
    """Stands for a tablet of a node."""

    def __init__(self, side: Side) -> None:
        self.slot = side.slot
        self.keeper = Keeping(side)
        self.doubts: list[str] = []

    def damaged(self, reason: str) -> None:
        self.doubts.append(reason)


class Bench:
    def __init__(self, side: Side, *, bytes_s: int, interval_s: float = 3600.0) -> None:
        self.time, self.metrics = Time(), Metrics()
        self.group = Group(side)
        self.bytes_s = bytes_s
        self.scrubber = Scrubber(
            lambda: [self.group],  # type: ignore[list-item]
            name="node-1",
            bytes_s=bytes_s,
            interval_s=interval_s,
            reach=None,  # type: ignore[arg-type]
            clock=self.time,
            metrics=self.metrics,
            warm=WarmLeaves(self.time.monotonic_s),
            pause=self.time.pause,
        )

    def scrub(self) -> Any:
        return asyncio.run(self.scrubber.scrub(self.group, bytes_s=self.bytes_s))  # type: ignore[arg-type]

    def run_until(self, condition: Callable[[], bool]) -> None:
        async def story() -> None:
            task = asyncio.ensure_future(self.scrubber.run())
            while not condition():
                await asyncio.sleep(0)
                assert not task.done(), task
            task.cancel()
            await asyncio.wait([task])

        asyncio.run(asyncio.wait_for(story(), 60))


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    made = Side(tmp_path / "data")
    puts = [(0, b"%08d" % number, b"%d" % number * SIZE, 0, 0) for number in range(COUNT)]
    made.tablet.apply([Batch(encode_operations(puts))])
    yield made
    made.close()


@pytest.mark.parametrize("bytes_s", [100_000, 4_000_000])
def test_the_rate_is_a_bound(side: Side, bytes_s: int) -> None:
    """All records are read, in bounded pieces, and never more bytes than so many a second."""
    bench = Bench(side, bytes_s=bytes_s)
    found = bench.scrub()
    assert (found.records, found.damages) == (COUNT, 0)
    total = bench.metrics.value("srengine_scrub_bytes_total")
    assert total >= COUNT * SIZE
    assert sum(bench.time.pauses) == pytest.approx(total / bytes_s)
    assert max(bench.time.pauses) <= 1.1 * limits.SCRUB_SLICE_BYTES / bytes_s
    assert bench.metrics.value("srengine_scrub_records_total") == COUNT
    assert side.slot.health.scrubbed_at > 0


def test_each_tablet_is_read_once_in_an_interval(side: Side) -> None:
    """The first pass waits until the node has settled, the next one for the interval; a rate of 0 reads nothing."""
    bench = Bench(side, bytes_s=1 << 30)
    passes = lambda: bench.metrics.value("srengine_scrub_passes_total")  # noqa: E731
    bench.run_until(lambda: passes() == 1)
    assert limits.SCRUB_START_S <= bench.time.now - 1000.0 <= limits.SCRUB_START_S + 5
    bench.run_until(lambda: passes() == 2)
    assert 3600 <= bench.time.now - 1000.0 <= 3600 + limits.SCRUB_START_S + 10
    silent = Bench(side, bytes_s=0)
    silent.run_until(lambda: silent.time.now > 1000.0 + 3 * 3600)
    assert silent.metrics.value("srengine_scrub_records_total") == 0


def test_what_is_found_is_told(side: Side, tmp_path: Path) -> None:
    """K11: rotten values and lost change entries are healed; records that miss the root are told to the machine."""
    side.store.close()
    path = tmp_path / "data"
    rot.flip_value(path, TABLET, [b"%08d" % 7])
    rot.lose_change(path, TABLET, 12)
    bench = Bench(Side.reopened(side), bytes_s=0)
    found = bench.scrub()
    assert bench.group.keeper.healed == [([b"%08d" % 7], [b"%08d" % 11])]
    assert (found.damages, found.whole, bench.group.doubts) == (2, True, [])
    bench.group.slot.health.scrubbed_at = 0.0
    bench.group.keeper.heals = False
    assert "could not be healed" in bench.scrub().reason
    assert bench.group.slot.health.scrubbed_at == 0.0, "what is still damaged is not verified"
    bench.group.slot.store.close()
    rot.remove(path, TABLET, [b"%08d" % 9])
    again = Bench(Side.reopened(bench.group.keeper.side), bytes_s=0)
    assert not again.scrub().whole
    assert len(again.group.doubts) == 1
    assert again.group.keeper.healed == []
    again.group.slot.store.close()
    again.group.keeper.side.rows.close()


def test_a_copy_that_is_being_filled_is_left_alone(side: Side) -> None:
    """K04: a half-applied copy is not scrubbed."""
    side.slot.tablet = None
    with pytest.raises(errors.NotReady):
        Bench(side, bytes_s=0).scrub()
