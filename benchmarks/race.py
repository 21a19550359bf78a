"""Interleaved timing: reference, ours, reference, ours; the median of the ratios of the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Work = Callable[[int], object]
"""One round's work; the argument is the number of the round, from 0."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round, ours and of each reference."""

    ours: list[float]
    references: dict[str, list[float]]

    @property
    def ours_s(self) -> float:
        """Return our median."""
        return statistics.median(self.ours)

    def reference_s(self, name: str) -> float:
        """Return the median of one reference."""
        return statistics.median(self.references[name])

    def ratio(self, name: str) -> float:
        """Return the median over the rounds of "reference's time / our time": our throughput, reference = 1."""
        return statistics.median(r / o for r, o in zip(self.references[name], self.ours, strict=True))


def race(
    benchmark: Any,
    ours: Work,
    references: Mapping[str, Work],
    *,
    rounds: int,
    before: Callable[[int], object] | None = None,
) -> Times:
    """Run ``rounds`` rounds, in each the references first, then ours, which pytest-benchmark times.

    ``before`` is called, untimed, at the beginning of each round (to wait for quiet or to make a fresh directory).
    """
    taken: dict[str, list[float]] = {name: [] for name in references}
    turn = 0

    def setup() -> tuple[tuple[int], dict[str, object]]:
        nonlocal turn
        number, turn = turn, turn + 1
        if before is not None:
            before(number)
        for name, work in references.items():
            start = time.perf_counter()
            work(number)
            taken[name].append(time.perf_counter() - start)
        return (number,), {}

    benchmark.pedantic(ours, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
    mine = list(benchmark.stats.stats.data)
    assert len(mine) == rounds == turn, (len(mine), rounds, turn)
    return Times(mine, taken)
