"""A tablet's leader on this node: commits what arrives together in one transaction, answers when a majority holds it.

::

    write --+
    write --+--> queue --> [one committing task: tablet.apply([...]) in a thread, one fsync] --Applied--> LeaderMachine
    write --+                                                                                               |
      ^------------------------------- answer, once committed >= the end of its entry ----------------------+

A read looks the record up and waits until its version is committed, so nobody sees what could still be lost. A scan
waits for the sequence of its view. While a majority is out of contact both are refused with `NoQuorum`, writes before
anything is applied.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srengine import errors, limits
from srengine.ha import leader_machine as lm
from srengine.ha import quorum
from srengine.ha.group import LeaderDriver, Surroundings
from srengine.ha.messages import Pull, PullReply
from srengine.ha.proof import Check
from srengine.metrics import Metrics
from srengine.storage import Batch, Outcome
from srengine.storage.checking import unreadable
from srengine.sync.agreeing import differences
from srengine.sync.copying import Rows, bring_up_to, rows_after
from srengine.sync.exchanging import Exchanges, Goal
from srengine.sync.keeping import CHANGE_WAIT_S, Keeper
from srengine.sync.reading import Found, Range, read_keys, read_range
from srengine.sync.slots import Slot
from srengine.types import Position

KEYS_INLINE_MAX = 16
"""So few look-ups cost less than handing them to a thread."""


@dataclass(slots=True)
class _Pending:
    batch: Batch
    done: asyncio.Future[Outcome]


class TabletLeader:
    """Leads one tablet."""

    def __init__(
        self,
        slot: Slot,
        *,
        around: Surroundings,
        trusted: Callable[[], bool],
        exchanges: Exchanges,
        metrics: Metrics,
    ) -> None:
        self.slot = slot
        self._name = around.name
        self._contact = around.contact
        self._reach = around.reach
        self._clock = around.clock
        self._spawn = around.spawn
        self._alarm = around.alarm
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        self._room = asyncio.Condition()
        self._committing = False
        self._stamped = False
        self.recovered_from = ""
        """The replica that the own copy was brought up from at this start; empty: it was whole."""
        self.recovered_bytes = 0
        others = [node for node in slot.spec.nodes if node != around.name]
        self.driver = LeaderDriver(
            lm.LeaderMachine(
                name=around.name,
                others=others,
                own=slot.position,
                own_trusted=slot.trusted and trusted(),
                own_whole=not slot.filling,
                root_at=slot.root_at,
                now=around.clock.boottime_s(),
                provable=True,
            ),
            around=around,
            recover=self._recover,
            prover=self,
        )
        self.keeper = Keeper(
            slot,
            name=around.name,
            reach=around.reach,
            clock=around.clock,
            alarm=around.alarm,
            exchanges=exchanges,
            metrics=metrics,
            sources=self._sources,
            damaged=self.damaged,
        )

    def start(self) -> None:
        """Begin to lead."""
        self.driver.start()
        self._spawn(self._stamp_when_serving(), f"stamp {self.slot.spec.tablet_id}")

    def close(self) -> None:
        """Stop; whoever waits gets `Closed`."""
        self.driver.close()
        for pending in self._queue:
            if not pending.done.done():
                pending.done.set_exception(errors.Closed("the node stops"))
        self._queue.clear()

    @property
    def quorum_in_contact(self) -> bool:
        """Whether a majority of the replicas, this one included, was heard lately."""
        nodes = self.slot.spec.nodes
        alive = sum(node == self._name or self._contact.alive(node) for node in nodes)
        return alive >= quorum.majority(len(nodes))

    def _check_reachable(self, need: lm.Need) -> None:
        nodes = self.slot.spec.nodes
        away = [node for node in nodes if node != self._name and not self._contact.alive(node)]
        if need is lm.Need.ALL and away:
            raise errors.NoQuorum(f"consistency all needs every replica; not reached: {', '.join(away)}", away=away)
        if len(nodes) - len(away) < quorum.majority(len(nodes)):
            raise errors.NoQuorum(f"a majority of the replicas is needed; not reached: {', '.join(away)}", away=away)

    # --- writing -----------------------------------------------------------------------------------------------------

    async def write(self, batch: Batch, need: lm.Need, timeout_s: float) -> Outcome:
        """Apply one batch; return when the replicas that ``need`` names hold it durably.

        Raises `NotReady`, `NoQuorum` (nothing was applied), `TimedOut` (it may stand), `RequestExpired`, and what
        `Tablet.apply` raises.
        """
        deadline = self._clock.monotonic_s() + timeout_s
        await self.driver.wait_serving(timeout_s)
        self._check_reachable(need)
        outcome = await self._commit(batch, deadline)
        if outcome.refused:
            raise errors.RequestExpired(
                "the request id is older than the kept window or its session unknown; nothing was executed",
                number=batch.number,
            )
        await self.driver.wait(outcome.entry_end, need, max(0.0, deadline - self._clock.monotonic_s()))
        return outcome

    async def _commit(self, batch: Batch, deadline: float) -> Outcome:
        size = len(batch.operations)
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic_s())), self._room:
                await self._room.wait_for(
                    lambda: self._queued_bytes == 0 or self._queued_bytes + size <= limits.WRITE_QUEUE_BYTES_MAX
                )
                self._queued_bytes += size
        except TimeoutError:
            raise errors.NotReady("too many writes wait for this tablet; nothing was applied") from None
        pending = _Pending(batch, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        if not self._committing:
            self._committing = True
            self._spawn(self._commit_all(), f"commit {self.slot.spec.tablet_id}")
        # Not cut short: the commit takes as long as the disk takes, and its outcome must be known.
        return await asyncio.shield(pending.done)

    async def _commit_all(self) -> None:
        try:
            while self._queue:
                group = self._next_group()
                await self._commit_group(group)
                async with self._room:
                    self._queued_bytes -= sum(len(pending.batch.operations) for pending in group)
                    self._room.notify_all()
        finally:
            self._committing = False

    def _next_group(self) -> list[_Pending]:
        group = [self._queue.popleft()]
        size = len(group[0].batch.operations)
        while self._queue and len(group) < limits.WRITE_GROUP_ENTRIES_MAX:
            size += len(self._queue[0].batch.operations)
            if size > limits.GROUP_BYTES_MAX:
                break
            group.append(self._queue.popleft())
        return group

    async def _commit_group(self, group: Sequence[_Pending]) -> None:
        try:
            async with self.slot.writing:
                if not self.driver.machine.serving:
                    raise errors.NotReady(f"{self.driver.machine.why_not_serving()}; nothing was applied")
                tablet = self.slot.opened()
                outcomes = await asyncio.to_thread(tablet.apply, [pending.batch for pending in group])
        except errors.Error as error:
            if len(group) > 1 and isinstance(error, errors.InvalidValue):
                # One of them is malformed; the others must not suffer.
                for pending in group:
                    await self._commit_group([pending])
                return
            if unreadable(error) or isinstance(error, errors.CorruptionError):
                self._alarm("tablet_failed", f"tablet {self.slot.spec.tablet_id}: {error.message}")
                self.keeper.met(error)
            for pending in group:
                if not pending.done.done():
                    pending.done.set_exception(errors.from_code(error.code, error.message, error.details))
                    # Whoever waited may be gone; that nobody looks at the outcome is no mistake.
                    pending.done.exception()
            return
        self.driver.step(lm.Applied(tablet.position))
        for pending, outcome in zip(group, outcomes, strict=True):
            if not pending.done.done():
                pending.done.set_result(outcome)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(
        self, keys: Sequence[bytes], *, bytes_max: int, need: lm.Need, timeout_s: float, local: bool = False
    ) -> tuple[Found, float]:
        """Look keys up; return what was found and the moment (Unix seconds) that it is current for.

        ``local``: also while a majority is out of contact; what is shown is acknowledged all the same.
        """
        deadline = self._clock.monotonic_s() + timeout_s
        await self.driver.wait_serving(timeout_s)
        if not local:
            self._check_reachable(need)
        as_of = self._clock.wall_ms() / 1000
        tablet = self.slot.opened()
        sequence = tablet.position.sequence
        found = await self.keeper.sound(
            functools.partial(read_keys, tablet, keys, bytes_max=bytes_max), inline=len(keys) <= KEYS_INLINE_MAX
        )
        self._check_right()
        await self._wait_readable(found.depends_on, need, deadline)
        if need is lm.Need.ALL and sequence == tablet.position.sequence:
            await self._agree(keys, found, sequence)
        return found, as_of

    async def _agree(self, keys: Sequence[bytes], found: Found, sequence: int) -> None:
        """Have every replica read the keys, too; `NotReady` when one has something else: all prove their copies."""
        spec = self.slot.spec
        others = [node for node in spec.nodes if node != self._name]
        differing = await differences(spec.tablet_id, sequence, keys, found, others, self._reach)
        if not differing:
            return
        proof = await self.keeper.prove()
        if not proof.whole:
            self.damaged(proof.reason)
        raise errors.NotReady(f"{', '.join(differing)} found other records than the leader at {sequence}; repairing")

    async def scan(
        self,
        *,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int,
        bytes_max: int,
        keys_only: bool,
        need: lm.Need,
        timeout_s: float,
        local: bool = False,
    ) -> tuple[Range, float]:
        """Read a range; as `read`."""
        deadline = self._clock.monotonic_s() + timeout_s
        await self.driver.wait_serving(timeout_s)
        if not local:
            self._check_reachable(need)
        as_of = self._clock.wall_ms() / 1000
        tablet = self.slot.opened()
        found = await self.keeper.sound(
            functools.partial(
                read_range,
                tablet,
                start=start,
                stop=stop,
                reverse=reverse,
                limit=limit,
                bytes_max=bytes_max,
                keys_only=keys_only,
            )
        )
        self._check_right()
        await self._wait_readable(found.depends_on, need, deadline)
        return found, as_of

    def _check_right(self) -> None:
        """Raise `NotReady` when the copy that was just read came into doubt meanwhile."""
        if not self.driver.machine.serving:
            raise errors.NotReady(self.driver.machine.why_not_serving())

    async def _wait_readable(self, sequence: int, need: lm.Need, deadline: float) -> None:
        try:
            await self.driver.wait(sequence, need, max(0.0, deadline - self._clock.monotonic_s()))
        except errors.TimedOut as error:
            raise errors.NotReady(
                f"what was read is not acknowledged by the replicas yet: {error.message}", sequence=sequence
            ) from error

    # --- replicas ----------------------------------------------------------------------------------------------------

    async def answer(self, pull: Pull) -> Rows:
        """Answer a replica's question; it was judged already."""
        # What a commit just made durable may have been read by the replica before the commit's task woke up.
        if not self.slot.filling and self.driver.machine.serving:
            self.driver.step(lm.Applied(self.slot.position))
        try:
            check = Check(pull.check)
        except ValueError:
            raise errors.FrameError(f"a proof says {pull.check[:40]!r}") from None
        claim = lm.Claim(pull.position, pull.trusted, pull.filling, pull.committed_known, check)
        answer = await self.driver.pulled(pull.replica, claim, pull.process, pull.number)
        process = self._contact.process_id
        if answer.kind is not lm.AnswerKind.ROWS:
            return Rows(PullReply(answer.kind.value, answer.leader, process, answer.committed, reason=answer.reason))
        tablet = self.slot.opened()
        return await self.keeper.sound(
            functools.partial(rows_after, tablet, pull.position, process, committed=answer.committed)
        )

    # --- doubt -------------------------------------------------------------------------------------------------------

    def damaged(self, reason: str) -> None:
        """Take note that the own records are not what they were: nothing is served until they are repaired."""
        self.driver.step(lm.Damaged(reason))

    async def changed(self) -> None:
        """Return after the machine's next turn, or a moment: for whoever waits for a state."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHANGE_WAIT_S):
                self.driver.changed.clear()
                await self.driver.changed.wait()

    @property
    def right(self) -> bool:
        """Whether copies, records and comparisons may be taken from here."""
        return self.driver.machine.may_ship

    def _sources(self) -> list[str]:
        """Return the other replicas, those that are heard and hold most first."""
        progress = self.driver.machine.progress
        return sorted(
            progress, key=lambda other: (not self._contact.alive(other), -progress[other].held, progress[other].fault)
        )

    async def prove(self) -> tuple[bool, str]:
        """See `srengine.ha.group.LeaderProver`."""
        try:
            proof = await self.keeper.prove()
        except errors.Error as error:
            if not unreadable(error):
                raise
            self.keeper.met(error)
            return False, error.message
        return proof.whole, proof.reason

    async def repair(self, repair: lm.Repair) -> Position:
        """See `srengine.ha.group.LeaderProver`."""
        goal = Goal(self.slot.spec.lineage, exactly=repair.target)
        why = self.driver.machine.why_not_serving()
        copied = await self.keeper.become_equal(repair.replica, goal, recount=repair.recount, why=why)
        await asyncio.to_thread(self.slot.stamp)
        self._alarm(
            "leader_repaired", f"tablet {self.slot.spec.tablet_id} of {self.slot.spec.table} from {repair.replica}"
        )
        return copied.position

    # --- the start ---------------------------------------------------------------------------------------------------

    def distrust(self, reason: str) -> None:
        """Take note that the disk turned out to be an older state."""
        serving = self.driver.machine.serving
        self.slot.trusted = False
        self.driver.step(lm.Distrusted(reason))
        if serving:
            # Too late to wait for the others: what is served is what counts from here on. The alarm has been raised.
            self._spawn(self._stamp_when_serving(), f"stamp {self.slot.spec.tablet_id}")

    async def _recover(self, effect: lm.Recover) -> Position:
        self.recovered_from = effect.replica
        return await bring_up_to(self.slot, effect.target, effect.replica, self._name, self._reach)

    async def _stamp_when_serving(self) -> None:
        while True:
            try:
                await self.driver.wait_serving(3600.0)
            except errors.NotReady:
                continue
            break
        await asyncio.to_thread(self.slot.stamp)
