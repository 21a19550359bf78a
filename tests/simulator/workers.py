"""Seeds in several processes. A file of its own: a new process imports what it runs by name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.simulator.breakages import ALL, NONE
from tests.simulator.story import Failure, Report, run


def one(task: tuple[int, str]) -> Report | Failure:
    """Run one seed in a worker."""
    seed, breakage = task
    try:
        return run(seed, breakage=ALL.get(breakage, NONE))
    except Failure as failure:
        return failure


def results(tasks: Iterable[tuple[int, str]], count: int, jobs: int) -> Iterator[Report | Failure]:
    """Yield what came of each task, in order."""
    if jobs == 1:
        yield from map(one, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(one, tasks, chunksize=min(16, max(1, count // (4 * jobs))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
