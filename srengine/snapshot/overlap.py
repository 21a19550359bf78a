"""Three stages at once with bounded memory: read | work | use, in order.

    reader thread        worker thread          the caller
    next(read) ------->  work(item) --------->  for result in overlapped(...)
         ^                                            |
         +---- budget: bytes between read and used ---+

The native calls of every stage release the GIL, so on two processors the slowest stage decides. The budget counts an item
from the moment it is read until the caller asks for the next one; a single item larger than the budget passes alone. So
memory is bounded by the budget + the largest item in use + the next one that was read and waits.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from srengine import limits

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

T = TypeVar("T")
U = TypeVar("U")

BUDGET_BYTES: Final = 8 * limits.MIB
_END: Final = object()


class _Pipe(Generic[T, U]):
    """What the stages share; ``changed`` guards every field."""

    def __init__(self, budget_bytes: int) -> None:
        self.changed = threading.Condition()
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.stopped = False
        """The caller went away: both threads end."""
        self.read: collections.deque[tuple[object, int]] = collections.deque()
        self.ready: collections.deque[tuple[object, int, BaseException | None]] = collections.deque()

    def reserve(self, size: int) -> bool:
        """Wait until ``size`` bytes fit; return False when the caller went away."""
        with self.changed:
            while not self.stopped and self.used_bytes and self.used_bytes + size > self.budget_bytes:
                self.changed.wait()
            self.used_bytes += size
            return not self.stopped

    def release(self, size: int) -> None:
        """Give bytes back."""
        with self.changed:
            self.used_bytes -= size
            self.changed.notify_all()

    def stop(self) -> None:
        """End both threads at their next step."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def put_read(self, item: object, size: int) -> None:
        """Hand an item to the worker."""
        with self.changed:
            self.read.append((item, size))
            self.changed.notify_all()

    def put_ready(self, item: object, size: int, error: BaseException | None = None) -> None:
        """Hand a result, the end or an error to the caller."""
        with self.changed:
            self.ready.append((item, size, error))
            self.changed.notify_all()

    def take_read(self) -> tuple[object, int] | None:
        """Wait for an item; None when the caller went away."""
        with self.changed:
            while not self.read and not self.stopped:
                self.changed.wait()
            return None if self.stopped else self.read.popleft()

    def take_ready(self) -> tuple[object, int, BaseException | None]:
        """Wait for a result."""
        with self.changed:
            while not self.ready:
                self.changed.wait()
            return self.ready.popleft()


class _Failed:
    """An error on its way from the reader through the worker, so that it arrives in its place."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def overlapped(
    read: Iterator[T],
    work: Callable[[T], U],
    *,
    bytes_of: Callable[[T], int],
    budget_bytes: int = BUDGET_BYTES,
) -> Generator[U, None, None]:
    """Yield ``work(item)`` for each item of ``read``, in order, both running ahead in threads of their own.

    An error of either stage is raised where its item would have come. Closing the generator stops and joins the threads;
    a ``read`` with a ``close`` method is closed in the thread that ran it.
    """
    pipe: _Pipe[T, U] = _Pipe(budget_bytes)
    threads = (
        threading.Thread(target=_read, args=(pipe, read, bytes_of), name="srengine-snapshot-read", daemon=True),
        threading.Thread(target=_work, args=(pipe, work), name="srengine-snapshot-work", daemon=True),
    )
    for thread in threads:
        thread.start()
    try:
        while True:
            result, size, error = pipe.take_ready()
            if error is not None:
                raise error
            if result is _END:
                return
            # NB: nothing here may hold the result while the caller uses it: it may be as large as the largest value.
            box = [result]
            del result
            yield box.pop()  # type: ignore[misc]  # the queue holds results of `work` and the two marks above
            pipe.release(size)
    finally:
        pipe.stop()
        for thread in threads:
            thread.join()


def _read(pipe: _Pipe[T, U], read: Iterator[T], bytes_of: Callable[[T], int]) -> None:
    try:
        with contextlib.ExitStack() as stack:
            close = getattr(read, "close", None)
            if close is not None:
                stack.callback(close)
            for item in read:
                size = bytes_of(item)
                if not pipe.reserve(size):
                    return
                pipe.put_read(item, size)
                del item
        pipe.put_read(_END, 0)
    except BaseException as error:  # noqa: BLE001  (carried to the caller's thread and raised there)
        pipe.put_read(_Failed(error), 0)


def _work(pipe: _Pipe[T, U], work: Callable[[T], U]) -> None:
    while (taken := pipe.take_read()) is not None:
        item, size = taken
        del taken
        if item is _END:
            pipe.put_ready(_END, 0)
            return
        if isinstance(item, _Failed):
            pipe.put_ready(None, 0, item.error)
            return
        try:
            result = work(item)  # type: ignore[arg-type]  # the marks were taken out above
        except BaseException as error:  # noqa: BLE001  (carried to the caller's thread and raised there)
            pipe.put_ready(None, 0, error)
            return
        del item
        pipe.put_ready(result, size)
        del result
