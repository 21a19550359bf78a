"""A backend of another package, for the contract suite: coordination by one object in this process, the `World`.

It is what a third party has to write at least: who leads, a journal, members, all by the pieces that srengine offers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque

import msgspec

from srengine import errors, limits
from srengine.ha import members as m
from srengine.ha.backends import Surroundings
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.fencing import fence
from srengine.ha.journal import Command
from srengine.ha.membership import is_membership, plan
from srengine.ha.metadata import Applying
from srengine.ha.outcomes import find_outcome
from srengine.ha.protocol import Acknowledge, Fencing, Observed, Role
from srengine.ha.quorum import majority


class World:
    """The journal, and the nodes that run."""

    def __init__(self, first: Command) -> None:
        self.journal: list[Applying] = [Applying(1, 1, first, in_force=True)]
        self.nodes: dict[str, Backend] = {}
        self.term = 1
        self.leader: str | None = None
        self.changed = asyncio.Condition()
        self.tasks: set[asyncio.Task] = set()

    def newest(self) -> Backend | None:
        return next(iter(self.nodes.values()), None)

    def voters(self) -> list[str]:
        node = self.newest()
        return [] if node is None else [row.node_id for row in m.read_members(node.store) if row.votes]

    def elect(self, *, but: str | None = None) -> None:
        """Choose a leader if a majority runs and there is none."""
        voters = self.voters()
        running = [voter for voter in voters if voter in self.nodes]
        if not voters or len(running) < majority(len(voters)):
            self.leader = None
        elif self.leader not in running:
            others = [voter for voter in running if voter != but] or running
            self.term += 1
            self.leader = others[self.term % len(others)]
        self.tell()

    def tell(self) -> None:
        for node in self.nodes.values():
            node.look()

        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        task = asyncio.ensure_future(notify())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def append(self, command: Command, *, in_force: bool) -> int:
        """Add an entry, and have every node apply it."""
        self.journal.append(Applying(len(self.journal) + 1, self.term, command, in_force))
        for node in list(self.nodes.values()):
            node.catch_up()
        self.elect()
        asyncio.get_running_loop().call_soon(self.promote)
        return len(self.journal)

    def promote(self) -> None:
        """Make nodes stable that run: they have applied everything."""
        leader = self.nodes.get(self.leader or "")
        if leader is None or leader.epoch == 0:
            return
        for row in m.read_members(leader.store):
            if row.role == "follower" and not row.stable and row.node_id in self.nodes:
                body = msgspec.msgpack.encode(m.SetStable(row.name, row.node_id, stable=True))
                leader.decide(Command(m.SET_STABLE, body, request=secrets.token_bytes(16)), force=False)
                return


class Backend:
    """See `srengine.ha.protocol.HAProtocol`."""

    backend = "toy"

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.store = around.machine.store
        self.world: World = around.options.settings["world"]
        self.own = (0, 0)
        self.observed = Observed(Role.INIT, None, 0, "started")
        self.watchers: list[tuple[deque[Observed], asyncio.Event]] = []
        self.stopped = False
        self.removed: m.RemovedMember | None = None

    async def start(self) -> None:
        self.catch_up()
        if self.removed is None:
            self.world.nodes[self.around.node_id] = self
        self.world.elect()
        self.world.promote()

    async def stop(self) -> None:
        if self.stopped:
            return
        self.stopped = True
        self.world.nodes.pop(self.around.node_id, None)
        self.world.elect()
        for _, wake in self.watchers:
            wake.set()

    def catch_up(self) -> None:
        for entry in self.world.journal[self.around.machine.applied_index :]:
            self.around.machine.apply_all([entry])
        self.removed = self.removed or m.find_removed(self.store, self.around.node_id)
        if self.removed is not None and self.world.nodes.pop(self.around.node_id, None) is not None:
            self.around.alarm("removed", f"in epoch {self.removed.epoch}")
            self.look()
        elif self.removed is not None:
            self.around.alarm("removed", f"in epoch {self.removed.epoch}")

    # --- the election ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        world, leader = self.world, self.world.leader
        row = next((row for row in m.read_members(self.store) if row.node_id == self.around.node_id), None)
        if leader is None or self.removed is not None:
            now = Observed(Role.UNKNOWN, None, world.term, "nobody leads")
        elif leader == self.around.node_id:
            now = Observed(Role.LEADER, self.around.name, world.term, "chosen")
        else:
            role = Role.OBSERVER if row is not None and row.role == "observer" else Role.FOLLOWER
            now = Observed(role, self.name_of(leader), world.term, "another one was chosen")
        if {now.role, self.observed.role} == {Role.FOLLOWER, Role.OBSERVER}:
            self.say(Observed(Role.UNKNOWN, None, world.term, "another role"))
        if (now.role, now.leader, now.term) != (self.observed.role, self.observed.leader, self.observed.term):
            self.say(now)

    def say(self, now: Observed) -> None:
        self.observed = now
        for waiting, wake in self.watchers:
            waiting.append(now)
            wake.set()

    async def observe(self):
        waiting, wake = watcher = (deque([self.observed]), asyncio.Event())
        self.watchers.append(watcher)
        try:
            while not self.stopped:
                while waiting:
                    yield waiting.popleft()
                wake.clear()
                await wake.wait()
            raise errors.Closed("the node stops")
        finally:
            self.watchers.remove(watcher)

    @property
    def epoch(self) -> int:
        leads = self.world.leader == self.around.node_id and self.world.term == self.own[1]
        return self.own[0] if leads and not self.stopped else 0

    async def fencing(self) -> bool:
        return await fence(self.try_fence, self.around.options.fencing, metrics=self.around.metrics)

    async def try_fence(self) -> Fencing:
        world = self.world
        if world.leader != self.around.node_id:
            raise errors.NotLeader("another one leads", leader="")
        newest = read_epoch(self.store, newest_epoch(self.store)[0])
        if newest is None or (newest.node_id, newest.term) != (self.around.node_id, world.term):
            request = secrets.token_bytes(16)
            made = claim(self.store, node_id=self.around.node_id, name=self.around.name, term=world.term)
            world.append(msgspec.structs.replace(made, request=request), in_force=False)
            if find_outcome(self.store, request).refusal is not None:
                return Fencing.KEYEXIST
        self.own = (newest_epoch(self.store)[0], world.term)
        world.tell()
        return Fencing.SUCCESS

    async def resign(self, reason: str) -> None:
        if self.world.leader == self.around.node_id:
            self.world.leader = None
            self.world.tell()
            self.world.elect(but=self.around.node_id)

    def name_of(self, node_id: str) -> str:
        return next(row.name for row in m.read_members(self.store) if row.node_id == node_id)

    def usable(self) -> None:
        if self.stopped:
            raise errors.Closed("the node stops")
        if self.removed is not None:
            raise m.was_removed(self.removed)

    async def get_leader_name(self) -> str:
        self.usable()
        if self.world.leader is None:
            raise errors.UnknownMaster("nobody leads")
        return self.name_of(self.world.leader)

    async def get_leader(self) -> str:
        return m.find_member(self.store, await self.get_leader_name()).address

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        self.usable()
        rows = [row for row in m.read_members(self.store) if row.votes]
        return sorted(row.name for row in rows if include_leader or row.node_id != self.world.leader)

    async def get_observer_nodes(self) -> list[str]:
        self.usable()
        return sorted(row.name for row in m.read_members(self.store) if row.role == "observer")

    async def get_latest_epoch(self) -> int:
        await self.read_barrier()
        return newest_epoch(self.store)[0]

    # --- the journal -------------------------------------------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        return self.around.machine.applied_index

    @property
    def current(self) -> bool:
        return self.world.leader is not None and not self.stopped and self.removed is None

    async def acting(self, timeout_s: float) -> Backend:
        """Return the leader that has an epoch."""
        world = self.world

        def found() -> Backend | None:
            node = world.nodes.get(world.leader or "")
            return node if node is not None and node.epoch else None

        try:
            async with asyncio.timeout(timeout_s), world.changed:
                await world.changed.wait_for(lambda: found() is not None or self.stopped or self.removed is not None)
        except TimeoutError:
            raise errors.UnknownMaster("nobody leads") from None
        self.usable()
        return found()

    async def propose(
        self,
        command: Command,
        *,
        timeout_s: float = 10.0,
        acknowledge: Acknowledge = Acknowledge.MAJORITY,
        force: bool = False,
    ) -> int:
        self.usable()
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX:
            raise errors.InvalidValue("a command that is too large")
        if not command.request:
            command = msgspec.structs.replace(command, request=secrets.token_bytes(16))
        leader = await self.acting(timeout_s)
        return leader.decide(command, force=force)

    def decide(self, command: Command, *, force: bool) -> int:
        world = self.world
        stamped = command if command.epoch else msgspec.structs.replace(command, epoch=self.epoch)
        in_force = False
        if is_membership(command.kind) and find_outcome(self.store, command.request) is None:
            planned = plan(
                self.store,
                command,
                index=self.applied_index + 1,
                leader=self.around.node_id,
                alive=list(world.nodes),
                force=force,
            )
            in_force = planned.configuration is not None
        world.append(stamped, in_force=in_force)
        outcome = find_outcome(self.store, command.request)
        if outcome is None:
            raise errors.StaleEpoch("the epoch is another one")
        if outcome.refusal is not None:
            raise outcome.refusal
        return outcome.index

    async def read_barrier(self, *, timeout_s: float = 10.0) -> int:
        await self.acting(timeout_s)
        return self.applied_index

    async def subscribe(self, from_index: int):
        index = max(1, from_index)
        while True:
            async with self.world.changed:
                await self.world.changed.wait_for(lambda at=index: self.applied_index >= at or self.stopped)
            if self.stopped:
                raise errors.Closed("the node stops")
            yield index, self.world.journal[index - 1].command
            index += 1

    # --- members -----------------------------------------------------------------------------------------------------

    async def change(self, kind: str, body: msgspec.Struct, *, force: bool = False) -> None:
        await self.propose(Command(kind, msgspec.msgpack.encode(body)), force=force)

    def member(self, name: str) -> m.Member:
        self.usable()
        row = m.find_member(self.store, name)
        if row is None:
            raise errors.MemberNotFound(f"{name} is no member")
        return row

    async def add_node(
        self, name: str, node_id: str, address: str, *, role="follower", public_key: str = "", ticket: bytes = b""
    ) -> None:
        holders = [row for row in m.read_members(self.store) if row.name == name or row.address == address]
        replaces = m.Holder(holders[0].node_id, holders[0].incarnation) if holders else None
        await asyncio.sleep(0)
        await self.change(m.ADD, m.AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        await self.change(m.REMOVE, m.RemoveMember(name, self.member(name).node_id), force=force)

    async def set_role(self, name: str, role, *, force: bool = False) -> None:
        await self.change(m.SET_ROLE, m.SetRole(name, self.member(name).node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        await self.change(m.UPDATE_ADDRESS, m.UpdateAddress(name, self.member(name).node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        await self.change(m.SET_STABLE, m.SetStable(name, self.member(name).node_id, stable=False))

    async def remove_unstable_node(self, name: str) -> None:
        row = self.member(name)
        if row.node_id not in self.world.nodes:
            raise errors.NotReady(f"{name} has not caught up")
        await self.change(m.SET_STABLE, m.SetStable(name, row.node_id, stable=True))

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        world = self.world
        leader = await self.acting(timeout_s)
        others = [voter for voter in world.voters() if voter in world.nodes and voter != leader.around.node_id]
        wanted = self.member(target).node_id if target is not None else next(iter(others), None)
        if wanted != world.leader:
            if wanted not in others:
                raise errors.MasterState("the leadership stays")
            world.term += 1
            world.leader = wanted
            world.tell()
        return self.name_of(wanted)
