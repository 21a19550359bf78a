"""What happened, as lines and as one digest: two runs are the same exactly when their digests are."""

from __future__ import annotations

import collections
from collections.abc import Callable

import xxhash

from tests.simulator.schedule import Schedule


class Trace:
    """Keeps the last lines for the message of a failure; ``show`` gets each line, if given."""

    def __init__(self, schedule: Schedule, show: Callable[[str], object] | None = None, kept: int = 60) -> None:
        self._schedule = schedule
        self._show = show
        self._digest = xxhash.xxh3_128()
        self.last: collections.deque[str] = collections.deque(maxlen=kept)

    def note(self, text: str) -> None:
        """Something happened now."""
        line = f"{self._schedule.now_s:11.6f} {text}"
        self._digest.update(line.encode())
        self.last.append(line)
        if self._show is not None:
            self._show(line)

    @property
    def digest(self) -> str:
        """Digest of every line so far."""
        return self._digest.hexdigest()
