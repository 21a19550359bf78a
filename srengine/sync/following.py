"""A replica of a tablet on this node: pulls from the leader, applies, answers `local` reads while it is current.

One task a tablet runs the follower's driver; the machine decides, this module does: asks over the peer port, applies
deltas in a thread, copies over the bulk port. A copy that does not open counts as empty and is replaced by a proved
full copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence

from srengine import errors, limits
from srengine.ha import follower_machine as fm
from srengine.ha.contact import answered
from srengine.ha.group import FollowerDriver, Surroundings
from srengine.ha.proof import Check
from srengine.metrics import Metrics
from srengine.storage import Delta
from srengine.storage.checking import unreadable
from srengine.sync.copying import COPY_PROGRESS_S, Copier, delta_of
from srengine.sync.exchanging import Exchanges, Goal, Unproven
from srengine.sync.keeping import CHANGE_WAIT_S, Keeper
from srengine.sync.reading import Found, Range, read_keys, read_range
from srengine.sync.slots import Slot
from srengine.types import Position

LOCAL_WAIT_S_MAX = 2.0
"""How long a `local` read waits for the replica to become current before it says `NotReady`."""


class TabletFollower:
    """Follows the leader of one tablet."""

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
        self._trusted = trusted
        self._metrics = metrics
        self._delta: Delta | None = None
        self._copier: Copier | None = None
        self.verified_at = 0.0
        """Unix seconds of the last answer that proved the own root, 0: never."""
        self.driver = FollowerDriver(
            fm.FollowerMachine(
                own=slot.position,
                filling=slot.filling,
                created=slot.created,
                now=around.clock.boottime_s(),
                provable=True,
            ),
            self,
            around=around,
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
        """Begin to follow."""
        self._spawn(self.driver.run(), f"follow {self.slot.spec.tablet_id}")
        self._spawn(self._stamp_when_synced(), f"stamp {self.slot.spec.tablet_id}")
        self._contact.on_new_leader(self.driver.kick)

    def close(self) -> None:
        """Nothing to do: the tasks are cancelled by their supervisor."""

    @property
    def synced(self) -> bool:
        """Whether a `local` read may be answered now."""
        return self.driver.machine.synced(self._clock.boottime_s())

    def distrust(self, reason: str) -> None:
        """Take note that the disk turned out to be an older state: the copy is proved again first."""
        del reason
        if self.slot.trusted:
            self.slot.trusted = False
            self._spawn(self._stamp_when_synced(), f"stamp {self.slot.spec.tablet_id}")

    async def _stamp_when_synced(self) -> None:
        while not self.synced:
            self.driver.changed.clear()
            await self.driver.changed.wait()
        await asyncio.to_thread(self.slot.stamp)

    # --- FollowerActions ---------------------------------------------------------------------------------------------

    async def ask(self, ask: fm.Ask) -> fm.Answered:
        """See `srengine.ha.group.FollowerActions`."""
        leader = self.slot.spec.leader
        channel = await self._reach(leader)
        reply, attachments = await self._contact.ask(
            channel,
            leader,
            self.slot.spec.tablet_id,
            ask,
            trusted=self.slot.trusted and self._trusted(),
            timeout_s=COPY_PROGRESS_S,
        )
        received = sum(len(attachment) for attachment in attachments)
        answer = answered(ask.number, reply, received)
        self._delta = delta_of(reply, attachments) if answer.state is fm.SourceState.DELTA else None
        if answer.state in {fm.SourceState.DELTA, fm.SourceState.NOTHING}:
            self.verified_at = self._clock.wall_ms() / 1000
        return answer

    async def apply_delta(self) -> Position:
        """See `srengine.ha.group.FollowerActions`."""
        delta, self._delta = self._delta, None
        assert delta is not None
        try:
            async with self.slot.writing:
                return await asyncio.to_thread(self.slot.opened().apply_delta, delta)
        except errors.Error as error:
            if unreadable(error) or isinstance(error, errors.CorruptionError):
                # What the delta replaces cannot be read: not the delta's fault.
                self.keeper.met(error)
            raise

    async def copy(self, copy: fm.Copy) -> tuple[Position, int]:
        """See `srengine.ha.group.FollowerActions`."""
        self._copier = Copier(self.slot, self._name)
        position = await self._copier.run(await self._reach(self.slot.spec.leader), copy.path)
        self._metrics.add("srengine_sync_catch_ups_total", path=copy.path.value)
        # A full copy is another file than the one that was noted.
        self._spawn(self._stamp_when_synced(), f"stamp {self.slot.spec.tablet_id}")
        return position, self._copier.bytes_received

    def own(self) -> tuple[Position, bool]:
        """See `srengine.ha.group.FollowerActions`."""
        return self.slot.position, self.slot.filling

    def bytes_copied(self) -> int:
        """See `srengine.ha.group.FollowerActions`."""
        return 0 if self._copier is None else self._copier.bytes_received

    # --- doubt -------------------------------------------------------------------------------------------------------

    def damaged(self, reason: str) -> None:
        """Take note that the own records are not what they were: the copy is proved, and repaired if they are not."""
        self.driver.damaged(reason)

    async def changed(self) -> None:
        """Return after the machine's next turn, or a moment: for whoever waits for a state."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHANGE_WAIT_S):
                self.driver.changed.clear()
                await self.driver.changed.wait()

    @property
    def right(self) -> bool:
        """Whether copies, records and comparisons may be taken from here: nothing half applied, nothing in doubt."""
        machine = self.driver.machine
        busy = isinstance(machine.state, fm.Copying | fm.Proving)
        return not (machine.filling or machine.doubt or machine.check is Check.DAMAGED or busy)

    def _sources(self) -> list[str]:
        """Return the other replicas, the leader first."""
        others = [node for node in self.slot.spec.nodes if node not in {self._name, self.slot.spec.leader}]
        return [self.slot.spec.leader, *others]

    async def prove(self) -> fm.Proved:
        """See `srengine.ha.group.FollowerProver`."""
        proof = await self.keeper.prove()
        return fm.Proved(proof.position, proof.whole, proof.reason)

    async def exchange(self, copy: fm.Copy) -> fm.Copied | fm.CopyFailed:
        """See `srengine.ha.group.FollowerProver`."""
        position = self.slot.position
        goal = Goal(self.slot.spec.lineage, at_least=position.sequence)
        why = self.driver.machine.catch_up.reason
        try:
            copied = await self.keeper.become_equal(self.slot.spec.leader, goal, recount=copy.recount, why=why)
        except errors.Error as error:
            unproven = isinstance(error, Unproven) and not copy.recount
            why = f"{error.code}: {error.message}"
            return fm.CopyFailed(why, self.slot.position, self.slot.filling, unproven=unproven)
        self._spawn(self._stamp_when_synced(), f"stamp {self.slot.spec.tablet_id}")
        path = copied.path or copy.path
        self._metrics.add("srengine_sync_catch_ups_total", path=path.value)
        return copied

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, keys: Sequence[bytes], *, bytes_max: int, timeout_s: float) -> tuple[Found, float]:
        """Look keys up in this replica; return what was found and the moment (Unix seconds) that it is current for.

        Raises `NotReady` unless the replica is SYNCED, before and after reading.
        """
        deadline = self._clock.monotonic_s() + timeout_s
        await self._wait_synced(timeout_s)
        tablet = self.slot.opened()
        found = await self.keeper.sound(functools.partial(read_keys, tablet, keys, bytes_max=bytes_max))
        await self.driver.wait_committed(found.depends_on, max(0.0, deadline - self._clock.monotonic_s()))
        return found, self._as_of()

    async def scan(
        self,
        *,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int,
        bytes_max: int,
        keys_only: bool,
        timeout_s: float,
    ) -> tuple[Range, float]:
        """Read a range of this replica; as `read`."""
        deadline = self._clock.monotonic_s() + timeout_s
        await self._wait_synced(timeout_s)
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
        await self.driver.wait_committed(found.depends_on, max(0.0, deadline - self._clock.monotonic_s()))
        return found, self._as_of()

    async def _wait_synced(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(min(timeout_s, LOCAL_WAIT_S_MAX)):
                while not self.synced:
                    self.driver.changed.clear()
                    await self.driver.changed.wait()
        except TimeoutError:
            raise self._not_ready() from None

    def _as_of(self) -> float:
        # The process may have been stopped between the look-up and now: what was current then may not be any more.
        now = self._clock.boottime_s()
        fresh_at = self.driver.machine.fresh_at
        if not self.driver.machine.synced(now) or fresh_at is None:
            raise self._not_ready()
        return self._clock.wall_ms() / 1000 - (now - fresh_at)

    def _not_ready(self) -> errors.NotReady:
        machine = self.driver.machine
        state = machine.replica_state(self._clock.boottime_s()).value
        why = machine.halted or self.slot.fault or machine.catch_up.reason
        return errors.NotReady(
            f"the replica on {self._name} is {state}, not current within {limits.STALENESS_S_MAX:g} s: {why}",
            state=state,
            behind=machine.behind,
        )
