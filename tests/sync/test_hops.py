"""Streams between the loop and a thread beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from srengine import errors
from srengine.sync.hops import AHEAD_BYTES, IN_HAND_BYTES, made_ahead, use_all

SMALL = AHEAD_BYTES // 4


class Making:
    """An iterator that counts, remembers its threads, and may fail."""

    def __init__(self, sizes: list[int], *, fails: bool = False) -> None:
        self.made = 0
        self.closed = False
        self.threads: set[int] = set()
        self._sizes = sizes
        self._fails = fails

    def begin(self) -> Iterator[bytes]:
        self.threads.add(threading.get_ident())
        return self._items()

    def _items(self) -> Iterator[bytes]:
        try:
            for size in self._sizes:
                self.threads.add(threading.get_ident())
                self.made += 1
                yield bytes(size)
            if self._fails:
                raise errors.Diverged("in place of an item")
        finally:
            self.threads.add(threading.get_ident())
            self.closed = True


def test_items_are_made_ahead_in_one_other_thread() -> None:
    """All items come, in order, made and closed in a single thread that is not the loop's."""
    making = Making([SMALL + number for number in range(20)])

    async def run() -> list[int]:
        return [len(item) async for item in made_ahead(making.begin)]

    assert asyncio.run(run()) == [SMALL + number for number in range(20)]
    assert making.closed
    assert len(making.threads) == 1
    assert threading.get_ident() not in making.threads


def test_no_more_is_made_ahead_than_the_bound() -> None:
    """A reader that stops after one item finds at most two hand-overs made, and the iterator closed."""
    making = Making([SMALL] * 100)

    async def run() -> None:
        items = made_ahead(making.begin)
        assert len(await anext(items)) == SMALL
        await items.aclose()

    asyncio.run(run())
    assert making.closed
    assert making.made <= 2 * 4, making.made


def test_beside_a_large_item_nothing_is_made() -> None:
    """The next item is not begun before a large one was taken."""
    making = Making([2 * AHEAD_BYTES] * 3)

    async def run() -> None:
        seen = 0
        async for item in made_ahead(making.begin):
            seen += 1
            assert making.made == seen
            assert len(item) == 2 * AHEAD_BYTES
        assert seen == 3

    asyncio.run(run())


@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_failure_comes_behind_what_was_made_before_it(before: int) -> None:
    """An error takes the place of its item; none before it is lost."""
    making = Making([SMALL] * before, fails=True)

    async def run() -> int:
        seen = 0
        with pytest.raises(errors.Diverged):
            async for _ in made_ahead(making.begin):
                seen += 1
        return seen

    assert asyncio.run(run()) == before
    assert making.closed


async def stream(sizes: list[int], *, error: Exception | None = None) -> AsyncGenerator[memoryview, None]:
    for number, size in enumerate(sizes):
        await asyncio.sleep(0)
        yield memoryview(bytes([number]) * size)
    if error is not None:
        raise error


def test_every_item_is_used_once_in_order_in_the_thread() -> None:
    """Use happens in the given thread, in the order of the stream, and is over when the call returns."""
    used: list[tuple[int, int]] = []
    threads: set[int] = set()

    def use(item: memoryview) -> None:
        used.append((item[0], len(item)))
        threads.add(threading.get_ident())

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            await use_all(stream([1 + number for number in range(50)]), use, thread)
            assert len(used) == 50

    asyncio.run(run())
    assert used == [(number, 1 + number) for number in range(50)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_what_arrived_before_a_cut_is_used() -> None:
    """K21: the items that came before a stream failed are used, then its error is raised."""
    used: list[int] = []

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            cut = stream([1] * 10, error=errors.Unreachable("cut"))
            with pytest.raises(errors.Unreachable):
                await use_all(cut, lambda item: used.append(item[0]), thread)

    asyncio.run(run())
    assert used == list(range(10))


def test_a_failed_use_ends_the_reading() -> None:
    """An item that cannot be used is the last one, and its error comes although the stream goes silent."""
    used: list[int] = []
    closed: list[bool] = []

    async def silent() -> AsyncGenerator[memoryview, None]:
        try:
            yield memoryview(b"\x00")
            yield memoryview(b"\x01")
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    def use(item: memoryview) -> None:
        used.append(item[0])
        raise errors.SnapshotDamaged("refused")

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            with pytest.raises(errors.SnapshotDamaged):
                await use_all(silent(), use, thread)
            assert closed == [True]

    asyncio.run(run())
    assert used == [0]


def test_a_reader_waits_for_a_slow_thread() -> None:
    """No more than the bound and one item are read and not used."""
    read = 0
    size = IN_HAND_BYTES // 4
    goes_on = threading.Event()
    full = asyncio.Event()
    most: list[int] = []
    used = 0

    async def counted() -> AsyncGenerator[memoryview, None]:
        nonlocal read
        for _ in range(40):
            read += 1
            if read == 5:
                full.set()
            yield memoryview(bytes(size))

    def use(item: memoryview) -> None:
        nonlocal used
        assert goes_on.wait(60)
        most.append(read - used)
        used += 1

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            using = asyncio.create_task(use_all(counted(), use, thread))
            await full.wait()
            for _ in range(100):
                await asyncio.sleep(0)
            stopped_at = read
            goes_on.set()
            await using
            assert stopped_at == 5

    asyncio.run(run())
    assert used == read == 40
    assert max(most) == 5, most


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_reader_leaves_nothing_behind(times: int) -> None:
    """Cancelled in the midst, also twice, the stream is closed, what was read is used, no task or thread goes on."""
    used: list[int] = []
    closed: list[bool] = []
    waits = asyncio.Event()

    async def silent() -> AsyncGenerator[memoryview, None]:
        try:
            yield memoryview(b"\x00")
            waits.set()
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            using = asyncio.create_task(use_all(silent(), lambda item: used.append(item[0]), thread))
            await waits.wait()
            for _ in range(times):
                using.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await using
            assert closed == [True]
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert used == [0]
