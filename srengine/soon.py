"""Calls that wait for the end of what is being read, on one event loop.

A callback that has to see everything that arrives together is put off with ``call_soon``: that costs a turn of the
loop and a look at the selector, on every hop of every message. Whoever reads a socket knows better when everything was
read: at its end. What was put off while it read is called there::

    soon = Soon.of(loop)
    with soon:                    # the reader
        ... soon.call(turn) ...   # whoever hears of it
                                  # turn() runs here

Outside of it `Soon.call` is ``call_soon``.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self


class Soon:
    """One for each event loop; used there. A context manager while something is read; it may be nested."""

    _of: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Soon]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = weakref.WeakMethod(loop.call_soon)
        self._depth = 0
        self._calls: list[Callable[[], None]] = []

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Soon:
        """Return the one of an event loop."""
        found = cls._of.get(loop)
        if found is None:
            found = cls._of[loop] = cls(loop)
        return found

    def call(self, callback: Callable[[], None]) -> None:
        """Call at the end of what is being read; in the next turn of the loop if nothing is."""
        if self._depth:
            self._calls.append(callback)
        else:
            self._later(callback)

    def _later(self, callback: Callable[[], None]) -> None:
        call_soon = self._call_soon()
        assert call_soon is not None, "a call on a loop that is gone"
        call_soon(callback)

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth or not self._calls:
            return
        calls, self._calls = self._calls, []
        for position, callback in enumerate(calls):
            try:
                callback()
            except BaseException:
                # The loop says what went wrong; the others are not to suffer for it.
                for other in calls[position + 1 :]:
                    self._later(other)
                raise
