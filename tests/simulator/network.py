"""The network: loses, repeats, reorders and delays; cut one way, partly or wholly; every pair of hosts on its own.

A frame carries what one turn of a node says to one other. It arrives at whatever runs at the target then: an older
incarnation's frames reach the next one, as from a queue that outlived a connection.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.simulator.schedule import Schedule

SAID_MAX = 512


@dataclass(slots=True)
class Weather:
    """How bad it is now. Probabilities of a frame; delays in seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0
    """That it comes only after up to ``late_s``."""
    delay_s_min: float = 0.000_2
    delay_s_max: float = 0.002
    late_s: float = 60.0
    in_order: bool = True
    """Frames of a pair do not overtake each other (late ones do)."""


@dataclass
class Network:
    """``cut``: pairs (source, target) of host names through which nothing goes."""

    schedule: Schedule
    source: random.Random
    weather: Weather
    cut: set[tuple[str, str]] = field(default_factory=set)
    kept: list[tuple[str, Any, Callable[[str, Any], None]]] = field(default_factory=list)
    """Some frames of the past, for replay."""
    kept_max: int = 32
    said: dict[tuple[str, str], deque[tuple[Any, Callable[[str, Any], None]]]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=SAID_MAX))
    )
    """The last frames of each pair of nodes, for an echo."""
    _newest: dict[tuple[str, str], float] = field(default_factory=dict)

    def send(self, source: str, target: str, frame: Any, deliver: Callable[[str, Any], None]) -> None:
        """Send ``frame``; ``deliver(target, frame)`` is called as often as it arrives."""
        if (source, target) in self.cut:
            return
        weather, chance = self.weather, self.source
        if weather.loss and chance.random() < weather.loss:
            return
        copies = 2 if weather.duplicate and chance.random() < weather.duplicate else 1
        for _ in range(copies):
            delay_s = weather.delay_s_min + (weather.delay_s_max - weather.delay_s_min) * chance.random()
            arrives_s = self.schedule.now_s + delay_s
            if weather.late and chance.random() < weather.late:
                # It is in some queue already: a cut does not stop it any more.
                arrives_s += weather.late_s * chance.random() ** 3
                self.schedule.at(arrives_s, lambda: deliver(target, frame))
                continue
            if weather.in_order:
                # One ten-millionth more keeps the order of the heap out of it.
                arrives_s = max(arrives_s, self._newest.get((source, target), 0.0) + 1e-7)
                self._newest[source, target] = arrives_s
            self.schedule.at(arrives_s, lambda: self._arrive(source, target, frame, deliver))
        if type(frame) is not tuple:
            return  # only what nodes say to each other is kept
        self.said[source, target].append((frame, deliver))
        if len(self.kept) < self.kept_max:
            self.kept.append((target, frame, deliver))
        else:
            self.kept[chance.randrange(self.kept_max * 8) % len(self.kept)] = (target, frame, deliver)

    def _arrive(self, source: str, target: str, frame: Any, deliver: Callable[[str, Any], None]) -> None:
        if (source, target) not in self.cut:
            deliver(target, frame)

    def connected(self, one: str, other: str) -> bool:
        """Whether both can hear each other."""
        return (one, other) not in self.cut and (other, one) not in self.cut

    def heal(self, weather: Weather) -> None:
        """Remove every cut; frames under way still arrive when they do."""
        self.cut.clear()
        self.weather = weather
        # What is late already does not hold up what follows it.
        self._newest.clear()
