"""A stream between the loop and a thread beside it, with few hand-overs.

    source     thread: make, make, make ----- some items at a time ----> loop: send, send, send
    receiver   loop: read, read, read ------- through a queue ---------> thread: use, use, use

A hand-over for each item costs more than it seems: an item is a megabyte of other work, and the code of both sides has
left the processor's caches when its turn comes. So a source makes items ahead while those before them are sent, and a
receiver's thread goes on without the loop while anything is there.

Both are bounded by bytes; an item that is larger passes alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from typing import Final, Generic, TypeVar

from srengine import limits

AHEAD_BYTES: Final = 2 * limits.MIB
"""A source hands over when it has made so much; as much is being made meanwhile."""
IN_HAND_BYTES: Final = 4 * limits.MIB
"""What a receiver has read and not used."""

T = TypeVar("T", bytes, memoryview)


async def made_ahead(make: Callable[[], Iterator[bytes]]) -> AsyncGenerator[bytes, None]:
    """Yield the items of the iterator that ``make`` returns.

    Both run in one thread that lives as long as this generator, because a view belongs to its thread. An iterator with
    a ``close`` method is closed there, too.
    """
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="srengine-copy") as thread:
        source = _Source(await asyncio.wrap_future(thread.submit(make)))
        try:
            # NB: not a future of the loop, which would miss somebody for the answer when this generator is closed.
            making = thread.submit(source.take)
            while items := await asyncio.wrap_future(making):
                alone = max(map(len, items)) > AHEAD_BYTES
                if not alone:
                    making = thread.submit(source.take)
                items.reverse()
                while items:
                    yield items.pop()
                if alone:
                    making = thread.submit(source.take)
        finally:
            await asyncio.wrap_future(thread.submit(source.close))


class _Source:
    """An iterator in its thread."""

    def __init__(self, iterator: Iterator[bytes]) -> None:
        self._iterator = iterator
        self._error: BaseException | None = None
        """What came in place of an item, when others came before it."""

    def take(self) -> list[bytes]:
        """Return the next items; none when there are no more."""
        if self._error is not None:
            raise self._error
        items: list[bytes] = []
        size = 0
        try:
            for item in self._iterator:
                items.append(item)
                size += len(item)
                del item
                if size >= AHEAD_BYTES:
                    break
        except BaseException as error:
            if not items:
                raise
            self._error = error
        return items

    def close(self) -> None:
        """Close the iterator."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


async def use_all(
    items: AsyncIterable[T], use: Callable[[T], object], thread: concurrent.futures.ThreadPoolExecutor
) -> None:
    """Call ``use`` with each item, in order, in ``thread``; return when the last was used.

    What was read is used, also when the stream fails then or the caller is cancelled. Raises what ``use`` raises, at
    once, else what ``items`` raises.
    """
    hand = _Hand[T]()
    reading = asyncio.create_task(hand.read(items))
    using = asyncio.wrap_future(thread.submit(hand.work, use))
    try:
        await asyncio.wait((reading, using), return_when=asyncio.FIRST_COMPLETED)
    finally:
        reading.cancel()
        try:
            read = (await asyncio.gather(reading, return_exceptions=True))[0]
        finally:
            # NB: whatever happens to this task: without it the thread would wait for ever.
            hand.items.put(None)
        await using
    if isinstance(read, BaseException):
        raise read


class _Hand(Generic[T]):
    """Items between the loop, which reads them, and the thread, which uses them."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        """None: nothing follows."""
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards what follows."""
        self._bytes = 0
        """Of what was read and not used."""
        self._room: asyncio.Future[None] | None = None
        """The reader waits for it; done when half is used."""

    async def read(self, items: AsyncIterable[T]) -> None:
        """Put each item into the queue."""
        async for item in items:
            room: asyncio.Future[None] | None = None
            with self._lock:
                self._bytes += len(item)
                if self._bytes > IN_HAND_BYTES:
                    room = self._room = self._loop.create_future()
            self.items.put(item)
            del item
            if room is not None:
                await room

    def work(self, use: Callable[[T], object]) -> None:
        """Use what is in the queue up to its end; in the thread."""
        while (item := self.items.get()) is not None:
            use(item)
            room: asyncio.Future[None] | None = None
            with self._lock:
                self._bytes -= len(item)
                if self._bytes <= IN_HAND_BYTES // 2:
                    room, self._room = self._room, None
            del item
            if room is not None:
                self._loop.call_soon_threadsafe(_open, room)


def _open(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
