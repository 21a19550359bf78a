"""A node's CLOCK_BOOTTIME: starts anywhere, drifts, jumps ahead when the machine was suspended, never goes back."""

from __future__ import annotations

from tests.simulator.schedule import Schedule


class Clock:
    """``rate``: seconds of this clock in a true second."""

    def __init__(self, schedule: Schedule, start_s: float, rate: float) -> None:
        self._schedule = schedule
        self._local_s = start_s
        self._since_s = schedule.now_s
        self.rate = rate

    def now_s(self) -> float:
        """Return what the clock shows."""
        return self._local_s + (self._schedule.now_s - self._since_s) * self.rate

    def when_s(self, local_s: float) -> float:
        """Return the true time at which it will show ``local_s``, if nothing changes."""
        return self._since_s + (local_s - self._local_s) / self.rate

    def change(self, *, rate: float | None = None, ahead_s: float = 0.0) -> None:
        """Run at another rate from now on, or jump ahead."""
        assert ahead_s >= 0, ahead_s
        self._local_s, self._since_s = self.now_s() + ahead_s, self._schedule.now_s
        if rate is not None:
            assert rate > 0, rate
            self.rate = rate
