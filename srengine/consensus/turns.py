r"""What a driver has the log do: one thing at a time, and the loop waits for none of it.

::

    groups' effects --> add --.
                              +--> work --> NodeLog.begin ... done ... finish   a turn, as a rule: the kernel's thread
    trims, resets   --> job --'        \-> NodeLog.append, jobs                 the log thread: what reads or is much
                                                  |
                                  Host.persisted, Host.log_failed

A turn goes before a job, a job waits until its group is not busy. A full disk is tried again until there is space; what
was drained stays as it is, and goes first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from srengine import errors
from srengine.alarm import Alarm
from srengine.consensus.applying import RETRY_S
from srengine.consensus.effects import Effects
from srengine.consensus.hosting import Group
from srengine.consensus.log import NodeLog
from srengine.consensus.services import Bounds, Health
from srengine.consensus.worker import Done, Job, Worker
from srengine.metrics import Metrics

Batch = dict[str, Effects]
"""What each group has to persist in a turn."""
STOP_S: Final = 10.0
"""How long a stop waits for the disk."""


class Host(Protocol):
    """What this part needs of the driver."""

    stopped: bool

    def set_health(self, health: Health, error: errors.Error | None) -> None:
        """Say how the disk is."""
        ...

    def persisted(self, batch: Batch) -> None:
        """Go on with what came with a turn: it is durable."""
        ...

    def log_failed(self, error: BaseException) -> None:
        """Stop taking part in every group: nothing can be promised any more."""
        ...

    def wake(self, group: Group) -> None:
        """Give a group its turn of the loop."""
        ...


class LogTurns:
    """The log of a driver; made and used on its event loop."""

    def __init__(
        self, host: Host, log: NodeLog, bounds: Bounds, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._host = host
        self._log = log
        self._bounds = bounds
        self._metrics = metrics
        self._turns = metrics.counter("srengine_consensus_turns_total")
        self._seconds = metrics.counter("srengine_consensus_persist_seconds_total")
        self._loop = loop
        self._pending: Batch = {}
        """What the next turn persists."""
        self._jobs: deque[tuple[Group, Job, Done]] = deque()
        """Other work: trims, resets, healing."""
        self._works = False
        self._begun: Batch | None = None
        """What the log works on without the thread."""
        self._ended: asyncio.Future[None] | None = None
        """Who stops waits here for the end of what was begun."""
        self._persisting_since: float | None = None
        """Since when the turn is persisted that was given last, in the loop's time; None: none is."""
        self._alarm = Alarm(loop, self._look)
        self.worker = Worker("srengine-log", loop)
        loop.add_reader(log.done, self._finish)

    def add(self, group: Group, effects: Effects) -> None:
        """Persist what a group has drained, in the next turn; the group is busy until then."""
        group.busy = True
        self._pending[group.name] = effects

    def drop(self, group: Group) -> None:
        """Forget what a group wanted to persist, if that has not begun."""
        self._pending.pop(group.name, None)

    def job(self, group: Group, job: Job, done: Done) -> None:
        """Run a job of a group in the log thread as soon as nothing of the group is being written."""
        self._jobs.append((group, job, done))

    def work(self) -> None:
        """Begin the next piece, unless one is under way: everything that waits to be persisted, else a job."""
        if self._works or self._host.stopped:
            return
        if self._pending:
            batch, self._pending = self._pending, {}
            self._persist(batch)
            return
        for _ in range(len(self._jobs)):
            group, job, done = self._jobs.popleft()
            if group.busy:
                self._jobs.append((group, job, done))
            elif group.failed is None:
                self._works = group.locked = True
                self._run(group, job, done)
                return

    def _run(self, group: Group, job: Job, done: Done) -> None:
        def ended(error: BaseException | None) -> None:
            self._works = group.locked = False
            if error is not None and not isinstance(error, errors.DiskFull | errors.QuotaExceeded):
                self._host.log_failed(error)
                return
            done(error)
            self._host.wake(group)

        self.worker.submit(job, ended)

    def _persist(self, batch: Batch) -> None:
        if self._host.stopped:
            return
        self._works = True
        turn = {name: effects.persist for name, effects in batch.items() if effects.persist is not None}
        self._persisting_since = self._loop.time()
        self._alarm.at(self._persisting_since + self._bounds.persist_s_max)
        try:
            begun = self._log.begin(turn)
        except BaseException as error:  # noqa: BLE001  (judged there, as what the thread raises)
            self._loop.call_soon(self._persisted, batch, error)
            return
        if begun:
            self._begun = batch
        else:
            self.worker.submit(lambda: self._log.append(turn), lambda error: self._persisted(batch, error))

    def _finish(self) -> None:
        """Take the end of what the log has begun."""
        batch, self._begun = self._begun, None
        assert batch is not None, "nothing was begun"
        if self._ended is not None:
            self._ended.set_result(None)
        failure: BaseException | None = None
        try:
            self._log.finish()
        except BaseException as error:  # noqa: BLE001  (judged there, as what the thread raises)
            failure = error
        self._persisted(batch, failure)

    def _look(self, now: float) -> float:
        """Take note of a turn that takes too long; return when the present one does."""
        if self._persisting_since is None or self._host.stopped:
            return float("inf")
        deadline = self._persisting_since + self._bounds.persist_s_max
        if now < deadline:
            return deadline
        self._metrics.add("srengine_consensus_persist_overruns_total")
        self._host.set_health(Health.SLOW, None)
        return float("inf")

    def _persisted(self, batch: Batch, error: BaseException | None) -> None:
        assert self._persisting_since is not None, batch
        seconds = self._loop.time() - self._persisting_since
        self._persisting_since = None
        if isinstance(error, errors.DiskFull | errors.QuotaExceeded):
            self._host.set_health(Health.FULL, error)
            self._loop.call_later(RETRY_S, self._persist, batch)
            return
        self._works = False
        if error is not None:
            self._host.log_failed(error)
            return
        self._turns.value += 1
        self._seconds.value += seconds
        self._host.set_health(Health.OK, None)
        self._host.persisted(batch)

    async def stop(self) -> None:
        """Begin nothing more, and wait for what is under way; the host has stopped. `TimedOut` after `STOP_S`."""
        self._alarm.cancel()
        self.worker.stop()
        try:
            if self._begun is not None:
                self._ended = self._loop.create_future()
                async with asyncio.timeout(STOP_S):
                    await self._ended
        except TimeoutError:
            raise no_answer() from None
        finally:
            self._loop.remove_reader(self._log.done)
        await wait_for_end(self.worker, self._loop)


async def wait_for_end(worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
    """Wait for the end of a worker that was told to stop. `TimedOut` after `STOP_S`."""
    if not await loop.run_in_executor(None, worker.join, STOP_S):
        raise no_answer()


def no_answer() -> errors.TimedOut:
    """Return what a stop says that cannot wait any longer."""
    return errors.TimedOut(f"the disk has not answered in {STOP_S:.3g} s; what was being written may be lost")
