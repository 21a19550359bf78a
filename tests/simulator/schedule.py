"""Virtual time: one heap of what happens next. Nothing else in the simulator knows what time it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Timer:
    """Something that will happen, unless cancelled."""

    __slots__ = ("action", "time_s")

    def __init__(self, time_s: float, action: Action) -> None:
        self.time_s = time_s
        self.action: Action | None = action

    def cancel(self) -> None:
        """It will not happen. Idempotent."""
        self.action = None


class Schedule:
    """Runs actions in order of their time; those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.steps = 0
        self._asked = 0
        self._heap: list[tuple[float, int, Timer]] = []

    def at(self, time_s: float, action: Action) -> Timer:
        """Do ``action`` at ``time_s``, at once if that is past."""
        timer = Timer(max(time_s, self.now_s), action)
        self._asked += 1
        heapq.heappush(self._heap, (timer.time_s, self._asked, timer))
        return timer

    def after(self, delay_s: float, action: Action) -> Timer:
        """Do ``action`` after ``delay_s``."""
        return self.at(self.now_s + delay_s, action)

    def moment(self) -> int:
        """Return a number that grows with each call: the order of events that share a time."""
        self._asked += 1
        return self._asked

    def run_until(self, time_s: float, stop: Callable[[], bool] | None = None) -> None:
        """Run what happens until ``time_s``, or until ``stop`` says so after an action."""
        heap = self._heap
        while heap and heap[0][0] <= time_s:
            self.now_s, _, timer = heapq.heappop(heap)
            action = timer.action
            if action is None:
                continue
            timer.action = None
            self.steps += 1
            action()
            if stop is not None and stop():
                return
        self.now_s = max(self.now_s, time_s)
