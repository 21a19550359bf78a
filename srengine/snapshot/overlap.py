"""Stages at once with bounded memory: read | work | use, in order.

    reader thread        worker thread          the caller
    next(read) ------->  work(item) --------->  for result in overlapped(...)
         ^                                            |
         +---- budget: bytes between read and used ---+

The native calls of every stage release the GIL, so on two processors the slowest stage decides; work that is cheap is
done by the caller's thread (``worker=False``), because a hand-over costs some 20 microseconds. The budget counts an
item from the moment it is read until the caller asks for the next one. An item larger than the budget passes alone, and
nothing is read until it is gone. So memory is bounded by the budget, or one such item and what its work makes of it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from srengine import limits

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

T = TypeVar("T")
U = TypeVar("U")

BUDGET_BYTES: Final = 8 * limits.MIB


class _Budget:
    """Bytes between read and used; ``lock`` guards every field."""

    def __init__(self, bytes_max: int) -> None:
        self.lock = threading.Lock()
        self.bytes_max = bytes_max
        self.used_bytes = 0
        self.stopped = False
        """The caller went away."""
        self.waiting = False
        """The reader sleeps on ``wake``."""
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def reserve(self, size: int) -> bool:
        """Wait until ``size`` bytes fit, or nothing else is in flight; return False when the caller went away."""
        while True:
            with self.lock:
                if self.stopped:
                    return False
                if not self.used_bytes or self.used_bytes + size <= self.bytes_max:
                    self.used_bytes += size
                    return True
                self.waiting = True
            self.wake.get()

    def wait_until_empty(self) -> bool:
        """Wait until nothing is in flight; return False when the caller went away."""
        if not self.reserve(self.bytes_max):
            return False
        self.release(self.bytes_max)
        return True

    def release(self, size: int) -> None:
        """Give bytes back. A waiting reader wakes when half is free: one wake-up for several items."""
        with self.lock:
            self.used_bytes -= size
            if not self.waiting or self.used_bytes > self.bytes_max // 2:
                return
            self.waiting = False
        self.wake.put(None)

    def stop(self) -> None:
        """Let the reader go."""
        with self.lock:
            self.stopped = True
        self.wake.put(None)


class _End:
    """The last entry of a queue: nothing follows, or the error that came in place of the next item."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


_Entry: TypeAlias = "tuple[T, int] | _End"


def overlapped(
    read: Iterator[T],
    work: Callable[[T], U],
    *,
    bytes_of: Callable[[T], int],
    worker: bool = True,
    budget_bytes: int = BUDGET_BYTES,
) -> Generator[U, None, None]:
    """Yield ``work(item)`` for each item of ``read``, in order, both running ahead in threads of their own.

    An error of either stage is raised where its item would have come. Closing the generator stops and joins the
    threads; a ``read`` with a ``close`` method is closed in the thread that ran it.
    """
    budget = _Budget(budget_bytes)
    items: queue.SimpleQueue[_Entry[T]] = queue.SimpleQueue()
    results: queue.SimpleQueue[_Entry[U]] = queue.SimpleQueue()
    threads = [threading.Thread(target=_read, args=(budget, read, bytes_of, items), name="srengine-snapshot-read")]
    if worker:
        threads.append(threading.Thread(target=_work, args=(items, work, results), name="srengine-snapshot-work"))
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        while True:
            # NB: nothing here may hold a result while the caller uses it: it may be as large as the largest value.
            if worker:
                result = results.get()
                if isinstance(result, _End):
                    end = result
                    break
                held, size = [result[0]], result[1]
                del result
            else:
                item = items.get()
                if isinstance(item, _End):
                    end = item
                    break
                held, size = [work(item[0])], item[1]
                del item
            yield held.pop()
            budget.release(size)
        if end.error is not None:
            raise end.error
    finally:
        budget.stop()
        items.put(_End())
        for thread in threads:
            thread.join()


def _read(
    budget: _Budget, read: Iterator[T], bytes_of: Callable[[T], int], items: queue.SimpleQueue[_Entry[T]]
) -> None:
    try:
        with contextlib.ExitStack() as stack:
            close = getattr(read, "close", None)
            if close is not None:
                stack.callback(close)
            for item in read:
                size = bytes_of(item)
                if not budget.reserve(size):
                    return
                items.put((item, size))
                del item
                if size > budget.bytes_max and not budget.wait_until_empty():
                    return
        items.put(_End())
    except BaseException as error:  # noqa: BLE001  (carried to the caller's thread and raised there)
        items.put(_End(error))


def _work(items: queue.SimpleQueue[_Entry[T]], work: Callable[[T], U], results: queue.SimpleQueue[_Entry[U]]) -> None:
    while True:
        taken = items.get()
        if isinstance(taken, _End):
            results.put(taken)
            return
        try:
            result = work(taken[0])
        except BaseException as error:  # noqa: BLE001  (carried to the caller's thread and raised there)
            results.put(_End(error))
            return
        size = taken[1]
        del taken
        results.put((result, size))
        del result
