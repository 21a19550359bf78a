"""Where this node stands: what the election says and what the applied rows say, together.

`Standing` hears of every change of role from the driver and of every applied batch, tells whoever watches
(`HAProtocol.observe`), and answers who leads and who belongs. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from srengine import errors
from srengine.consensus import effects
from srengine.ha import members as m
from srengine.ha.backends import Surroundings
from srengine.ha.membership import group_size
from srengine.ha.protocol import Observed, Role
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

VOTERS_MIN: Final = 3
"""With fewer, the loss of one node is the loss of the majority (or of everything)."""
OBSERVED_MAX: Final = 4096
"""Changes that one reader of `observe` may lag behind; the oldest are left out then."""


class Standing:
    """Fields that others read: ``role`` (of the group, as the driver said last), ``members`` (by id, those that have
    one, as applied), ``removed`` (this node's own removal), ``observed``.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._store = around.machine.store
        self.role = effects.RoleChanged(effects.Role.FOLLOWER, 0, None, "not started")
        self.members: dict[NodeId, m.Member] = {}
        self.removed: m.RemovedMember | None = None
        self.observed = Observed(Role.INIT, None, 0, "started")
        self.changed = Bell()
        """Rings after every change of role and every applied batch."""
        self.stopped = False
        self._applied: Callable[[], int] = _nothing_applied
        self._membership: bytes | None = b""
        """Row of the membership that ``members`` shows; not one of any before the first look."""
        self._heard = False
        """Whether a leader was ever known in this run."""
        self._watchers: list[_Watcher] = []

    def begin(self, applied: Callable[[], int]) -> None:
        """Read the rows; ``applied()``: the applied index."""
        self._applied = applied
        self.read_rows()

    async def stop(self) -> None:
        """Let everybody go who waits."""
        self.stopped = True
        for watcher in self._watchers:
            watcher.wake.set()
        self.changed.ring()

    # --- hearing -----------------------------------------------------------------------------------------------------

    def on_role(self, role: effects.RoleChanged) -> None:
        """Take a change of the group's role, as `Driver.watch_roles` tells it."""
        self.role = role
        self._heard = self._heard or role.leader is not None
        self._look(role.reason)
        self.notify()

    def on_applied(self, index: int) -> None:
        """Take note that a batch was applied up to ``index``."""
        del index
        if self.read_rows():
            self._look("membership")
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.ring()

    def read_rows(self) -> bool:
        """Learn what was applied of members: names and addresses, and whether this node is one; return whether that is
        another membership than at the last look.
        """
        around = self._around
        membership = m.membership_row(self._store)
        if membership == self._membership:
            return False
        self._membership = membership
        before, self.members = self.members, {}
        for member in m.read_members(self._store):
            if not member.node_id:
                continue
            node_id = NodeId(member.node_id)
            self.members[node_id] = member
            if node_id != around.node_id and before.get(node_id) != member:
                around.wire.know(node_id, member.name, member.address, member.public_key)
        for node_id in before.keys() - self.members.keys():
            if node_id != around.node_id:
                around.wire.forget(node_id)
        self._measure()
        if self.removed is None:
            removed = m.find_removed(self._store, around.node_id)
            if removed is not None:
                self.become_removed(removed)
        return True

    def read_again(self) -> None:
        """Read the rows whatever their version says: they were replaced."""
        self._membership = b""
        self.on_applied(self._applied())

    def _measure(self) -> None:
        size = group_size(list(self.members.values()))
        for what, count in size._asdict().items():
            self._around.metrics.set("srengine_ha_members", count, what=what)
        if 0 < size.voters < VOTERS_MIN:
            _logger.warning(
                "only %d nodes are electable: with fewer than %d no node may fail",
                size.voters,
                VOTERS_MIN,
                extra={"event": "few_electable", "voters": size.voters},
            )

    def become_removed(self, row: m.RemovedMember) -> None:
        """Take note that this node belongs to the cluster no more."""
        if self.removed is None:
            self.removed = row
            _logger.error(
                "this node was removed in epoch %d",
                row.epoch,
                extra={"event": "removed", "epoch": row.epoch, "index": row.index},
            )
            self._around.alarm("removed", f"this node was removed from the cluster in epoch {row.epoch}")
            self._look("removed")
            self.notify()

    def _look(self, reason: str) -> None:
        """Tell those who watch, when what the election and the rows say together is something else than before."""
        role, leader = self.role, self.name_of(self.role.leader)
        own = self.members.get(self._around.node_id)
        if self.removed is not None:
            now = Observed(Role.UNKNOWN, None, role.term, f"removed in epoch {self.removed.epoch}")
        elif role.role is effects.Role.LEADER:
            now = Observed(Role.LEADER, self._around.name, role.term, reason)
        elif leader is None or role.role is effects.Role.CANDIDATE:
            now = Observed(Role.UNKNOWN if self._heard else Role.INIT, None, role.term, reason)
        elif own is not None and own.role == "observer":
            now = Observed(Role.OBSERVER, leader, role.term, reason)
        else:
            now = Observed(Role.FOLLOWER, leader, role.term, reason)
        last = self.observed
        if (now.role, now.leader, now.term) == (last.role, last.leader, last.term):
            return
        if {now.role, last.role} == {Role.OBSERVER, Role.FOLLOWER} or (last.role, now.role) == (
            Role.OBSERVER,
            Role.LEADER,
        ):
            self._tell(Observed(Role.UNKNOWN, None, now.term, "the role of this node changed"))
        self._tell(now)

    def _tell(self, now: Observed) -> None:
        self.observed = now
        for watcher in self._watchers:
            watcher.tell(now)

    # --- telling -----------------------------------------------------------------------------------------------------

    async def observe(self) -> AsyncIterator[Observed]:
        """See `HAProtocol.observe`."""
        watcher = _Watcher(self.observed)
        self._watchers.append(watcher)
        try:
            while not self.stopped:
                while watcher.waiting:
                    yield watcher.waiting.popleft()
                watcher.wake.clear()
                if not watcher.waiting and not self.stopped:
                    await watcher.wake.wait()
            raise errors.Closed("the node stops")
        finally:
            self._watchers.remove(watcher)

    async def wait_applied(self, index: int, timeout_s: float | None) -> None:
        """Return when this node has applied ``index``; `TimedOut`, `Closed`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.changed.wait_for(lambda: self._applied() >= index or self.stopped)
        except TimeoutError:
            raise errors.TimedOut(f"journal index {index} is not applied here yet", index=index) from None
        if self._applied() < index:
            raise errors.Closed("the node stops")

    @property
    def leads(self) -> bool:
        """Whether the election names this node."""
        return self.role.role is effects.Role.LEADER and self.removed is None

    def name_of(self, leader: NodeId | None) -> str | None:
        """Return a node's name, its id while the name is not known here, None for None."""
        if leader is None:
            return None
        member = self.members.get(leader)
        return leader if member is None else member.name

    def check_usable(self) -> None:
        """Raise `Closed` or `Removed` when this node takes no part any more."""
        if self.stopped:
            raise errors.Closed("the node stops")
        if self.removed is not None:
            raise m.was_removed(self.removed)

    def no_leader(self) -> errors.Error:
        """Return why what only a leader can do is not done here."""
        leader = self.role.leader
        if leader is None or leader == self._around.node_id:
            return errors.UnknownMaster("nobody is known to lead: an election is going on, or no majority is there")
        return errors.NotLeader(f"{self.name_of(leader)} leads", leader=self.name_of(leader))

    def leader_member(self) -> m.Member:
        """Return who leads; `UnknownMaster`."""
        self.check_usable()
        leader = self.role.leader
        member = None if leader is None else self.members.get(leader)
        if member is None:
            raise errors.UnknownMaster("nobody is known to lead: an election is going on, or no majority is there")
        return member

    def member_named(self, name: str) -> m.Member:
        """Return a member; `MemberNotFound`."""
        self.check_usable()
        for member in self.members.values():
            if member.name == name:
                return member
        raise errors.MemberNotFound(f"{name[:128]} is no member", name=name[:128])


class Bell:
    """Wakes everybody who waits, on one event loop; costs nothing while nobody does."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        """Wake all."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        """Return after the next ring."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return as soon as ``condition()`` holds, which is looked at after every ring."""
        while not condition():
            await self.wait()


def whom_to_ask(members: Mapping[NodeId, m.Member], own: NodeId, turn: int) -> list[NodeId]:
    """Return whom a node asks that hears no leader: all voters, and one of the others in turn.

    Not all of them each time: without a leader everybody asks, and dozens of observers would connect each to each.
    """
    voters = sorted(node for node, member in members.items() if member.votes and node != own)
    others = sorted(members.keys() - {own, *voters})
    return voters + ([others[turn % len(others)]] if others else [])


class _Watcher:
    """One reader of `observe`."""

    def __init__(self, now: Observed) -> None:
        self.waiting = deque([now], OBSERVED_MAX)
        self.wake = asyncio.Event()

    def tell(self, now: Observed) -> None:
        self.waiting.append(now)
        self.wake.set()


def _nothing_applied() -> int:
    return 0
