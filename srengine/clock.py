"""Clocks, and nothing that waits.

Three clocks, never mixed:

* `Clock.monotonic_s`: for durations inside one process (time-outs, back-off);
* `Clock.boottime_s`: like it, but goes on while the machine sleeps: everything that is promised to somebody else
  (contact, staleness, leases) is measured by it, because a paused process must not believe that no time passed;
* `Clock.wall_ms`: for people. No decision about who leads or what is current reads it; the hybrid clock of records is
  the tablet kernel's.

Machines get time as a value in ``tick(now)``; services take a `Clock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """Where a service reads time."""

    def monotonic_s(self) -> float:
        """Return seconds since some moment; never goes back, stands still while the machine sleeps."""
        ...

    def boottime_s(self) -> float:
        """Return seconds since boot, sleep included; never goes back."""
        ...

    def wall_ms(self) -> int:
        """Return milliseconds since the Unix epoch; may jump either way."""
        ...


_boottime_s: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """See `Clock.monotonic_s`."""
        return time.monotonic()

    def boottime_s(self) -> float:
        """See `Clock.boottime_s`."""
        return _boottime_s()

    def wall_ms(self) -> int:
        """See `Clock.wall_ms`."""
        return time.time_ns() // 1_000_000
