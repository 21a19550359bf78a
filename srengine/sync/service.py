"""All tablets of one node: opened as the catalog says, led or followed, found by id.

The node tells the service which tables exist (`open_tables`, after every change of the catalog) and hands it what
arrives on the ports: `pulled`, `fetched`, `copy_stream`. Clients' requests are routed by the node and land at `leader`
and `follower`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from srengine import errors
from srengine.cluster.catalog import Table
from srengine.ha.group import Surroundings
from srengine.ha.messages import Fetch, Pull, PullReply
from srengine.ha.metadata import Store as Rows
from srengine.metrics import Metrics
from srengine.storage import Store
from srengine.sync import copying
from srengine.sync.following import TabletFollower
from srengine.sync.leading import TabletLeader
from srengine.sync.messages import Copy, ReplicaState
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
            group = TabletLeader(slot, around=self._around, trusted=self._directory_trusted)
            self.leaders[slot.spec.tablet_id] = group
        else:
            group = TabletFollower(slot, around=self._around, trusted=self._directory_trusted)
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
        slot = self.slot(request.tablet)
        if slot is None:
            raise errors.NotReady(f"{self.name} has no replica of tablet {request.tablet[:64]} (yet)")
        leader = self.leaders.get(request.tablet)
        if leader is not None and not leader.driver.machine.serving:
            raise errors.NotReady(leader.driver.machine.why_not_serving())
        items = copying.stream_copy(slot.opened(), request)
        try:
            async for item in items:
                self._metrics.add("srengine_sync_copy_sent_bytes_total", len(item))
                yield item
        finally:
            await items.aclose()

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
            path="log" if not leader.recovered_from else "delta",
            reason=_faults(leader) or ("leads" if serving else machine.why_not_serving()),
            trusted=slot.trusted,
        )

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
        )


def _faults(leader: TabletLeader) -> str:
    return "; ".join(progress.fault for progress in leader.driver.machine.progress.values() if progress.fault)
