"""One timer for many deadlines of an event loop, most of which are forgotten before they are reached.

A timer of its own for each request costs more than to look at all requests now and then: it is made, put into the
loop's heap, cancelled, and taken out again. So there is one, at the earliest deadline that was ever named since it rang
last; when it rings, whoever it belongs to looks through what still waits::

    alarm.at(deadline) ──► look(now): ends what is over ──► the earliest of the others, infinite: none
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings at the earliest deadline it was told, or earlier for nothing. Used on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[float], float]) -> None:
        """``look(now)`` ends what is over and returns the earliest deadline that is left, in the loop's time."""
        self._loop = loop
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._set_for = 0.0

    def at(self, deadline: float) -> None:
        """Ring at ``deadline``, or before."""
        if self._timer is not None:
            if self._set_for <= deadline:
                return
            self._timer.cancel()
        self._set_for = deadline
        self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        left = self._look(self._loop.time())
        if left < float("inf"):
            self.at(left)

    def cancel(self) -> None:
        """Ring no more, unless it is told so again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
