"""Read what nobody asks for: a walk over all records of each copy at a bounded rate, and what to do with what it finds.

::

    for each tablet, once in an interval:
        slices in key order: checksums of records, change entry of each    (a short view and a thread for each slice)
        all records in one view: do they give root and counts?             (no rate: a few tens of nanoseconds a record)
        damaged values, lost change entries -> healed one by one
        anything else                       -> the machine is told; it proves and repairs the copy by an exchange

`round` is the same at full speed, at a person's request, followed by a comparison with the leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from srengine import errors, limits
from srengine.clock import Clock
from srengine.ha.contact import Reach
from srengine.metrics import Metrics
from srengine.storage.checking import CHANGE, RECORD, CheckedSlice, Proof, check_slice, unreadable
from srengine.sync.exchange_messages import encode_compare
from srengine.sync.exchanging import WarmLeaves
from srengine.sync.following import TabletFollower
from srengine.sync.leading import TabletLeader
from srengine.sync.messages import Compare, Compared, Round

Group = TabletLeader | TabletFollower
COMPARE_TIMEOUT_S: Final = 10.0
EQUAL: Final = b"\x00"
DIFFERENT: Final = b"\x01"
ELSEWHERE: Final = b"\x02"
COMPARE_ATTEMPTS_MAX: Final = 20
"""Comparisons of a round that meet the leader at another sequence before it says so."""


@dataclass(slots=True)
class Found:
    """What one pass found. ``whole``: the records give the root, damaged values aside."""

    records: int = 0
    values: list[bytes] = field(default_factory=list)
    changes: list[bytes] = field(default_factory=list)
    whole: bool = True
    reason: str = ""

    @property
    def damages(self) -> int:
        """How many damages."""
        return len(self.values) + len(self.changes) + (not self.whole)


class Scrubber:
    """Scrubs the copies of one node, one after the other.

    ``groups()``: the tablets of now. ``bytes_s``: how much is read a second, 0: nothing is read unasked. ``pause(s)``:
    lets so many seconds pass.
    """

    def __init__(
        self,
        groups: Callable[[], Sequence[Group]],
        *,
        name: str,
        bytes_s: int,
        interval_s: float,
        reach: Reach,
        clock: Clock,
        metrics: Metrics,
        warm: WarmLeaves,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pause = pause
        self._groups = groups
        self._name = name
        self._bytes_s = bytes_s
        self._interval_s = interval_s
        self._reach = reach
        self._clock = clock
        self._metrics = metrics
        self._warm = warm
        self._scrubbed: dict[str, float] = {}
        self._begun = clock.monotonic_s()

    # --- unasked -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Scrub whatever is due, until cancelled."""
        while True:
            await self._warm.expire()
            group = self._due()
            if group is None:
                await self._pause(min(1.0, self._interval_s))
                continue
            self._scrubbed[group.slot.spec.tablet_id] = self._clock.monotonic_s()
            try:
                await self.scrub(group, bytes_s=self._bytes_s)
            except errors.Error as error:
                self._metrics.add("srengine_scrub_errors_total", kind=error.code)

    def _due(self) -> Group | None:
        if not self._bytes_s:
            return None
        now = self._clock.monotonic_s()
        first = self._begun + min(self._interval_s, limits.SCRUB_START_S) - self._interval_s
        due = [
            (self._scrubbed.get(group.slot.spec.tablet_id, first), group.slot.spec.tablet_id, group)
            for group in self._groups()
            if not group.slot.filling
        ]
        due.sort(key=lambda item: item[:2])
        return due[0][2] if due and now - due[0][0] >= self._interval_s else None

    # --- one pass ----------------------------------------------------------------------------------------------------

    async def scrub(self, group: Group, *, bytes_s: int) -> Found:
        """Read a copy whole; have what is wrong put right. ``bytes_s`` 0: as fast as it goes.

        Raises `NotReady` (there is no copy, or it is being replaced), `ViewExpired`.
        """
        slot = group.slot
        if slot.filling:
            raise errors.NotReady(f"tablet {slot.spec.tablet_id} is half copied")
        found = Found()
        try:
            await self._walk(group, found, bytes_s)
            proof = await group.keeper.prove()
        except errors.Error as error:
            if not unreadable(error):
                raise
            found.whole, found.reason = False, error.message
            group.keeper.unreadable(error)
            self._metrics.add("srengine_scrub_damages_total", kind="page")
            return found
        finally:
            tablet = slot.tablet
            if tablet is not None and tablet not in self._warm and not tablet.closed:
                await asyncio.to_thread(tablet.leaves.drop)
        await self._act(group, found, proof)
        self._metrics.add("srengine_scrub_passes_total")
        return found

    async def _walk(self, group: Group, found: Found, bytes_s: int) -> None:
        health = group.slot.health
        after: bytes | None = None
        done = False
        while not done:
            # A pass may take hours.
            await self._warm.expire()
            piece = await self._piece(group, after, bytes_s)
            after, done = piece.after, piece.done
            found.records += piece.records
            health.records = found.records
            found.values += [key for kind, key in piece.damages if kind == RECORD]
            found.changes += [key for kind, key in piece.damages if kind == CHANGE]
            if len(found.values) + len(found.changes) > limits.SCRUB_DAMAGES_MAX:
                raise errors.CorruptionError(f"more than {limits.SCRUB_DAMAGES_MAX} records are damaged")

    async def _piece(self, group: Group, after: bytes | None, bytes_s: int) -> CheckedSlice:
        begun = self._clock.monotonic_s()
        piece = await asyncio.to_thread(check_slice, group.slot.opened(), after, bytes_max=limits.SCRUB_SLICE_BYTES)
        self._metrics.add("srengine_scrub_records_total", piece.records)
        self._metrics.add("srengine_scrub_bytes_total", piece.size)
        if bytes_s:
            left = piece.size / bytes_s - (self._clock.monotonic_s() - begun)
            if left > 0:
                await self._pause(left)
        return piece

    async def _act(self, group: Group, found: Found, proof: Proof) -> None:
        health = group.slot.health
        found.whole, found.reason = proof.whole, proof.reason
        health.damages += found.damages
        for kind, count in (
            ("value", len(found.values)),
            ("change", len(found.changes)),
            ("root", int(not proof.whole)),
        ):
            if count:
                self._metrics.add("srengine_scrub_damages_total", count, kind=kind)
        if not proof.whole:
            # Values whose headers cannot be read are among the damaged ones, too: the exchange brings them.
            group.damaged(proof.reason)
            return
        if (found.values or found.changes) and not await group.keeper.heal(found.values, found.changes, "a scrub"):
            found.reason = "a damaged record could not be healed from any replica"
            return
        health.scrubbed_at = self._clock.wall_ms() / 1000

    # --- asked for ---------------------------------------------------------------------------------------------------

    async def round(self, group: Group, timeout_s: float) -> Round:
        """Scrub a copy at full speed, have it repaired, compare it with its leader; return what that did."""
        spec, health = group.slot.spec, group.slot.health
        before = health.repairs
        found = Found()
        outcome, reason = "equal", ""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self.scrub(group, bytes_s=0)
                reason = found.reason
                if not found.whole:
                    await self._repaired(group, before)
                    outcome = "repaired"
                elif found.damages:
                    outcome = "damaged" if found.reason else "healed"
                if isinstance(group, TabletFollower):
                    outcome, reason = await self._compared(group, outcome, reason)
        except TimeoutError:
            outcome, reason = "timed out", f"not over in {timeout_s:g} s; {reason}".rstrip("; ")
        except errors.Error as error:
            outcome, reason = "failed", f"{error.code}: {error.message}"
        repair = health.last if health.repairs > before else None
        return Round(
            table=spec.table,
            tablet=spec.number,
            tablet_id=spec.tablet_id,
            node=self._name,
            leader=spec.leader,
            outcome=outcome,
            records=found.records,
            damages=found.damages,
            repaired=0 if repair is None else repair.records,
            bytes=0 if repair is None else repair.bytes_moved,
            rounds=0 if repair is None else repair.rounds,
            path="" if repair is None else repair.path,
            reason=reason,
        )

    async def _repaired(self, group: Group, before: int) -> None:
        """Return when the machine has had the copy repaired."""
        while group.slot.health.repairs == before or not group.right:
            await group.changed()

    async def _compared(self, group: TabletFollower, outcome: str, reason: str) -> tuple[str, str]:
        """Compare root, count and sequence with the leader's; wait for a repair when they differ at one sequence."""
        before = group.slot.health.repairs
        for _ in range(COMPARE_ATTEMPTS_MAX):
            position = group.slot.position
            body = encode_compare(position.root, position.count, position.sequence)
            channel = await self._reach(group.slot.spec.leader)
            reply, _ = await channel.request(Compare(group.slot.spec.tablet_id, body), timeout_s=COMPARE_TIMEOUT_S)
            if not isinstance(reply, Compared):
                raise errors.FrameError(f"a comparison was answered with {type(reply).__name__}")
            self._metrics.add("srengine_sync_comparisons_total", outcome=reply.body.hex())
            if reply.body == EQUAL:
                group.slot.health.scrubbed_at = self._clock.wall_ms() / 1000
                return outcome, reason
            if reply.body == DIFFERENT:
                # The next acknowledgement shows it to the leader, which decides who is wrong.
                await self._repaired(group, before)
                return "repaired", "another root at one sequence"
            # One of the two is ahead for a moment; only equal sequences say anything.
            await group.changed()
        return "moving" if outcome == "equal" else outcome, "writes never let both stand at one sequence"
