"""What a node of the etcd backend does while it leads: its epoch, its writing, changes of membership, handing over.

::

    elected (etcd_election) ──► fence_once: epoch into the journal ──► EtcdWriter ──► ended by the election, by the
                                                                                       writer itself, or by the node

Membership is changed one step after the other, each planned on the applied state (membership.py). A node is asked
whether it has caught up, by message, and becomes stable only if it answers in time: being alive is not enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import msgspec

from srengine import errors
from srengine.ha import membership
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_applying import EtcdApplying
from srengine.ha.backends.etcd_election import EtcdElection
from srengine.ha.backends.etcd_journal import EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_roster import EtcdRoster
from srengine.ha.backends.etcd_session import TRANSIENT, EtcdSession
from srengine.ha.backends.etcd_settings import EtcdSettings
from srengine.ha.backends.etcd_writer import EtcdWriter
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.journal import Command, encode_command, new_request
from srengine.ha.members import SET_STABLE, Member, SetStable, read_tickets
from srengine.ha.messages import AppliedAt, AwaitApplied
from srengine.ha.outcomes import Outcome, find_outcome
from srengine.ha.protocol import Acknowledge, Fencing, Observed, Role
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.ha.backends import Surroundings

_logger = logging.getLogger(__name__)

LOOK_S: Final = 0.25
"""How often a leader looks at unstable nodes and tickets."""
DRAIN_S: Final = 2.0
"""How long a handover waits for what is being written."""
ENDED_GRACE_S: Final = 0.5
"""How long a former leader still waits to apply what it has appended for others."""


class EtcdLeading:
    """One for the life of the backend; leads or does not. `look_after` in a task.

    ``propose``: the way of everybody, for what this node proposes by itself.
    """

    def __init__(
        self,
        around: Surroundings,
        place: EtcdPlace,
        settings: EtcdSettings,
        *,
        journal: EtcdJournal,
        applying: EtcdApplying,
        mirror: EtcdMirror,
        session: EtcdSession,
        roster: EtcdRoster,
        propose: Callable[[Command], Awaitable[int]],
    ) -> None:
        self._around = around
        self._rows = around.machine.store
        self._node_id = around.node_id
        self._name = around.name
        self._clock = around.clock
        self._keys = place.keys
        self._settings = settings
        self._journal = journal
        self._applying = applying
        self._mirror = mirror
        self._session = session
        self._roster = roster
        self._propose = propose
        self._election: EtcdElection
        self._writer: EtcdWriter | None = None
        self._writing: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        """One change of membership at a time."""
        self._unstable_since: dict[str, float] = {}
        """When this leader first saw a node unstable, by node id."""
        self._tickets = membership.TicketKeeper()
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, election: EtcdElection) -> None:
        """Learn of the election, which is told of this object first."""
        self._election = election

    def writer(self) -> EtcdWriter | None:
        """Return what this node writes with, if it leads and owns the epoch of that leadership."""
        term = self._election.term
        writer = self._writer
        return writer if writer is not None and writer.term == term else None

    def moved(self, observed: Observed) -> None:
        """Take note that the election says something new."""
        writer = self._writer
        if writer is not None and (observed.role is not Role.LEADER or observed.term != writer.term):
            self.end_leadership(observed.reason)

    def end_leadership(self, reason: str) -> None:
        """Write nothing more."""
        writer, self._writer = self._writer, None
        if writer is not None:
            _logger.warning("epoch %d is over here: %s", writer.epoch, reason)
            writer.close(reason)

    async def stop_writing(self) -> None:
        """Wait for the end of an earlier leadership's writing: its last transaction may still be on its way."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def fence_once(self) -> Fencing:
        """See `fencing.TryFence`. An earlier try whose answer was lost may have succeeded: the newest record tells."""
        term = self._election.term
        if not term:
            raise errors.UnknownMaster("the election does not name this node")
        if self.writer() is not None:
            return Fencing.SUCCESS
        await self.stop_writing()
        async with self._election.within(self._settings.lease_s, "the journal's end"):
            head = await self._journal.head()
            await self._applying.reach(head)
        newest, _ = newest_epoch(self._rows)
        record = read_epoch(self._rows, newest)
        if record is None or (record.node_id, record.term) != (self._node_id, term):
            command = claim(self._rows, node_id=self._node_id, name=self._name, term=term)
            head += 1
            try:
                outcome = await self._append_claim(command, term, head, newest + 1)
            except errors.Conflict as conflict:
                if isinstance(conflict, errors.StaleEpoch | errors.Diverged):
                    raise
                return Fencing.KEYEXIST
            if outcome.refusal is not None:
                return Fencing.KEYEXIST
            newest += 1
        self._lead(term, newest, head)
        return Fencing.SUCCESS

    async def _append_claim(self, command: Command, term: int, index: int, epoch: int) -> Outcome:
        stamped = msgspec.structs.replace(command, request=new_request())
        expected = self._applying.expect(index)
        key = self._keys.epoch(epoch)
        owner = msgspec.json.encode({"node_id": self._node_id, "name": self._name, "term": term, "index": index})
        try:
            await self._journal.append(
                index - 1,
                term,
                [encode_command(stamped)],
                compare=[ec.absent(key)],
                success=[ec.put(key, owner)],
                deadline=self._lease_deadline,
            )
            async with self._election.within(self._settings.lease_s, "the epoch applied"):
                return await expected
        finally:
            expected.cancel()

    def _lead(self, term: int, epoch: int, head: int) -> None:
        if self._election.term != term:
            raise errors.StaleEpoch(f"epoch {epoch} is over already", epoch=epoch)
        self._writer = EtcdWriter(
            self._journal,
            self._applying,
            term=term,
            epoch=epoch,
            head=head,
            clock=self._clock,
            lease_until=lambda: self._session.until,
            lost=lambda reason: self._lost(term, reason),
        )
        self._writing = self._around.spawn(self._writer.run(), "etcd: write")

    def _lost(self, term: int, reason: str) -> None:
        """Take note that the writer found the leadership to be over."""
        self.end_leadership(reason)
        self._around.metrics.add("srengine_ha_etcd_lost_total")
        self.spawn_once(self._leave(term), "etcd: leave")

    def spawn_once(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start something that ends by itself."""
        task = self._around.spawn(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _leave(self, term: int) -> None:
        """Give up the election of a term that has lost its writer: to act again, this node needs another term."""
        with contextlib.suppress(*TRANSIENT):
            await self._mirror.ask()
        if self._election.term == term:
            await self._election.resign(held_back_s=0.0)

    def _lease_deadline(self) -> float:
        return self._clock.monotonic_s() + self._session.until - self._clock.boottime_s()

    async def propose_here(
        self, writer: EtcdWriter, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool
    ) -> int:
        """Put a command into the journal as the acting leader; return its index once it is applied here."""
        try:
            if membership.is_membership(command.kind):
                outcome = await self._change_membership(writer, command, force=force)
            elif acknowledge is Acknowledge.NONE:
                writer.propose(command)
                self.spawn_once(self._in_the_background(writer, command), f"etcd: propose {command.kind}")
                return 0
            else:
                outcome = await writer.write(command)
        except errors.StaleEpoch as stale:
            if command.epoch:
                raise
            # Stamped by this node, which leads no more, and not written: whoever asked may ask the next one.
            raise errors.NotLeader(stale.message, leader="") from stale
        refusal = outcome.refusal
        if refusal is not None:
            raise refusal
        if acknowledge is Acknowledge.ALL:
            await self._all_applied(outcome.index, timeout_s)
        return outcome.index

    async def _in_the_background(self, writer: EtcdWriter, command: Command) -> None:
        try:
            await writer.write(command)
        except errors.Error as error:
            _logger.info("%s may be lost: %s", command.kind, error.message, extra={"event": "unacknowledged"})

    async def _all_applied(self, index: int, timeout_s: float) -> None:
        """Return when every member that votes has applied ``index``."""
        others = [member for member in self._roster.members if member.votes and member.node_id != self._node_id]
        answers = await asyncio.gather(
            *(self._ask_applied(member, index, timeout_s) for member in others), return_exceptions=True
        )
        for member, answer in zip(others, answers, strict=True):
            if isinstance(answer, errors.Error):
                raise errors.TimedOut(
                    f"the command stands at {index}, and {member.name} has not applied it: {answer.message}",
                    index=index,
                    final=True,
                ) from answer
            if isinstance(answer, BaseException):
                raise answer

    async def _ask_applied(self, member: Member, index: int, timeout_s: float) -> None:
        message = AwaitApplied(index, timeout_s)
        reply, _ = await self._around.wire.request(NodeId(member.node_id), message, timeout_s=timeout_s)
        if not isinstance(reply, AppliedAt) or reply.index < index:
            raise errors.FrameError(f"a question for the applied index was answered with {reply!r:.200}")

    async def _change_membership(self, writer: EtcdWriter, command: Command, *, force: bool) -> Outcome:
        """Plan and make one change; those before it are applied."""
        async with self._planning:
            await self._applying.reach(writer.head)
            known = find_outcome(self._rows, command.request)
            if known is not None:
                return known
            membership.plan(
                self._rows,
                command,
                index=self._applying.index + 1,
                leader=self._node_id,
                alive=[NodeId(node_id) for node_id in {*self._mirror.sessions, self._node_id}],
                force=force,
            )
            if command.kind == SET_STABLE:
                await self._check_caught_up(msgspec.msgpack.decode(command.body, type=SetStable))
            outcome = await writer.write(command)
        _logger.info(
            "membership: %s",
            command.kind,
            extra={"event": "membership", "kind": command.kind, "index": outcome.index},
        )
        return outcome

    async def _check_caught_up(self, change: SetStable) -> None:
        if not change.stable:
            return
        member = self._roster.find(change.name)
        if not await self._has_caught_up(member):
            raise errors.NotReady(f"{change.name} has not caught up", name=change.name, final=True)

    async def _has_caught_up(self, member: Member) -> bool:
        """Return whether a node says in time that it has applied all that is in the journal now."""
        try:
            await self._ask_applied(member, self._applying.index, self._settings.catch_up_s)
        except errors.Error:
            return False
        return True

    async def hand_over(self, wanted: str, timeout_s: float) -> Member:
        """Make the node with the id ``wanted`` leader (empty: the best one); `MasterState` when nothing was changed."""
        member = self._successor(wanted)
        writer = self.writer()
        if writer is not None:
            # What is written already is answered first; what comes meanwhile is asked again at the successor.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(DRAIN_S, timeout_s)):
                    await writer.drained()
        try:
            done = await self._election.hand_over(member, timeout_s=timeout_s)
        except errors.TimedOut:
            await self._mirror.ask()
            candidacy = self._mirror.candidacy
            done = candidacy is not None and candidacy.node_id == member.node_id
        if not done:
            raise errors.MasterState(f"{member.name} could not take over; nothing was changed", name=member.name)
        return member

    def _successor(self, wanted: str) -> Member:
        """Return who takes over: the one that is named, or the alive voter that has applied most."""
        candidates = [
            (said.applied, member)
            for member in self._roster.members
            if member.votes
            and member.node_id != self._node_id
            and (said := self._mirror.session(member.node_id)) is not None
            and wanted in {"", member.node_id}
        ]
        if not candidates:
            who = next((member.name for member in self._roster.members if member.node_id == wanted), "no other member")
            raise errors.MasterState(f"the leadership stays: {who} cannot lead now (not alive, or no voter)")
        return max(candidates, key=lambda candidate: (candidate[0], candidate[1].name))[1]

    async def while_leading(self, writer: EtcdWriter, work: Coroutine[Any, Any, int]) -> int:
        """Do something for another node. When the leadership ends meanwhile, that node must not wait for an entry to be
        applied here: it asks the next leader, which finds the request's outcome.
        """
        doing = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(writer.ended.wait())
        try:
            await asyncio.wait({doing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                await asyncio.wait({doing}, timeout=ENDED_GRACE_S)
            if not doing.done():
                raise errors.TimedOut(f"{self._name} leads no more; whether the command will stand is unknown")
            return doing.result()
        finally:
            for task in (doing, ended):
                task.cancel()

    async def look_after(self) -> None:
        """While this node leads: make unstable nodes stable that have caught up, and end old tickets."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.writer() is None:
                self._unstable_since.clear()
                continue
            try:
                await self._look_at_unstable()
                for command in self._tickets.due(self._clock.boottime_s(), read_tickets(self._rows)):
                    await self._propose(command)
            except errors.Error as error:
                _logger.info("looking after members: %s", error.message, extra={"event": "look_after"})

    async def _look_at_unstable(self) -> None:
        now = self._clock.boottime_s()
        unstable = {
            member.node_id: member for member in self._roster.members if member.role == "follower" and not member.stable
        }
        self._unstable_since = {node: self._unstable_since.get(node, now) for node in unstable}
        for node, member in sorted(unstable.items()):
            long_enough = now - self._unstable_since[node] >= self._settings.unstable_grace_s
            if node in self._mirror.sessions and long_enough and await self._has_caught_up(member):
                change = SetStable(member.name, member.node_id, stable=True)
                await self._propose(Command(SET_STABLE, msgspec.msgpack.encode(change)))

    async def stop(self) -> None:
        """End everything that was begun here."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.stop_writing()
