"""Keep one copy right: prove it, repair it from another, and answer reads that meet a damaged record.

A `Keeper` belongs to a `TabletLeader` or a `TabletFollower`, which decides when (its machine does); here is how.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from srengine import errors
from srengine.clock import Clock
from srengine.ha import follower_machine as fm
from srengine.ha.contact import Reach
from srengine.ha.group import AlarmSink
from srengine.metrics import Metrics
from srengine.storage.checking import Proof, damaged_key, prove, remove_unreadable, unreadable
from srengine.sync.copying import Copier
from srengine.sync.exchanging import Exchanges, Goal, Result
from srengine.sync.healing import heal_changes, heal_records
from srengine.sync.health import Repair
from srengine.sync.slots import Slot

RECORDS_HEALED_MAX: Final = 64
"""Damaged records that one read heals before it gives up: a scan of a rotten disk is no way to repair it."""
CHANGE_WAIT_S: Final = 0.25
"""How long whoever waits for a state of a machine waits for its next turn before looking again."""

Found = TypeVar("Found")


class Keeper:
    """Keeps the copy in ``slot``.

    ``sources()``: replicas to take single records from, the best first. ``damaged(reason)``: tells the machine that the
    records are not what they were.
    """

    def __init__(
        self,
        slot: Slot,
        *,
        name: str,
        reach: Reach,
        clock: Clock,
        alarm: AlarmSink,
        exchanges: Exchanges,
        metrics: Metrics,
        sources: Callable[[], list[str]],
        damaged: Callable[[str], None],
    ) -> None:
        self.slot = slot
        self.sources = sources
        self.damaged = damaged
        self._name = name
        self._reach = reach
        self._clock = clock
        self._alarm = alarm
        self._exchanges = exchanges
        self._metrics = metrics
        self._unreadable = ""
        """What could not be read of the file itself, pages or medium; empty: nothing. Only a full copy helps then."""

    # --- the whole copy ----------------------------------------------------------------------------------------------

    async def prove(self) -> Proof:
        """Add all records up. Raises `CorruptionError`, `TabletFenced`, `NotReady` (there is no copy)."""
        tablet = self.slot.opened()
        if self._unreadable:
            return Proof(tablet.position, False, self._unreadable)
        proof = await asyncio.to_thread(prove, tablet)
        self._metrics.add("srengine_sync_proofs_total", whole=str(proof.whole).lower())
        return proof

    async def become_equal(self, peer: str, goal: Goal, *, recount: bool, why: str) -> fm.Copied:
        """Make the copy equal to ``peer``'s: by an exchange, or by a full copy when that is cheaper or the only way.

        Raises as `Exchanges.become_equal` and `Copier.run` do; then nothing changed, or a stage waits to be resumed.
        """
        if self._unreadable:
            return await self._copy(peer, f"the own file cannot be read: {self._unreadable}")
        channel = await self._reach(peer)
        try:
            result = await self._exchanges.become_equal(self.slot, peer, channel, goal, recount=recount)
        except errors.Error as error:
            if not unreadable(error):
                raise
            return await self._copy(peer, f"the own file cannot be read: {error.message}")
        if result.full_copy is not None:
            return await self._copy(peer, f"full copy: {result.full_copy.name.lower().replace('_', ' ')}", result)
        surplus = 0
        if recount:
            async with self.slot.writing:
                surplus = await asyncio.to_thread(remove_unreadable, self.slot.opened())
        self._note(result.path, why, result.records + surplus, result.bytes_moved, result.rounds)
        return fm.Copied(result.position, result.bytes_moved, result.path, result.reason)

    async def _copy(self, peer: str, why: str, tried: Result | None = None) -> fm.Copied:
        spent = 0 if tried is None else tried.bytes_moved
        copier = Copier(self.slot, self._name)
        position = await copier.run(await self._reach(peer), fm.Path.FULL)
        self._unreadable = ""
        moved = spent + copier.bytes_received
        self._note(fm.Path.FULL, why, position.count, moved, 0 if tried is None else tried.rounds)
        return fm.Copied(position, moved, fm.Path.FULL, why)

    def _note(self, path: fm.Path, why: str, records: int, moved: int, rounds: int) -> None:
        self.slot.health.repaired(Repair(self._clock.wall_ms() / 1000, path.value, why, records, moved, rounds))
        self._metrics.add("srengine_repair_copies_total", path=path.value)
        self._metrics.add("srengine_repair_records_total", records, kind=path.value)

    def met(self, error: errors.Error) -> None:
        """Take note of what a transaction or a read met: a damaged record, or a file that cannot be read."""
        if isinstance(error, errors.CorruptionError) and damaged_key(error) is not None:
            self.slot.health.damages += 1
            self.damaged(error.message)
        else:
            self.unreadable(error)

    def unreadable(self, error: errors.Error) -> None:
        """Take note that the file itself is damaged: the machine is told, and the repair will be a full copy."""
        self._unreadable = error.message
        self.slot.health.damages += 1
        self.damaged(error.message)

    # --- single records ----------------------------------------------------------------------------------------------

    async def heal(self, values: list[bytes], changes: list[bytes], why: str) -> bool:
        """Put damaged values right from other replicas, lost change entries from here; return whether all are."""
        spec = self.slot.spec
        done = 0
        if values:
            done += len(await heal_records(self.slot, values, self.sources(), self._reach, self._metrics))
        if changes:
            done += len(await heal_changes(self.slot, changes, self._metrics))
        if done:
            self._alarm("records_healed", f"{done} records of tablet {spec.tablet_id} of {spec.table} ({why})")
            self.slot.health.repaired(Repair(self._clock.wall_ms() / 1000, "record", why, done, 0))
        return done == len(values) + len(changes)

    async def sound(self, read: Callable[[], Found], *, inline: bool = False) -> Found:
        """Return what ``read`` finds; damaged records that it meets are healed from another replica first.

        ``inline``: the look-up is short, so it runs on the event loop. Raises `CorruptionError` when a record cannot be
        healed; an alarm names it then.
        """
        for _ in range(RECORDS_HEALED_MAX):
            try:
                return read() if inline else await asyncio.to_thread(read)
            except errors.Error as error:
                key = damaged_key(error) if isinstance(error, errors.CorruptionError) else None
                if key is None and not unreadable(error):
                    raise
                try:
                    if key is not None and await self.heal([key], [], "a read met it"):
                        self._metrics.add("srengine_read_repairs_total")
                        continue
                    await self._give_up(error)
                except errors.Error as worse:
                    if not unreadable(worse):
                        raise
                    self.unreadable(worse)
                    raise errors.NotReady(f"the copy is being repaired: {worse.message}") from worse
                raise
        return await asyncio.to_thread(read)

    async def _give_up(self, error: errors.Error) -> None:
        """Name what nobody could put right; the copy stands if its records still give the root, else it is repaired.

        Raises `NotReady` in that case: whoever reads comes again.
        """
        self._alarm("record_damaged", error.message)
        if unreadable(error):
            raise error
        self.slot.health.damages += 1
        proof = await self.prove()
        if not proof.whole:
            self.damaged(proof.reason)
            raise errors.NotReady(f"the copy is being repaired: {proof.reason}") from error
