"""Drivers of the two machines of a group: they turn messages into steps, and effects into answers and I/O.

`LeaderDriver` and `FollowerDriver` know nothing of what a group holds; tablets (`sync`) give them that as callables.
Everything here runs on the event loop's thread; what blocks is done by the callables in other threads.

The order is the same everywhere: receive, step, persist, send, apply. The machines of this room have nothing to
persist: a replica's position is durable before it is stepped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from srengine import errors, limits
from srengine.clock import Clock
from srengine.ha import follower_machine as fm
from srengine.ha import leader_machine as lm
from srengine.ha.contact import Contact, Reach
from srengine.types import Position

_logger = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]
"""Start a task under the node's supervisor, which stops the node when it fails unexpectedly."""
AlarmSink = Callable[[str, str], None]
"""Called with an event and a message: to the log, the counters and the status."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every group of a node is given: ``name`` of the node, and its ways out."""

    name: str
    contact: Contact
    reach: Reach
    clock: Clock
    spawn: Spawn
    alarm: AlarmSink


class LeaderProver(Protocol):
    """What a leader's driver needs of a group that can prove and repair itself; `errors.Error` when it fails."""

    async def prove(self) -> tuple[bool, str]:
        """Add the own records up; return whether they give the carried root, and what is wrong if not."""
        ...

    async def repair(self, repair: lm.Repair) -> Position:
        """Become equal to the replica that is named."""
        ...


class LeaderDriver:
    """Drives one `LeaderMachine`.

    ``recover(effect)`` fetches what is missing and returns the position reached; its `errors.Error` makes the machine
    ask again. ``prover``: for a machine that is ``provable``.
    """

    def __init__(
        self,
        machine: lm.LeaderMachine,
        *,
        around: Surroundings,
        recover: Callable[[lm.Recover], Awaitable[Position]],
        committed: Callable[[int], None] | None = None,
        prover: LeaderProver | None = None,
    ) -> None:
        self.machine = machine
        self._prover = prover
        self._committed = committed
        self._clock = around.clock
        self._spawn = around.spawn
        self._recover = recover
        self._alarm = around.alarm
        self._tokens = itertools.count(1)
        self._pulls: dict[int, asyncio.Future[lm.Answer]] = {}
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._serving = asyncio.Event()
        self._last_pull: dict[str, tuple[object, int]] = {}
        self.changed = asyncio.Event()
        """Set after every turn; whoever waits for a state clears it first."""

    def start(self) -> None:
        """Begin; to be called on the event loop."""
        self._turn()

    async def pulled(self, replica: str, claim: lm.Claim, process: object, number: int) -> lm.Answer:
        """Answer a replica's question, at once or when there is something to say.

        ``number`` grows with the questions of one ``process`` (which the roster has accepted); one that does not is a
        late or repeated frame and counts for nothing.
        """
        last_process, last_number = self._last_pull.get(replica, (None, 0))
        if last_process == process and number <= last_number:
            return lm.Answer(0, lm.AnswerKind.STARTING, self.machine.committed, self.machine.own, "superseded")
        self._last_pull[replica] = (process, number)
        token = next(self._tokens)
        future: asyncio.Future[lm.Answer] = asyncio.get_running_loop().create_future()
        self._pulls[token] = future
        self.step(lm.Pulled(replica, claim, token))
        try:
            return await future
        finally:
            if self._pulls.pop(token, None) is not None:
                self.step(lm.Forget(token))

    async def wait(self, sequence: int, need: lm.Need, timeout_s: float) -> None:
        """Return when ``sequence`` is held as needed; `TimedOut` otherwise."""
        if need is lm.Need.QUORUM and self.machine.committed >= sequence:
            return
        token = next(self._tokens)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waits[token] = future
        self.step(lm.Await(token, sequence, need))
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise errors.TimedOut(
                f"sequence {sequence} is not held by {'a majority' if need is lm.Need.QUORUM else 'all replicas'} yet",
                sequence=sequence,
                committed=self.machine.committed,
            ) from None
        finally:
            if self._waits.pop(token, None) is not None:
                self.step(lm.Forget(token))

    async def wait_serving(self, timeout_s: float) -> None:
        """Return when the machine serves; `NotReady` that says what it waits for otherwise."""
        if self.machine.serving:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._serving.wait()
        except TimeoutError:
            raise errors.NotReady(self.machine.why_not_serving()) from None

    def step(self, message: lm.Input) -> None:
        """Step the machine and do what it says."""
        self.machine.tick(self._clock.boottime_s())
        self.machine.step(message)
        self._turn()

    def _turn(self) -> None:
        effects = self.machine.drain()
        for answer in effects.send:
            waiting = self._pulls.pop(answer.token, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        for release in effects.release:
            held = self._waits.pop(release.token, None)
            if held is not None and not held.done():
                held.set_result(None)
        for alarm in effects.alarms:
            self._alarm(alarm.event, alarm.message)
        if effects.recover is not None:
            self._recovery = self._spawn(self._run_recovery(effects.recover), f"recover from {effects.recover.replica}")
        if effects.prove is not None:
            self._spawn(self._run_proof(), "prove the own copy")
        if effects.repair is not None:
            self._spawn(self._run_repair(effects.repair), f"repair from {effects.repair.replica}")
        if self.machine.serving:
            self._serving.set()
        else:
            self._serving.clear()
        if self._committed is not None:
            self._committed(self.machine.committed)
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

    async def _run_recovery(self, effect: lm.Recover) -> None:
        try:
            position = await self._recover(effect)
        except errors.Error as error:
            self._alarm("recovery_failed", f"from {effect.replica}: {error.message}")
            await asyncio.sleep(limits.HALT_RETRY_S)
            self.step(lm.RecoveryFailed(f"{effect.replica}: {error.message}"))
        else:
            self.step(lm.Recovered(position))

    async def _run_proof(self) -> None:
        assert self._prover is not None, "a machine that is not provable asks for no proof"
        while True:
            try:
                whole, reason = await self._prover.prove()
            except errors.Error as error:
                self._alarm("proof_failed", error.message)
                await asyncio.sleep(limits.HALT_RETRY_S)
            else:
                self.step(lm.Proved(whole, reason))
                return

    async def _run_repair(self, repair: lm.Repair) -> None:
        assert self._prover is not None, "a machine that is not provable asks for no repair"
        try:
            position = await self._prover.repair(repair)
        except errors.Error as error:
            self._alarm("repair_failed", f"from {repair.replica}: {error.message}")
            self.step(lm.RepairFailed(f"{repair.replica}: {error.message}"))
        else:
            self.step(lm.Repaired(position))

    def close(self) -> None:
        """Stop timers; whoever waits gets `Closed`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        closed = errors.Closed("the node stops")
        futures: list[asyncio.Future[Any]] = [*self._pulls.values(), *self._waits.values()]
        for future in futures:
            if not future.done():
                future.set_exception(closed)
        self._pulls.clear()
        self._waits.clear()


class FollowerActions(Protocol):
    """What a follower's driver can do; each raises `errors.Error` when it fails."""

    async def ask(self, ask: fm.Ask) -> fm.Answered:
        """Send the question, return the answer; a delta that came along is kept for `apply_delta`."""
        ...

    async def apply_delta(self) -> Position:
        """Apply the delta of the last answer durably. `Diverged` when it does not continue the own history."""
        ...

    async def copy(self, copy: fm.Copy) -> tuple[Position, int]:
        """Copy over the bulk port; return the position and the bytes received."""
        ...

    def own(self) -> tuple[Position, bool]:
        """Return the durable position, and whether a copy is half applied."""
        ...

    def bytes_copied(self) -> int:
        """Return the bytes that the last `copy` received, also when it failed."""
        ...


class FollowerProver(Protocol):
    """What a replica's driver needs of a group that can prove and repair itself; `errors.Error` when it fails."""

    async def prove(self) -> fm.Proved:
        """Add the own records up."""
        ...

    async def exchange(self, copy: fm.Copy) -> fm.Copied | fm.CopyFailed:
        """Become equal to the leader by an exchange, or by a full copy when that is cheaper or the only way."""
        ...


class FollowerDriver:
    """Drives one `FollowerMachine` in one task (`run`)."""

    def __init__(
        self,
        machine: fm.FollowerMachine,
        actions: FollowerActions,
        *,
        around: Surroundings,
        committed: Callable[[int], None] | None = None,
        prover: FollowerProver | None = None,
    ) -> None:
        self.machine = machine
        self._committed = committed
        self._actions = actions
        self._prover = prover
        self._clock = around.clock
        self._alarm = around.alarm
        self._tokens = itertools.count(1)
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._todo: fm.Ask | fm.ApplyDelta | fm.Copy | fm.Prove | None = None
        self._kicked = asyncio.Event()
        self._said = ""
        self.changed = asyncio.Event()
        """Set after every turn; whoever waits for a state clears it first."""

    def kick(self) -> None:
        """Ask again at once: the leader is another process."""
        self._kicked.set()

    def damaged(self, reason: str) -> None:
        """Take note that the own records are not what they were: they are proved as soon as nothing runs."""
        self.machine.step(fm.Damaged(reason))
        self._turn()
        self._kicked.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            self.machine.tick(self._clock.boottime_s())
            self._turn()
            match self._todo:
                case fm.Ask() as ask:
                    self._todo = None
                    await self._ask(ask)
                case fm.ApplyDelta():
                    self._todo = None
                    await self._apply()
                case fm.Copy() as copy:
                    self._todo = None
                    await self._copy(copy)
                case fm.Prove():
                    self._todo = None
                    await self._prove()
                case None:
                    await self._pause()

    async def wait_committed(self, sequence: int, timeout_s: float) -> None:
        """Return when ``sequence`` is known to be committed; `NotReady` otherwise."""
        if self.machine.committed_known >= sequence:
            return
        token = next(self._tokens)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waits[token] = future
        self.machine.step(fm.AwaitCommitted(token, sequence))
        self._turn()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise errors.NotReady(
                f"the record's version {sequence} is not known to be acknowledged yet",
                sequence=sequence,
                committed=self.machine.committed_known,
            ) from None
        finally:
            self._waits.pop(token, None)

    def _turn(self) -> None:
        effects = self.machine.drain()
        todo = effects.ask or effects.apply or effects.copy or effects.prove
        if todo is not None:
            assert self._todo is None, (self._todo, todo)
            self._todo = todo
        for release in effects.release:
            future = self._waits.pop(release.token, None)
            if future is not None and not future.done():
                future.set_result(None)
        for alarm in effects.alarms:
            self._alarm(alarm.event, alarm.message)
        if self._committed is not None:
            self._committed(min(self.machine.committed_known, self.machine.own.sequence))
        self.changed.set()

    def _step(self, message: fm.Input) -> None:
        self.machine.tick(self._clock.boottime_s())
        self.machine.step(message)
        self._turn()

    async def _ask(self, ask: fm.Ask) -> None:
        question = asyncio.ensure_future(self._actions.ask(ask))
        kicked = asyncio.ensure_future(self._kicked.wait())
        waiting: set[asyncio.Future[Any]] = {question, kicked}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (question, kicked):
                task.cancel()
            await asyncio.wait(waiting)
            self._kicked.clear()
        error = None if question.cancelled() else question.exception()
        if question.cancelled():
            self._step(fm.Kick())
        elif error is None:
            self._said = ""
            self._step(question.result())
        elif isinstance(error, errors.Error):
            self._say(f"{error.code}: {error.message}")
            self._step(fm.Failed(ask.number, f"{error.code}: {error.message}"))
        else:
            raise error

    def _say(self, why: str) -> None:
        """Log why a question failed, once for as long as it stays the same."""
        if why != self._said:
            self._said = why
            _logger.info("no answer from the leader: %s", why, extra={"event": "no_answer"})

    async def _apply(self) -> None:
        try:
            position = await self._actions.apply_delta()
        except errors.Error as error:
            diverged = isinstance(error, errors.Diverged | errors.ForeignData)
            self._step(fm.DeltaRefused(f"{error.code}: {error.message}", diverged=diverged))
        else:
            self._step(fm.DeltaApplied(position))

    async def _prove(self) -> None:
        assert self._prover is not None, "a machine that is not provable asks for no proof"
        try:
            proved = await self._prover.prove()
        except errors.Error as error:
            # Not even that could be read; the copy is no basis for anything.
            own, _ = self._actions.own()
            proved = fm.Proved(own, whole=False, reason=f"{error.code}: {error.message}")
        self._step(proved)

    async def _copy(self, copy: fm.Copy) -> None:
        if copy.path is fm.Path.SKETCH:
            assert self._prover is not None, "a machine that is not provable asks for no exchange"
            self._step(await self._prover.exchange(copy))
            return
        try:
            position, count = await self._actions.copy(copy)
        except errors.Error as error:
            own, filling = self._actions.own()
            self._step(fm.CopyFailed(f"{error.code}: {error.message}", own, filling, self._actions.bytes_copied()))
        else:
            self._step(fm.Copied(position, count))

    async def _pause(self) -> None:
        deadline = self.machine.next_deadline
        assert deadline is not None, self.machine.state
        delay = deadline - self._clock.boottime_s()
        if delay > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._kicked.wait()
            if self._kicked.is_set():
                self._kicked.clear()
                self._step(fm.Kick())
