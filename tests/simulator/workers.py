"""Seeds in several processes. A file of its own: a new process imports what it runs by name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.simulator.breakages import BREAKAGES, NONE
from tests.simulator.regime import regime_of
from tests.simulator.story import Failure, Report, run

Task = tuple[int, str, str]
"""Seed, breakage, and the breakage in whose regime it runs; a name that is none stands for the usual."""


def one(task: Task, show: Callable[[str], object] | None = None) -> Report | Failure:
    """Run one seed and return what came of it."""
    seed, breakage, narrowed = task
    regime = BREAKAGES.get(narrowed, NONE).narrowed(regime_of(seed))
    try:
        return run(seed, breakage=BREAKAGES.get(breakage, NONE), regime=regime, show=show)
    except Failure as failure:
        return failure


def results(tasks: Iterable[Task], count: int, jobs: int) -> Iterator[Report | Failure]:
    """Yield what came of each task, in order."""
    if jobs == 1:
        yield from map(one, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(one, tasks, chunksize=min(16, max(1, count // (4 * jobs))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
