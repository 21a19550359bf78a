"""All tablets of one node: opened as the catalog says, led or followed, found by id.

The node tells the service which tables exist (`open_tables`, after every change of the catalog) and hands it what
arrives on the ports: `pulled`, `fetched`, `copy_stream`. Clients' requests are routed by the node and land at `leader`
and `follower`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from srengine import errors, limits
from srengine.cluster.catalog import Table
from srengine.ha import leader_machine as lm
from srengine.ha.group import Surroundings
from srengine.ha.messages import Fetch, Pull, PullReply
from srengine.ha.metadata import Store as Rows
from srengine.metrics import Metrics
from srengine.storage import Store, Tablet
from srengine.storage.checking import sound_rows
from srengine.sync import agreeing, copying
from srengine.sync.exchange_messages import Reply, Request
from srengine.sync.exchanging import Answering, Exchanges, WarmLeaves
from srengine.sync.following import TabletFollower
from srengine.sync.leading import TabletLeader
from srengine.sync.messages import (
    CheckedKeys,
    CheckKeys,
    Compare,
    Compared,
    Copy,
    FetchRows,
    FoundRows,
    ReplicaState,
    RoundsReply,
    RunRound,
)
from srengine.sync.quarantine import Quarantine
from srengine.sync.scrubbing import DIFFERENT, ELSEWHERE, EQUAL, Scrubber
from srengine.sync.slots import FileIds, Slot, Spec, Standing


class SyncService:
    """The tablets of this node."""

    def __init__(
        self,
        *,
        around: Surroundings,
        store: Store,
        rows: Rows,
        standing: Standing,
        file_ids: FileIds,
        metrics: Metrics,
        directory_trusted: Callable[[], bool],
        scrub_bytes_s: int = limits.SCRUB_BYTES_S,
        scrub_interval_s: float = limits.SCRUB_INTERVAL_S,
    ) -> None:
        self.name = around.name
        self.leaders: dict[str, TabletLeader] = {}
        self.followers: dict[str, TabletFollower] = {}
        self._around = around
        self._store = store
        self._rows = rows
        self._standing = standing
        self._file_ids = file_ids
        self._contact = around.contact
        self._clock = around.clock
        self._alarm = around.alarm
        self._metrics = metrics
        self._directory_trusted = directory_trusted
        now = around.clock.monotonic_s
        self.quarantine = Quarantine(now, around.alarm)
        self._warm = WarmLeaves(now)
        self._exchanges = Exchanges(quarantine=self.quarantine, metrics=metrics, warm=self._warm, now=now)
        self._answering = Answering(metrics, self._warm)
        self.scrubber = Scrubber(
            lambda: [*self.leaders.values(), *self.followers.values()],
            name=around.name,
            bytes_s=scrub_bytes_s,
            interval_s=scrub_interval_s,
            reach=around.reach,
            clock=around.clock,
            metrics=metrics,
            warm=self._warm,
        )

    def start(self) -> None:
        """Begin to scrub."""
        self._around.spawn(self.scrubber.run(), "scrub")

    # --- the life of tablets -----------------------------------------------------------------------------------------

    async def open_tables(self, tables: Sequence[Table]) -> None:
        """Open every tablet that has a replica here and is not open yet."""
        wanted = [
            Spec(tablet.id, table.name, tablet.number, tablet.lineage, tablet.seed, tablet.nodes)
            for table in tables
            for tablet in table.tablets
            if self.name in tablet.nodes and tablet.id not in self.leaders and tablet.id not in self.followers
        ]
        slots = [
            Slot(
                spec,
                store=self._store,
                rows=self._rows,
                standing=self._standing,
                file_ids=self._file_ids,
                data=self._store.path,
            )
            for spec in wanted
        ]
        await asyncio.gather(*(asyncio.to_thread(slot.open) for slot in slots))
        # Copies that are what they were say so at once: until then a crash would make them look older than the
        # identity.
        await asyncio.gather(
            *(asyncio.to_thread(slot.stamp) for slot in slots if slot.trusted and slot.tablet is not None)
        )
        for slot in slots:
            self._begin(slot)

    def _begin(self, slot: Slot) -> None:
        group: TabletLeader | TabletFollower
        if slot.spec.leader == self.name:
            group = TabletLeader(
                slot,
                around=self._around,
                trusted=self._directory_trusted,
                exchanges=self._exchanges,
                metrics=self._metrics,
            )
            self.leaders[slot.spec.tablet_id] = group
        else:
            group = TabletFollower(
                slot,
                around=self._around,
                trusted=self._directory_trusted,
                exchanges=self._exchanges,
                metrics=self._metrics,
            )
            self.followers[slot.spec.tablet_id] = group
        if slot.fault:
            self._alarm("tablet_failed", f"tablet {slot.spec.tablet_id} of {slot.spec.table}: {slot.fault}")
        elif not slot.trusted:
            self._alarm(
                "tablet_untrusted",
                f"tablet {slot.spec.tablet_id} of {slot.spec.table} was wiped or restored: it counts for nothing "
                f"until it is proved (stands at {slot.position.sequence})",
            )
        group.start()

    def distrust(self, reason: str) -> None:
        """Take note that the directory turned out to be an older state."""
        for leader in self.leaders.values():
            leader.distrust(reason)
        for follower in self.followers.values():
            follower.distrust(reason)

    def close(self) -> None:
        """Stop all groups; the store is closed by its owner."""
        for leader in self.leaders.values():
            leader.close()
        for follower in self.followers.values():
            follower.close()

    @property
    def serving(self) -> bool:
        """Whether every tablet that this node leads is served."""
        return all(leader.driver.machine.serving for leader in self.leaders.values())

    # --- what arrives ------------------------------------------------------------------------------------------------

    def slot(self, tablet_id: str) -> Slot | None:
        """Return the copy that this node has of a tablet."""
        group = self.leaders.get(tablet_id) or self.followers.get(tablet_id)
        return None if group is None else group.slot

    async def pulled(self, pull: Pull) -> copying.Rows:
        """Answer a replica's question; it was judged already."""
        leader = self.leaders.get(pull.group)
        if leader is None:
            raise errors.NotReady(f"{self.name} does not lead tablet {pull.group[:64]} (yet)")
        rows = await leader.answer(pull)
        sent = sum(len(attachment) for attachment in rows.attachments)
        if sent:
            self._metrics.add("srengine_sync_delta_sent_bytes_total", sent)
        return rows

    async def fetched(self, fetch: Fetch) -> copying.Rows:
        """Answer a leader that recovers."""
        slot = self.slot(fetch.group)
        if slot is None:
            raise errors.NotReady(f"{self.name} has no replica of tablet {fetch.group[:64]} (yet)")
        if fetch.filling:
            reply = PullReply("copy", slot.position, self._contact.process_id, reason="half copied")
            return copying.Rows(reply)
        return await asyncio.to_thread(copying.rows_after, slot.opened(), fetch.position, self._contact.process_id)

    async def copy_stream(self, request: Copy) -> AsyncGenerator[bytes, None]:
        """Yield the items of a snapshot."""
        items = copying.stream_copy(self._right(request.tablet), request)
        try:
            async for item in items:
                self._metrics.add("srengine_sync_copy_sent_bytes_total", len(item))
                yield item
        finally:
            await items.aclose()

    def _right(self, tablet_id: str) -> Tablet:
        """Return a copy that others may be made equal to; `NotReady` for one that is in doubt or half applied."""
        group = self.leaders.get(tablet_id) or self.followers.get(tablet_id)
        if group is None:
            raise errors.NotReady(f"{self.name} has no replica of tablet {tablet_id[:64]} (yet)")
        if not group.right:
            machine = group.driver.machine
            why = machine.why_not_serving() if isinstance(machine, lm.LeaderMachine) else machine.halted
            raise errors.NotReady(f"the copy on {self.name} is no source now: {why or 'it is being changed'}")
        return group.slot.opened()

    async def exchanged(
        self, peer: str, request: Request, attachments: Sequence[memoryview]
    ) -> tuple[Reply, tuple[bytes, ...]]:
        """Answer a request of an exchange."""
        self.quarantine.check(peer)
        return await self._answering.answer(self._right(request.tablet), request, attachments)

    async def rows_fetched(self, message: FetchRows) -> tuple[FoundRows, bytes]:
        """Answer with the sound records of some keys."""
        if len(message.keys) > limits.FETCH_ROWS_KEYS_MAX:
            raise errors.FrameError(f"{len(message.keys)} keys are more than {limits.FETCH_ROWS_KEYS_MAX}")
        slot = self.slot(message.tablet)
        if slot is None or slot.filling:
            raise errors.NotReady(f"{self.name} has no whole replica of tablet {message.tablet[:64]} (yet)")
        # NB: also from a copy in doubt: the asking side takes only rows with the digest that it knows.
        rows, count = await asyncio.to_thread(
            sound_rows, slot.opened(), message.keys, bytes_max=limits.FETCH_ROWS_BYTES_MAX
        )
        return FoundRows(count), rows

    async def keys_checked(self, message: CheckKeys) -> CheckedKeys:
        """Read keys for a leader's look-up at `all`."""
        follower = self.followers.get(message.tablet)
        if follower is None:
            raise errors.NotReady(f"{self.name} does not follow tablet {message.tablet[:64]} (yet)")
        return await agreeing.checked(follower, message)

    async def compared(self, message: Compare) -> Compared:
        """Say whether this node's copy stands where the asking one does; `FrameError` for a malformed question."""
        if len(message.body) != 32:
            raise errors.FrameError(f"a comparison has 32 bytes, not {len(message.body)}")
        tablet = self._right(message.tablet)
        if tablet.stands_at(message.body):
            return Compared(EQUAL)
        sequence = int.from_bytes(message.body[24:], "little")
        return Compared(DIFFERENT if tablet.position.sequence == sequence else ELSEWHERE)

    async def rounds(self, message: RunRound) -> RoundsReply:
        """Check, compare and repair the replicas of this node now, one after the other."""
        groups: list[TabletLeader | TabletFollower] = [*self.leaders.values(), *self.followers.values()]
        chosen = [group for group in groups if not message.table or group.slot.spec.table == message.table]
        chosen.sort(key=lambda group: (group.slot.spec.table, group.slot.spec.number))
        deadline = self._clock.monotonic_s() + message.timeout_s
        rounds = [
            await self.scrubber.round(group, max(0.001, deadline - self._clock.monotonic_s())) for group in chosen
        ]
        return RoundsReply(tuple(rounds))

    # --- status ------------------------------------------------------------------------------------------------------

    def states(self, table: str = "") -> list[ReplicaState]:
        """Return the state of every replica on this node (of one table)."""
        groups: list[TabletLeader | TabletFollower] = [*self.leaders.values(), *self.followers.values()]
        chosen = [group for group in groups if not table or group.slot.spec.table == table]
        chosen.sort(key=lambda group: (group.slot.spec.table, group.slot.spec.number))
        return [self._led(group) if isinstance(group, TabletLeader) else self._followed(group) for group in chosen]

    def _led(self, leader: TabletLeader) -> ReplicaState:
        slot, machine = leader.slot, leader.driver.machine
        serving = machine.serving
        repair = slot.health.last
        path, moved = ("log", 0) if not leader.recovered_from else ("delta", 0)
        if repair is not None and repair.path != "record":
            path, moved = repair.path, repair.bytes_moved
        return ReplicaState(
            table=slot.spec.table,
            tablet=slot.spec.tablet_id,
            number=slot.spec.number,
            node=self.name,
            leader=slot.spec.leader,
            state="SYNCED" if serving else "SYNCING",
            sequence=slot.position.sequence,
            behind=0,
            root=slot.position.root,
            count=slot.position.count,
            live_count=0 if slot.tablet is None else slot.tablet.live_count,
            verified_at=self._clock.wall_ms() / 1000 if serving else 0.0,
            bytes_received=moved,
            bytes_received_total=moved,
            path=path,
            reason=_faults(leader) or ("leads" if serving else machine.why_not_serving()),
            trusted=slot.trusted,
            **self._health(slot),
        )

    def _health(self, slot: Slot) -> dict[str, Any]:
        out = tuple(peer for peer in self.quarantine.out if peer in slot.spec.nodes)
        health = slot.health
        return {
            "scrubbed_at": health.scrubbed_at,
            "scrub_records": health.records,
            "repairs": health.repairs,
            "quarantined": out,
        }

    def _followed(self, follower: TabletFollower) -> ReplicaState:
        slot, machine = follower.slot, follower.driver.machine
        return ReplicaState(
            table=slot.spec.table,
            tablet=slot.spec.tablet_id,
            number=slot.spec.number,
            node=self.name,
            leader=slot.spec.leader,
            state=machine.replica_state(self._clock.boottime_s()).value,
            sequence=slot.position.sequence,
            behind=machine.behind,
            root=slot.position.root,
            count=slot.position.count,
            live_count=0 if slot.tablet is None else slot.tablet.live_count,
            verified_at=follower.verified_at,
            bytes_received=machine.catch_up.bytes_received,
            bytes_received_total=machine.bytes_received_total,
            path=machine.catch_up.path.value,
            reason=machine.halted or slot.fault or machine.catch_up.reason,
            trusted=slot.trusted,
            **self._health(slot),
        )


def _faults(leader: TabletLeader) -> str:
    return "; ".join(progress.fault for progress in leader.driver.machine.progress.values() if progress.fault)
