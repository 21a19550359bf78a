"""Counters and gauges of one process: plain numbers under stable names, rendered by others.

Names follow ``srengine_<subsystem>_<noun>_<unit>[_total]``; labels are a fixed set of key words for each name. A
counter only grows; a gauge is set. Adding is a dictionary operation on one thread or under the interpreter lock: cheap
enough for every request, not for every record (kernels count themselves).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final

_NAME: Final = re.compile(r"^srengine_[a-z0-9]+(_[a-z0-9]+)+$")

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """All counters and gauges of one process (or of one node, when several live in a process)."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Labels, float]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter; ``amount`` is not negative."""
        assert amount >= 0, (name, amount)
        key = tuple(sorted(labels.items()))
        with self._lock:
            series = self._series(name)
            series[key] = series.get(key, 0) + amount

    def counter(self, name: str, **labels: str) -> Callable[..., None]:
        """Return what adds to this counter, 1 unless said: `add` for a place that counts with every frame."""
        key = tuple(sorted(labels.items()))
        lock = self._lock
        with lock:
            series = self._series(name)

        def add(amount: float = 1) -> None:
            with lock:
                series[key] = series.get(key, 0) + amount

        return add

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._series(name)[tuple(sorted(labels.items()))] = value

    def value(self, name: str, **labels: str) -> float:
        """Return the current number, 0 when it was never touched."""
        with self._lock:
            return self._values.get(name, {}).get(tuple(sorted(labels.items())), 0)

    def snapshot(self) -> dict[str, dict[Labels, float]]:
        """Return a copy of everything, names in order."""
        with self._lock:
            return {name: dict(self._values[name]) for name in sorted(self._values)}

    def _series(self, name: str) -> dict[Labels, float]:
        series = self._values.get(name)
        if series is None:
            assert _NAME.match(name), name
            series = self._values[name] = {}
        return series
