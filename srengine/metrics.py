"""Counters and gauges of one process: plain numbers under stable names, rendered by others.

Names follow ``srengine_<subsystem>_<noun>_<unit>[_total]``; labels are a fixed set of key words for each name. A
counter only grows; a gauge is set. Adding is a dictionary operation on one thread or under the interpreter lock: cheap
enough for every request, not for every record (kernels count themselves).
"""

from __future__ import annotations

import re
import threading
from typing import Final

_NAME: Final = re.compile(r"^srengine_[a-z0-9]+(_[a-z0-9]+)+$")

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that one thread adds to, without a call; see `Metrics.counter`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Metrics:
    """All counters and gauges of one process (or of one node, when several live in a process)."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Labels, float]] = {}
        self._counters: dict[str, dict[Labels, Counter]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter; ``amount`` is not negative."""
        assert amount >= 0, (name, amount)
        key = tuple(sorted(labels.items()))
        with self._lock:
            series = self._series(name)
            series[key] = series.get(key, 0) + amount

    def counter(self, name: str, **labels: str) -> Counter:
        """Return what counts for ``name`` beside `add`: for a place that counts with every frame, on one thread."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._series(name)
            return self._counters.setdefault(name, {}).setdefault(key, Counter())

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._series(name)[tuple(sorted(labels.items()))] = value

    def value(self, name: str, **labels: str) -> float:
        """Return the current number, 0 when it was never touched."""
        with self._lock:
            return self._counted(name).get(tuple(sorted(labels.items())), 0)

    def snapshot(self) -> dict[str, dict[Labels, float]]:
        """Return a copy of everything, names in order."""
        with self._lock:
            return {name: self._counted(name) for name in sorted(self._values)}

    def _counted(self, name: str) -> dict[Labels, float]:
        """Return a copy of a series, with what its counters have counted."""
        series = dict(self._values.get(name, {}))
        for key, counter in self._counters.get(name, {}).items():
            series[key] = series.get(key, 0) + counter.value
        return series

    def _series(self, name: str) -> dict[Labels, float]:
        series = self._values.get(name)
        if series is None:
            assert _NAME.match(name), name
            series = self._values[name] = {}
        return series
