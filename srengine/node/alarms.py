"""What a person must see: to the log, the status and a counter; the same thing once a minute."""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

from srengine.clock import Clock
from srengine.metrics import Metrics

_logger = logging.getLogger(__name__)

ALARMS_KEPT: Final = 50
ALARM_AGAIN_S: Final = 60.0


class Alarms:
    """The latest alarms of this node."""

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self.kept: deque[str] = deque(maxlen=ALARMS_KEPT)
        self._clock = clock
        self._metrics = metrics
        self._said: dict[str, float] = {}

    def __call__(self, event: str, message: str) -> None:
        """Raise an alarm."""
        self._metrics.add("srengine_node_alarms_total", event=event)
        now = self._clock.monotonic_s()
        text = f"{event}: {message}"
        if now - self._said.get(text, -ALARM_AGAIN_S) < ALARM_AGAIN_S:
            return
        if len(self._said) >= ALARMS_KEPT:
            self._said.clear()
        self._said[text] = now
        _logger.error("%s: %s", event, message, extra={"event": event})
        if text not in self.kept:
            self.kept.append(text)
