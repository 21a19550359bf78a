"""Fencing: insert the next epoch, try again when it is not known whether that worked, give up when somebody else did.

::

    try ──► SUCCESS ──► True
     │ ├──► KEYEXIST ─► False, at once: the epoch is another node's
     │ └──► ERROR ────► pause ──► try again, `FencingOptions.tries` tries in all, then False

The flow is the same for every backend; what one try is, is the backend's (`TryFence`). A try whose answer was lost may
have succeeded: a backend looks for its own newest record first, so that the next try finds SUCCESS and not KEYEXIST.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from srengine import errors
from srengine.ha.protocol import Fencing
from srengine.metrics import Metrics

_logger = logging.getLogger(__name__)

TryFence = Callable[[], Awaitable[Fencing]]
"""One try; an `errors.Error` counts as ERROR."""
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class FencingOptions:
    """How often and how fast. ``delay_s``: before the second try; ``exponential``: doubled before each further one, up
    to ``delay_s_max``.
    """

    tries: int = 3
    delay_s: float = 2.0
    exponential: bool = False
    delay_s_max: float = 60.0

    def __post_init__(self) -> None:
        if self.tries < 1 or not 0 <= self.delay_s <= self.delay_s_max:
            raise errors.InvalidValue(f"fencing cannot be tried like this: {self}")

    def delay_before(self, attempt: int) -> float:
        """Return the pause in seconds before the attempt of this number, which is 2 at least.

        >>> [FencingOptions(exponential=True).delay_before(attempt) for attempt in (2, 3, 4)]
        [2.0, 4.0, 8.0]
        """
        assert attempt >= 2, attempt
        if not self.exponential:
            return self.delay_s
        return float(min(self.delay_s * 2 ** min(attempt - 2, 32), self.delay_s_max))


async def fence(
    try_fence: TryFence, options: FencingOptions, *, metrics: Metrics, sleep: Sleep = asyncio.sleep
) -> bool:
    """Run the flow and return whether this node owns an epoch now. One structured line for each try (B24)."""
    for attempt in range(1, options.tries + 1):
        delay_s = 0.0 if attempt == 1 else options.delay_before(attempt)
        if delay_s:
            await sleep(delay_s)
        reason = ""
        try:
            status = await try_fence()
        except errors.Error as error:
            status, reason = Fencing.ERROR, f"{error.code}: {error.message}"
        metrics.add("srengine_ha_fencing_total", status=status.value)
        _logger.log(
            logging.INFO if status is Fencing.SUCCESS else logging.WARNING,
            "fencing, try %d of %d: %s",
            attempt,
            options.tries,
            f"{status.value} {reason}".strip(),
            extra={
                "event": "fencing",
                "status": status.value,
                "attempt": attempt,
                "delay_s": delay_s,
                "reason": reason,
            },
        )
        if status is not Fencing.ERROR:
            return status is Fencing.SUCCESS
    return False
