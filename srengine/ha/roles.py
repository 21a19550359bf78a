"""The role of this node, driven: events of the election go into `role_machine.RoleMachine`, its steps are carried out.

One task follows `HAProtocol.observe`; each step of a transition runs in a task of its own, so that one that hangs can
be given up. Every transition is one line of the log (event ``transition``: from, to, term, reason, ms) and is counted.

Metrics, all of this node's view:

===============================================  ======================================================================
``srengine_ha_leader_changes_total``             another (leader, term) was seen
``srengine_ha_transitions_total`` {source,       transitions that ended
target}
``srengine_ha_transition_seconds_total``         their time; ``srengine_ha_transition_seconds`` is the last one's
``srengine_ha_elections_total``                  times that a leader was known again after none was
``srengine_ha_election_seconds_total``           how long none was; ``srengine_ha_election_seconds`` is the last time
``srengine_ha_available_seconds_total``          time with a known leader
``srengine_ha_observed_seconds_total``           time since the start
``srengine_ha_availability_percent``             their ratio
``srengine_ha_promotions_failed_total``          promotions that were given up
===============================================  ======================================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from srengine import errors
from srengine.clock import Clock
from srengine.ha.protocol import HAProtocol, Observed, Role
from srengine.ha.role_machine import (
    Ended,
    Execution,
    RoleMachine,
    RoleOptions,
    Run,
    Step,
    Transition,
)
from srengine.metrics import Metrics

_logger = logging.getLogger(__name__)

METRICS_EVERY_S = 1.0


class Leadership(Protocol):
    """What only a leader has, on this node: its admission and its memory. Each call must bear to be repeated."""

    async def open(self, epoch: int) -> None:
        """Accept what only a leader may do, under this epoch."""
        ...

    async def close(self) -> None:
        """Accept nothing more of it."""
        ...

    async def drain(self) -> None:
        """Return when what was accepted has ended."""
        ...

    async def drop(self) -> None:
        """Forget what a leader knows."""
        ...


@dataclass(frozen=True, slots=True)
class Changing:
    """What a registered execution is told: the roles before and behind, and the epoch when it is that of a leader."""

    source: Role
    target: Role
    term: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Registered:
    """An execution and what to call; an exception is its failure."""

    execution: Execution
    call: Callable[[Changing], Awaitable[None]]


class RoleService:
    """Drives the machine. ``on_exit`` gets the error with which the process should end; nothing is run behind it."""

    def __init__(
        self,
        protocol: HAProtocol,
        leadership: Leadership,
        *,
        clock: Clock,
        metrics: Metrics,
        on_exit: Callable[[errors.Error], None],
        options: RoleOptions | None = None,
        executions: Sequence[Registered] = (),
    ) -> None:
        names = [registered.execution.name for registered in executions]
        assert len(set(names)) == len(names), names
        self._protocol = protocol
        self._leadership = leadership
        self._clock = clock
        self._metrics = metrics
        self._on_exit = on_exit
        self._executions = {registered.execution.name: registered for registered in executions}
        self.machine = RoleMachine(
            options if options is not None else RoleOptions(),
            [registered.execution for registered in executions],
            now=clock.boottime_s(),
        )
        self.changed = asyncio.Event()
        """Set after every transition; whoever waits for a role clears it first."""
        self._watch = _Watch(metrics, clock.boottime_s())
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def role(self) -> Role:
        """The role that this node has."""
        return self.machine.role

    @property
    def admitting(self) -> bool:
        """Whether it may act as leader."""
        return self.machine.admitting

    async def run(self) -> None:
        """Follow the election until cancelled, then give up what runs."""
        measuring = asyncio.ensure_future(self._measure())
        try:
            async for observed in self._protocol.observe():
                self._watch.observed(observed, self._clock.boottime_s())
                self._step(observed)
        finally:
            measuring.cancel()
            if self._timer is not None:
                self._timer.cancel()
            tasks = [measuring, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _measure(self) -> None:
        while True:
            await asyncio.sleep(METRICS_EVERY_S)
            self.measure()

    def measure(self) -> None:
        """Bring the metrics that grow with time up to date; for who reads them."""
        self._watch.passed(self._clock.boottime_s())

    # --- the machine -------------------------------------------------------------------------------------------------

    def _step(self, message: Observed | Ended) -> None:
        self.machine.tick(self._clock.boottime_s())
        self.machine.step(message)
        self._turn()

    def _turn(self) -> None:
        effects = self.machine.drain()
        for token in effects.cancel:
            task = self._tasks.get(token)
            if task is not None:
                task.cancel()
        for transition in effects.transitions:
            self._report(transition)
        if effects.resign is not None:
            self._spawn(0, self._protocol.resign(effects.resign))
        if effects.exit is not None:
            _logger.error("this node must end: %s", effects.exit, extra={"event": "role_exit", "reason": effects.exit})
            self._on_exit(errors.MasterState(effects.exit))
        if effects.run is not None:
            self._spawn(effects.run.token, self._run_step(effects.run))
        if effects.transitions:
            self.changed.set()
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.machine.next_deadline
        if deadline is not None:
            delay = max(0.0, deadline - self._clock.boottime_s())
            self._timer = asyncio.get_running_loop().call_later(delay + 0.001, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.machine.tick(self._clock.boottime_s())
        self._turn()

    def _spawn(self, token: int, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        key = token or -id(task)
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    # --- steps -------------------------------------------------------------------------------------------------------

    async def _run_step(self, run: Run) -> None:
        failure = ""
        try:
            await self._carry_out(run)
        except errors.Error as error:
            failure = f"{error.code}: {error.message}"
        except Exception as error:
            # An execution is somebody else's code: whatever it raises is its failure, and the policy decides.
            _logger.exception("%s failed", run.execution or run.step.value, extra={"event": "step_failed"})
            failure = f"{type(error).__name__}: {error}"
        self._step(Ended(run.token, failure))

    async def _carry_out(self, run: Run) -> None:
        match run.step:
            case Step.DELAY:
                raise AssertionError(run)
            case Step.FENCE:
                if not await self._protocol.fencing():
                    raise errors.EpochTaken(f"fencing for term {run.term} failed")
            case Step.REPLAY:
                await self._protocol.read_barrier(timeout_s=self.machine.options.replay_s)
            case Step.OPEN:
                epoch = self._protocol.epoch
                if epoch == 0:
                    raise errors.StaleEpoch("the epoch was lost before admission opened")
                await self._leadership.open(epoch)
            case Step.CLOSE:
                await self._leadership.close()
            case Step.DRAIN:
                await self._leadership.drain()
            case Step.DROP:
                await self._leadership.drop()
            case Step.EXECUTE:
                changing = Changing(run.source, run.target, run.term, self._protocol.epoch)
                await self._executions[run.execution].call(changing)

    def _report(self, transition: Transition) -> None:
        source, target = transition.source.value, transition.target.value
        milliseconds = round(transition.seconds * 1000, 3)
        failed = bool(transition.failure) and transition.source is transition.target
        _logger.log(
            logging.WARNING if transition.failure else logging.INFO,
            "%s to %s in term %d%s",
            source,
            target,
            transition.term,
            f": {transition.failure}" if transition.failure else "",
            extra={
                "event": "promotion_failed" if failed else "transition",
                "from": source,
                "to": target,
                "term": transition.term,
                "leader": transition.leader,
                "reason": transition.failure or transition.reason,
                "ms": milliseconds,
            },
        )
        if failed:
            self._metrics.add("srengine_ha_promotions_failed_total")
            return
        self._metrics.add("srengine_ha_transitions_total", source=source, target=target)
        self._metrics.add("srengine_ha_transition_seconds_total", transition.seconds, source=source, target=target)
        self._metrics.set("srengine_ha_transition_seconds", transition.seconds, source=source, target=target)


class _Watch:
    """Counts what the election does: changes of leader, time without one."""

    def __init__(self, metrics: Metrics, now: float) -> None:
        self._metrics = metrics
        self._leader: tuple[str, int] | None = None
        self._known = False
        self._unknown_since: float | None = now
        self._at = now
        self._available_s = 0.0
        self._observed_s = 0.0

    def observed(self, observed: Observed, now: float) -> None:
        self.passed(now)
        self._known = observed.leader is not None
        if observed.leader is None:
            if self._unknown_since is None:
                self._unknown_since = now
            return
        if self._unknown_since is not None:
            took = now - self._unknown_since
            self._unknown_since = None
            self._metrics.add("srengine_ha_elections_total")
            self._metrics.add("srengine_ha_election_seconds_total", took)
            self._metrics.set("srengine_ha_election_seconds", took)
        if (observed.leader, observed.term) != self._leader:
            self._leader = (observed.leader, observed.term)
            self._metrics.add("srengine_ha_leader_changes_total")

    def passed(self, now: float) -> None:
        passed = now - self._at
        self._at = now
        self._observed_s += passed
        self._metrics.add("srengine_ha_observed_seconds_total", passed)
        if self._known:
            self._available_s += passed
            self._metrics.add("srengine_ha_available_seconds_total", passed)
        if self._observed_s > 0:
            self._metrics.set("srengine_ha_availability_percent", 100 * self._available_s / self._observed_s)
