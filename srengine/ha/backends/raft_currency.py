"""Whether a node has lately applied all that is committed: what it is asked for is at most so old.

A busy node is always an entry or two behind, so the question is not whether it has applied everything now, but whether
it has applied everything that was committed a short while ago. What is committed is looked at again and again; once it
is applied, the node was as new as the leader at the moment of that look.

A node that applies nothing at all although there is something stands still: its disk, or a mistake of ours. Such a
leader answers nobody, and nobody else may, so it has to give up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from srengine import limits
from srengine.clock import Clock

LOOK_S: Final = 0.25
_LOOKS: Final = int(limits.STALENESS_S_MAX / LOOK_S) + 1


class Currency:
    """``committed()`` and ``applied()``: indexes of this node now. ``excused()``: applying waits for something that
    ends, such as a digest of all that there is.
    """

    def __init__(
        self, committed: Callable[[], int], applied: Callable[[], int], excused: Callable[[], bool], clock: Clock
    ) -> None:
        self._committed = committed
        self._applied = applied
        self._excused = excused
        self._clock = clock
        self._looks: deque[tuple[float, int]] = deque(maxlen=_LOOKS)
        """When, and what was committed then; none is older than matters."""
        self._applied_last = -1
        self._still = 0
        """Looks in a row that found nothing applied since the one before, and something to be."""

    async def run(self, on_still: Callable[[], None]) -> None:
        """Look until cancelled; ``on_still`` is called at every look that finds that this node stands still."""
        while True:
            self.look()
            if self.still:
                on_still()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Take note of what is committed and applied now."""
        committed, applied = self._committed(), self._applied()
        self._looks.append((self._clock.boottime_s(), committed))
        still = self._applied_last == applied < committed and not self._excused()
        self._still = self._still + 1 if still else 0
        self._applied_last = applied

    @property
    def still(self) -> bool:
        """Whether nothing was applied for longer than a node may be behind, although something is committed.

        Counted in looks: a process that was stopped has not stood still.
        """
        return self._still >= _LOOKS

    def within(self, seconds: float) -> bool:
        """Return whether all that was committed ``seconds`` ago, or at a later look, is applied."""
        applied = self._applied()
        if applied >= self._committed():
            return True
        oldest = self._clock.boottime_s() - seconds
        return any(at >= oldest and applied >= committed for at, committed in self._looks)
