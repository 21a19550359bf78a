"""What only the leader does: its epoch, proposals, changes of membership, the care of unstable nodes and tickets.

* **Commands** are stamped with the epoch that this node owns for the term that it leads; without one they wait
  (`NotReady`). What became of a command is read from the agreed state by its request id.
* **Membership** is changed one after the other under a lock, planned on the applied state (membership.py). After a
  change whose end is not known, everything in the log is applied before the next one is planned.
* **Caught up** is a node that answers in time that it has applied what was committed when it was asked. Being alive, or
  holding the log, is not enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from srengine import errors
from srengine.consensus.driver import Driver
from srengine.consensus.entries import Configuration
from srengine.consensus.machine import RaftMachine
from srengine.ha import members as m
from srengine.ha.backends import Surroundings
from srengine.ha.backends.raft_options import RaftOptions
from srengine.ha.backends.raft_standing import Standing
from srengine.ha.backends.raft_state import JournalState
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.journal import Command, encode_command, new_request
from srengine.ha.membership import TicketKeeper, is_membership, plan
from srengine.ha.messages import JOURNAL_GROUP, AppliedAt, AwaitApplied
from srengine.ha.outcomes import find_outcome
from srengine.ha.protocol import Acknowledge, Fencing
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

ASK_S: Final = 2.0
"""How long a leader's own business with the journal may take: an epoch, a ticket, a node that becomes stable."""
LOOK_S: Final = 0.25
"""How often a leader looks at unstable nodes and tickets."""


class Leading:
    """The leader's side of a `raft.RaftBackend`; harmless on a node that does not lead."""

    def __init__(
        self,
        around: Surroundings,
        options: RaftOptions,
        standing: Standing,
        journal: JournalState,
        driver: Driver,
        machine: RaftMachine,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
    ) -> None:
        self._around = around
        self._options = options
        self._standing = standing
        self._journal = journal
        self._driver = driver
        self._machine = machine
        self._spawn = spawn
        self._store = around.machine.store
        self._epoch = 0
        self._epoch_term = 0
        """The term for which ``_epoch`` was inserted: in another one it is worth nothing."""
        self._tried_term = 0
        """The last term in which an epoch was claimed, with whatever end."""
        self._membership = asyncio.Lock()
        self._membership_unsure = False
        """The last change may be in the log without being applied."""
        self._unstable_since: dict[NodeId, float] = {}
        self._tickets = TicketKeeper()
        self._said = ""

    # --- the epoch ---------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """See `HAProtocol.epoch`."""
        return self._epoch if self._standing.leads and self._standing.role.term == self._epoch_term else 0

    async def try_fence(self) -> Fencing:
        """One try.

        The first of a term claims the epoch behind the newest one that is applied here, without waiting for what is in
        the log: as a rule nothing is that matters, and the claim is decided together with the first entry of the term.
        If the applier says that the number is taken, and whenever an earlier try may have succeeded, everything that
        was committed is applied first, and what is found then is final.
        """
        self._standing.check_usable()
        if not self._standing.leads:
            raise self._standing.no_leader()
        term = self._standing.role.term
        epoch = 0
        if self._tried_term != term:
            self._tried_term = term
            epoch = await self._claim(term)
        if epoch == 0:
            await self._driver.read_index(JOURNAL_GROUP, timeout_s=ASK_S)
            epoch, _ = newest_epoch(self._store)
            newest = read_epoch(self._store, epoch)
            if newest is None or (newest.node_id, newest.term) != (self._around.node_id, term):
                epoch = await self._claim(term)
                if epoch == 0:
                    return Fencing.KEYEXIST
        if self._standing.role.term != term or not self._standing.leads:
            raise errors.NotLeader(f"the leadership of term {term} ended while it was fenced", leader="")
        self._epoch, self._epoch_term = epoch, term
        self._standing.notify()
        return Fencing.SUCCESS

    async def _claim(self, term: int) -> int:
        """Claim the epoch behind the newest one that is applied; return it, or 0 when somebody has it."""
        epoch, _ = newest_epoch(self._store)
        command = msgspec.structs.replace(
            claim(self._store, node_id=self._around.node_id, name=self._around.name, term=term),
            request=new_request(),
        )
        await self._driver.propose(JOURNAL_GROUP, encode_command(command), timeout_s=ASK_S)
        outcome = find_outcome(self._store, command.request)
        assert outcome is not None, command
        refusal = outcome.refusal
        if isinstance(refusal, errors.EpochTaken):
            return 0
        if refusal is not None:
            raise refusal
        return epoch + 1

    # --- commands ----------------------------------------------------------------------------------------------------

    async def propose(
        self, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool = False
    ) -> int:
        """Put a command into the journal as the acting leader; return its index once it is applied here.

        One that was decided before is answered with its outcome: a second entry of it changes nothing.
        """
        epoch = self.epoch or await self._acting_epoch(min(timeout_s, ASK_S))
        stamped = command if command.epoch else msgspec.structs.replace(command, epoch=epoch)
        if is_membership(command.kind):
            await self._change_membership(stamped, timeout_s, force=force)
        elif acknowledge is Acknowledge.NONE:
            self._spawn(self._in_the_background(stamped, timeout_s), f"propose {command.kind}")
            return 0
        else:
            await self._append(stamped, None, timeout_s)
        outcome = find_outcome(self._store, command.request)
        if outcome is None:
            newest, _ = newest_epoch(self._store)
            stale = errors.StaleEpoch(
                f"{command.kind} was proposed in epoch {stamped.epoch}, the newest is {newest}",
                epoch=stamped.epoch,
                newest=newest,
            )
            # Stamped by this node, which leads no more: whoever asked may ask the next one.
            raise stale if command.epoch else errors.NotLeader(stale.message, leader="")
        refusal = outcome.refusal
        if refusal is not None:
            raise refusal
        if acknowledge is Acknowledge.ALL:
            await self._all_applied(outcome.index, timeout_s)
        return outcome.index

    async def _acting_epoch(self, timeout_s: float) -> int:
        """Return the epoch that this node acts for, as soon as it has one; `NotReady` when that takes too long.

        A command that comes between election and fencing waits here: its proposer would only ask again later.
        """
        epoch = self.epoch
        if epoch == 0 and self._standing.leads:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._standing.changed.wait_for(lambda: self.epoch != 0 or not self._standing.leads)
            epoch = self.epoch
        if epoch == 0:
            raise errors.NotReady(f"{self._around.name} was elected and has no epoch yet", leader=self._around.name)
        return epoch

    async def _in_the_background(self, command: Command, timeout_s: float) -> None:
        try:
            await self._append(command, None, timeout_s)
        except errors.Error as error:
            _logger.info("%s may be lost: %s", command.kind, error.message, extra={"event": "unacknowledged"})

    async def _append(self, command: Command, wanted: Configuration | None, timeout_s: float) -> None:
        try:
            await self._driver.propose(JOURNAL_GROUP, encode_command(command), wanted, timeout_s=timeout_s)
        except errors.Conflict as error:
            # Another leader's entry took its place: nothing happened, and it may be proposed again.
            raise errors.NotLeader(error.message, leader="") from error

    async def _all_applied(self, index: int, timeout_s: float) -> None:
        """Return when every member that votes has applied ``index``."""
        others = [
            node for node, member in self._standing.members.items() if member.votes and node != self._around.node_id
        ]
        answers = await asyncio.gather(
            *(self._ask_applied(node, index, timeout_s) for node in others), return_exceptions=True
        )
        for node, answer in zip(others, answers, strict=True):
            if isinstance(answer, errors.Error):
                name = self._standing.name_of(node)
                raise errors.TimedOut(
                    f"the command stands at {index}, and {name} has not applied it: {answer.message}",
                    index=index,
                ) from answer
            if isinstance(answer, BaseException):
                raise answer

    async def _ask_applied(self, node: NodeId, index: int, timeout_s: float) -> int:
        message = AwaitApplied(index, timeout_s)
        reply, _ = await self._around.wire.request(node, message, timeout_s=timeout_s)
        if not isinstance(reply, AppliedAt) or reply.index < index:
            raise errors.FrameError(f"a question for the applied index was answered with {reply!r:.200}")
        return reply.index

    async def transfer(self, wanted: str, timeout_s: float) -> NodeId:
        """Hand over to the node of this id, or to the best one; `MasterState` when the leadership stays."""
        target = NodeId(wanted) if wanted else None
        try:
            return await self._driver.transfer(JOURNAL_GROUP, target, timeout_s=timeout_s)
        except (errors.InvalidValue, errors.NotReady) as error:
            raise errors.MasterState(f"the leadership stays: {error.message}") from error

    # --- membership --------------------------------------------------------------------------------------------------

    def alive(self) -> set[NodeId]:
        """Return who can be counted on now: heard within a lease, and connected.

        A killed process closes its connection at once, long before its silence tells; a change of membership that
        counted on it would never be decided.
        """
        since = self._around.clock.boottime_s() - self._options.lease_s
        heard = {
            node for node, peer in self._machine.progress.items() if peer.heard_at >= since and self._is_connected(node)
        }
        return {self._around.node_id, *heard}

    def _is_connected(self, node: NodeId) -> bool:
        channel = self._around.wire.channel(node)
        return channel is not None and channel.connected

    async def _change_membership(self, command: Command, timeout_s: float, *, force: bool) -> None:
        """Plan and make one change; `find_outcome` tells then what came of it."""
        async with self._membership:
            if self._membership_unsure:
                await self._standing.wait_applied(self._machine.last_index, timeout_s)
                self._membership_unsure = False
            if find_outcome(self._store, command.request) is not None:
                return
            planned = plan(
                self._store,
                command,
                index=self._journal.visible_index + 1,
                leader=self._around.node_id,
                alive=self.alive(),
                force=force,
            )
            if command.kind == m.ADD:
                # The new node is written to as soon as the entry is in the log, before the row of it is applied.
                added = msgspec.msgpack.decode(command.body, type=m.AddMember)
                self._around.wire.know(NodeId(added.node_id), added.name, added.address, added.public_key)
            elif command.kind == m.SET_STABLE:
                await self._check_caught_up(msgspec.msgpack.decode(command.body, type=m.SetStable))
            try:
                await self._append(command, planned.configuration, timeout_s)
            except (errors.Error, asyncio.CancelledError):
                self._membership_unsure = True
                raise
        _logger.info(
            "membership: %s",
            command.kind,
            extra={"event": "membership", "kind": command.kind, "index": self._journal.visible_index},
        )

    async def _check_caught_up(self, change: m.SetStable) -> None:
        if change.stable and not await self._has_caught_up(NodeId(change.node_id)):
            raise errors.NotReady(f"{change.name} has not caught up", name=change.name, final=True)

    async def _has_caught_up(self, node: NodeId) -> bool:
        """Return whether a node says in time that it has applied what is committed now."""
        try:
            await self._ask_applied(node, self._machine.commit_index, self._options.catch_up_s)
        except errors.Error:
            return False
        return True

    async def look_after(self) -> None:
        """Make unstable nodes stable that have caught up, and end old tickets, while this node leads."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.epoch == 0:
                self._unstable_since.clear()
                continue
            self._measure_lag()
            try:
                await self._look_at_unstable()
                for command in self._tickets.due(self._around.clock.boottime_s(), m.read_tickets(self._store)):
                    await self._propose_own(command)
            except errors.Error as error:
                self._say_once(error.message)
            else:
                self._said = ""

    def _say_once(self, why: str) -> None:
        """Log why members cannot be looked after, once for as long as it stays the same."""
        if why != self._said:
            self._said = why
            _logger.warning("looking after members: %s", why, extra={"event": "look_after"})

    def _measure_lag(self) -> None:
        """Say how many entries each living node lacks; a dead one keeps the last figure, and is named by `alive`."""
        alive = self.alive()
        for node, peer in self._machine.progress.items():
            name = self._standing.name_of(node) or node
            self._around.metrics.set("srengine_ha_node_alive", node in alive, node=name)
            if node in alive:
                lag = max(0, self._machine.last_index - peer.match_index)
                self._around.metrics.set("srengine_ha_replication_lag_entries", lag, node=name)

    async def _look_at_unstable(self) -> None:
        now = self._around.clock.boottime_s()
        unstable = {
            node: member
            for node, member in self._standing.members.items()
            if member.role == "follower" and not member.stable
        }
        self._unstable_since = {node: self._unstable_since.get(node, now) for node in unstable}
        alive = self.alive()
        for node, member in sorted(unstable.items()):
            long_enough = now - self._unstable_since[node] >= self._options.unstable_grace_s
            if node in alive and long_enough and await self._has_caught_up(node):
                change = m.SetStable(member.name, member.node_id, stable=True)
                await self._propose_own(Command(m.SET_STABLE, msgspec.msgpack.encode(change)))

    async def _propose_own(self, command: Command) -> None:
        stamped = msgspec.structs.replace(command, request=new_request())
        await self.propose(stamped, Acknowledge.MAJORITY, ASK_S)
