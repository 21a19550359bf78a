"""The backend ``raft``: coordination embedded in the nodes, on one group of `srengine.consensus`.

::

    propose, add_node, ...  on any node
        │                                         ┌── not the leader: `messages.Propose` to the one that is, with the
        ▼                                         │   same request id until it is answered
    leader: stamp epoch, plan membership ──► Driver.propose ──► log, majority ──► JournalState.apply on every node
        │                                                                              │
        └──────── outcome by request id ◄── agreed state (outcomes.py) ◄───────────────┘

* **Leading takes two.** The election of the group names a leader; `fencing` puts its epoch into the journal. Commands
  that are proposed in between wait for it (`NotReady`, tried again).
* **Once.** Every command has a request id. What became of it is read from the agreed state, not from memory, so it does
  not matter which leader is asked how often.
* **Read your writes.** A proposer is answered when its own node has applied the entry.
* **One change of membership after the other**, planned on the applied state (membership.py) under a lock of the leader;
  after one whose end is not known, everything in the log is applied first.
* **Caught up.** The leader asks each unstable node to say when it has applied what is committed now. Only an answer in
  time makes it stable: being alive is not enough.
* **Removed.** A node that applies its own removal, or hears of it from a peer that it asks while nobody leads it,
  answers everything with `Removed`.

The log (``log/``) and its driver belong to this backend while the journal is the only group.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from srengine import errors, limits
from srengine.consensus import effects
from srengine.consensus.driver import Driver, prepare
from srengine.consensus.entries import Configuration, Entry, EntryKind
from srengine.consensus.log import LOG_NAME, NodeLog
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Bundle
from srengine.ha import members as m
from srengine.ha.backends import Answer, Attachments, Surroundings
from srengine.ha.backends.raft_options import raft_options
from srengine.ha.backends.raft_state import COPIES_NAME, JournalState, StateCopies
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.fencing import fence
from srengine.ha.journal import Command, decode_command, encode_command
from srengine.ha.membership import TicketKeeper, configuration_of, is_membership, plan
from srengine.ha.messages import (
    JOURNAL_GROUP,
    AppliedAt,
    AwaitApplied,
    Belongs,
    FetchState,
    Propose,
    Proposed,
    Standing,
    TransferLeader,
    Transferred,
)
from srengine.ha.outcomes import find_outcome
from srengine.ha.protocol import Acknowledge, Fencing, Observed, Role
from srengine.transport.peers import Peer
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

RETRY_S: Final = 0.05
"""Pause before a proposal is sent again, unless something changes before."""
ATTEMPT_S: Final = 1.0
"""How long the first try of a proposal waits for its answer, which may be lost; doubled for each further one."""
ASK_S: Final = 2.0
"""How long one question between nodes may take, unless it says otherwise."""
LOOK_S: Final = 0.25
"""How often a leader looks at unstable nodes and tickets."""
OBSERVED_MAX: Final = 4096
"""Changes that one reader of `observe` may lag behind; the oldest are left out then."""
SUBSCRIBE_BYTES: Final = limits.MIB

_T = TypeVar("_T")


def first_entry(bootstrap: Command) -> Entry:
    """Return the first entry of a cluster's journal: the same on all its first nodes.

    ``bootstrap`` is a `members.Bootstrap` command whose members have ids.
    """
    command = msgspec.msgpack.decode(bootstrap.body, type=m.Bootstrap)
    if not command.members or not all(member.node_id for member in command.members):
        raise errors.InvalidValue("a cluster begins with members that have ids")
    configuration = configuration_of(command.members)
    if not configuration.voters:
        raise errors.InvalidValue("a cluster begins with a follower at least")
    return Entry(1, 1, EntryKind.CONFIGURATION, encode_command(bootstrap), configuration)


def found(data_dir: Path, bootstrap: Command, *, insecure: bool = False) -> None:
    """Make the journal of a first node, durably. The same call again changes nothing; `Conflict` for another one."""
    with NodeLog.open(data_dir / LOG_NAME, insecure=insecure) as log:
        log.bootstrap(JOURNAL_GROUP, first_entry(bootstrap))


class RaftBackend:
    """See `protocol.HAProtocol` and the module's text."""

    backend = "raft"

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._options = raft_options(around.options.settings)
        self._store = around.machine.store
        self._epoch = 0
        self._epoch_term = 0
        self._role = effects.RoleChanged(effects.Role.FOLLOWER, 0, None, "not started")
        self._heard = False
        """Whether a leader was ever known in this run."""
        self._member: tuple[str, m.MemberRole] | None = None
        """(name, role) of this node's row, as far as applied."""
        self._removed: m.RemovedMember | None = None
        self._names: dict[NodeId, m.Member] = {}
        self._observed = Observed(Role.INIT, None, 0, "started")
        self._watchers: list[_Watcher] = []
        self._changed = asyncio.Condition()
        self._membership = asyncio.Lock()
        self._membership_unsure = False
        self._unstable_since: dict[NodeId, float] = {}
        self._tickets = TicketKeeper()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._log: NodeLog | None = None
        self._unwatch: Callable[[], None] = _nothing
        self._stopped = False

    # --- start and stop ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `HAProtocol.start`. `CorruptionError` when the epochs are no chain, or the log promised what is lost."""
        around = self._around
        self._log = log = await asyncio.to_thread(NodeLog.open, around.data_dir / LOG_NAME)
        if JOURNAL_GROUP not in log.groups():
            # A node that joins: its log begins when the leader sends something.
            await asyncio.to_thread(log.bootstrap, JOURNAL_GROUP)
        self._journal = JournalState(around.machine, self._on_applied)
        self._read_rows()
        group = prepare(log, JOURNAL_GROUP, self._journal)
        self.driver = Driver(
            around.node_id,
            log,
            around.wire,
            around.clock,
            bounds=self._options.bounds,
            metrics=around.metrics,
            on_group_failed=lambda name, error: around.alarm("group_failed", f"{name}: {error.message}"),
        )
        self.machine = RaftMachine(
            group=JOURNAL_GROUP,
            node_id=around.node_id,
            log=group,
            hard_state=group.hard_state,
            applied_index=self._journal.applied.index,
            timing=self._options.timing,
            random=random.Random(secrets.randbits(64)),
            now=around.clock.boottime_s(),
            trusted=around.trusted and group.damage is None,
        )
        copies = StateCopies(around.data_dir / COPIES_NAME, self._journal, around.wire)
        wire = around.wire
        wire.serve_posts(Bundle, self._received)
        wire.serve(Propose, self._serve_propose)
        wire.serve(AwaitApplied, self._serve_await_applied)
        wire.serve(TransferLeader, self._serve_transfer)
        wire.serve(Belongs, self._serve_belongs)
        wire.serve_stream(FetchState, copies.serve)
        self.driver.add(JOURNAL_GROUP, self.machine, self._journal, sink=copies)
        self._unwatch = self.driver.watch_roles(JOURNAL_GROUP, self._on_role)
        self._spawn(self._look_after(), "raft: unstable nodes and tickets")
        self._spawn(self._ask_whether_removed(), "raft: membership of this node")

    async def stop(self) -> None:
        """See `HAProtocol.stop`."""
        if self._stopped:
            return
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._unwatch()
        if self._log is not None:
            if hasattr(self, "driver"):
                await self.driver.stop()
            self._log.close()
        for watcher in self._watchers:
            watcher.wake.set()
        async with self._changed:
            self._changed.notify_all()

    def trust(self, *, trusted: bool) -> bool:
        """Tell whether this node may vote, when that is found out after the start; see `Driver.trust`."""
        return self.driver.trust(JOURNAL_GROUP, trusted=trusted)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._around.spawn(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _received(self, peer: Peer, message: msgspec.Struct) -> None:
        assert isinstance(message, Bundle), message
        if not self._stopped:
            self.driver.receive(peer, message)

    @property
    def removed(self) -> errors.Removed | None:
        """See `HAProtocol.removed`."""
        return None if self._removed is None else m.was_removed(self._removed)

    # --- what the election says --------------------------------------------------------------------------------------

    def _on_role(self, role: effects.RoleChanged) -> None:
        self._role = role
        self._heard = self._heard or role.leader is not None
        if role.role is not effects.Role.LEADER:
            self._unstable_since.clear()
        self._observe(role.reason)
        self._notify()

    def _on_applied(self, index: int) -> None:
        del index
        self._read_rows()
        self._observe("membership")
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        if not self._stopped:
            task = asyncio.ensure_future(notify())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _read_rows(self) -> None:
        """Learn what was applied of members: names and addresses, and whether this node is one."""
        around = self._around
        version = m.read_membership(self._store).version
        if version == getattr(self, "_version", -1):
            return
        self._version = version
        before, self._names = self._names, {}
        for member in m.read_members(self._store):
            if not member.node_id:
                continue
            node_id = NodeId(member.node_id)
            self._names[node_id] = member
            if node_id != around.node_id and before.get(node_id) != member:
                around.wire.know(node_id, member.name, member.address, member.public_key)
        for node_id in before.keys() - self._names.keys():
            if node_id != around.node_id:
                around.wire.forget(node_id)
        own = self._names.get(around.node_id)
        self._member = None if own is None else (own.name, own.role)
        if self._removed is None:
            removed = m.find_removed(self._store, around.node_id)
            if removed is not None:
                self._become_removed(removed)

    def _become_removed(self, row: m.RemovedMember) -> None:
        if self._removed is None:
            self._removed = row
            _logger.error(
                "this node was removed in epoch %d",
                row.epoch,
                extra={"event": "removed", "epoch": row.epoch, "index": row.index},
            )
            self._around.alarm("removed", f"this node was removed from the cluster in epoch {row.epoch}")

    def _say(self, leader: NodeId | None) -> str | None:
        if leader is None:
            return None
        member = self._names.get(leader)
        return leader if member is None else member.name

    def _observe(self, reason: str) -> None:
        """Tell those who watch, when what the election and the rows say together is something else than before."""
        role, leader = self._role, self._say(self._role.leader)
        if self._removed is not None:
            now = Observed(Role.UNKNOWN, None, role.term, f"removed in epoch {self._removed.epoch}")
        elif role.role is effects.Role.LEADER:
            now = Observed(Role.LEADER, self._around.name, role.term, reason)
        elif leader is None or role.role is effects.Role.CANDIDATE:
            now = Observed(Role.UNKNOWN if self._heard else Role.INIT, None, role.term, reason)
        elif self._member is not None and self._member[1] == "observer":
            now = Observed(Role.OBSERVER, leader, role.term, reason)
        else:
            now = Observed(Role.FOLLOWER, leader, role.term, reason)
        last = self._observed
        if (now.role, now.leader, now.term) == (last.role, last.leader, last.term):
            return
        if {now.role, last.role} == {Role.OBSERVER, Role.FOLLOWER} or (last.role, now.role) == (
            Role.OBSERVER,
            Role.LEADER,
        ):
            self._tell(Observed(Role.UNKNOWN, None, now.term, "the role of this node changed"))
        self._tell(now)

    def _tell(self, now: Observed) -> None:
        self._observed = now
        for watcher in self._watchers:
            watcher.tell(now)

    @property
    def observed(self) -> Observed:
        """See `HAProtocol.observed`."""
        return self._observed

    async def observe(self) -> AsyncIterator[Observed]:
        """See `HAProtocol.observe`."""
        watcher = _Watcher(self._observed)
        self._watchers.append(watcher)
        try:
            while not self._stopped:
                while watcher.waiting:
                    yield watcher.waiting.popleft()
                watcher.wake.clear()
                if not watcher.waiting and not self._stopped:
                    await watcher.wake.wait()
            raise errors.Closed("the node stops")
        finally:
            self._watchers.remove(watcher)

    # --- fencing -----------------------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._role.role is effects.Role.LEADER and self._removed is None

    @property
    def epoch(self) -> int:
        """See `HAProtocol.epoch`."""
        return self._epoch if self._leads and self._role.term == self._epoch_term else 0

    async def fencing(self) -> bool:
        """See `HAProtocol.fencing`."""
        return await fence(self._try_fence, self._around.options.fencing, metrics=self._around.metrics)

    async def _try_fence(self) -> Fencing:
        """One try. NB: an earlier one whose answer was lost may have succeeded: then the newest record is ours."""
        self._check_usable()
        if not self._leads:
            raise self._no_leader()
        term = self._role.term
        await self.driver.read_index(JOURNAL_GROUP, timeout_s=ASK_S)
        epoch, _ = newest_epoch(self._store)
        newest = read_epoch(self._store, epoch)
        if newest is None or (newest.node_id, newest.term) != (self._around.node_id, term):
            command = msgspec.structs.replace(
                claim(self._store, node_id=self._around.node_id, name=self._around.name, term=term),
                request=secrets.token_bytes(16),
            )
            epoch += 1
            await self.driver.propose(JOURNAL_GROUP, encode_command(command), timeout_s=ASK_S)
            outcome = find_outcome(self._store, command.request)
            assert outcome is not None, command
            refusal = outcome.refusal
            if isinstance(refusal, errors.EpochTaken):
                return Fencing.KEYEXIST
            if refusal is not None:
                raise refusal
        if self._role.term != term or not self._leads:
            raise errors.NotLeader(f"the leadership of term {term} ended while it was fenced", leader="")
        self._epoch, self._epoch_term = epoch, term
        self._notify()
        return Fencing.SUCCESS

    async def resign(self, reason: str) -> None:
        """See `HAProtocol.resign`."""
        if not self._stopped and self._leads:
            self.driver.step_down(JOURNAL_GROUP, reason)

    # --- lookups -----------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._stopped:
            raise errors.Closed("the node stops")
        if self._removed is not None:
            raise m.was_removed(self._removed)

    def _no_leader(self) -> errors.Error:
        leader = self._role.leader
        if leader is None or leader == self._around.node_id:
            return errors.UnknownMaster("nobody is known to lead: an election is going on, or no majority is there")
        return errors.NotLeader(f"{self._say(leader)} leads", leader=self._say(leader))

    def _leader(self) -> m.Member:
        self._check_usable()
        leader = self._role.leader
        member = None if leader is None else self._names.get(leader)
        if member is None:
            raise errors.UnknownMaster("nobody is known to lead: an election is going on, or no majority is there")
        return member

    async def get_leader(self) -> str:
        """See `HAProtocol.get_leader`."""
        return self._leader().address

    async def get_leader_name(self) -> str:
        """See `HAProtocol.get_leader_name`."""
        return self._leader().name

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        """See `HAProtocol.get_electable_nodes`."""
        self._check_usable()
        leader = self._role.leader
        return sorted(
            member.name
            for node_id, member in self._names.items()
            if member.votes and (include_leader or node_id != leader)
        )

    async def get_observer_nodes(self) -> list[str]:
        """See `HAProtocol.get_observer_nodes`."""
        self._check_usable()
        return sorted(member.name for member in self._names.values() if member.role == "observer")

    async def get_latest_epoch(self) -> int:
        """See `HAProtocol.get_latest_epoch`."""
        await self.read_barrier()
        return newest_epoch(self._store)[0]

    @property
    def applied_index(self) -> int:
        """See `Journal.applied_index`."""
        return self._journal.applied.index

    @property
    def current(self) -> bool:
        """See `HAProtocol.current`."""
        return (
            not self._stopped
            and self._removed is None
            and self._role.leader is not None
            and self.machine.commit_index <= self._journal.applied.index
        )

    async def read_barrier(self, *, timeout_s: float = 10.0) -> int:
        """See `HAProtocol.read_barrier`."""

        async def ask(left_s: float) -> int:
            return await self.driver.read_index(JOURNAL_GROUP, timeout_s=left_s)

        return await self._again(ask, timeout_s, "the read")

    async def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """See `Journal.subscribe`. `BelowPurgeMark` when entries that were not yielded yet are gone from the log: read
        the state as of ``floor`` then, and go on behind it.
        """
        index = max(1, from_index)
        while True:
            await self._wait_applied(index, None)
            assert self._log is not None
            log = self._log.group(JOURNAL_GROUP)
            if index <= log.floor.index:
                raise errors.BelowPurgeMark(
                    f"entries up to {log.floor.index} are gone from the journal", floor=log.floor.index
                )
            stop = min(self._journal.applied.index, log.last_index) + 1
            for entry in await asyncio.to_thread(log.entries, index, stop, SUBSCRIBE_BYTES):
                if entry.index != index:
                    break
                index += 1
                if entry.data:
                    yield entry.index, decode_command(entry.data)

    async def _wait_applied(self, index: int, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._journal.applied.index >= index or self._stopped)
        except TimeoutError:
            raise errors.TimedOut(f"journal index {index} is not applied here yet", index=index) from None
        if self._journal.applied.index < index:
            raise errors.Closed("the node stops")

    # --- proposing ---------------------------------------------------------------------------------------------------

    async def propose(
        self,
        command: Command,
        *,
        timeout_s: float = 10.0,
        acknowledge: Acknowledge = Acknowledge.MAJORITY,
        force: bool = False,
    ) -> int:
        """See `HAProtocol.propose`. ``force``: see `remove_node`."""
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX:
            raise errors.InvalidValue(f"a command of {len(command.body)} bytes is too large", bytes=len(command.body))
        if not command.request:
            command = msgspec.structs.replace(command, request=secrets.token_bytes(16))

        async def ask(left_s: float) -> int:
            if self._leads:
                return await self._propose_here(command, acknowledge, left_s, force=force)
            leader = self._role.leader
            if leader is None:
                raise self._no_leader()
            message = Propose(
                command.kind, command.body, left_s, command.epoch, command.request, force, acknowledge.value
            )
            reply, _ = await self._around.wire.request(leader, message, timeout_s=left_s)
            if not isinstance(reply, Proposed):
                raise errors.FrameError(f"a proposal was answered with {type(reply).__name__}")
            await self._wait_applied(reply.index, left_s)
            return reply.index

        return await self._again(ask, timeout_s, "the command")

    async def _again(self, ask: Callable[[float], Awaitable[_T]], timeout_s: float, what: str) -> _T:
        """Ask until it is answered: over changes of leader and lost answers, within one deadline."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        unknown = False
        attempt_s = ATTEMPT_S
        last: errors.Error = errors.TimedOut(f"{what} was not answered in {timeout_s:.3g} s")
        while (left_s := deadline - loop.time()) > 0:
            self._check_usable()
            try:
                async with asyncio.timeout(min(left_s, attempt_s)):
                    return await ask(min(left_s, attempt_s))
            except TimeoutError:
                unknown = True
                attempt_s *= 2
            except errors.Error as error:
                if not _is_passing(error):
                    raise
                if isinstance(error, errors.TimedOut):
                    attempt_s *= 2
                unknown = unknown or isinstance(error, errors.TimedOut) or error.details.get("sent") is True
                last = error
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(RETRY_S, max(0.0, deadline - loop.time()))), self._changed:
                    await self._changed.wait()
        self._check_usable()
        if unknown:
            raise errors.TimedOut(f"{what} is not acknowledged yet; it may still be") from last
        raise last

    async def _propose_here(
        self, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool = False
    ) -> int:
        """Put a command into the journal as the acting leader; return its index once it is applied here."""
        epoch = self.epoch
        if epoch == 0:
            raise errors.NotReady(f"{self._around.name} was elected and has no epoch yet", leader=self._around.name)
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
            raise stale if command.epoch else self._stale(stale)
        refusal = outcome.refusal
        if refusal is not None:
            raise refusal
        if acknowledge is Acknowledge.ALL:
            await self._all_applied(outcome.index, timeout_s)
        return outcome.index

    def _stale(self, stale: errors.StaleEpoch) -> errors.Error:
        return errors.NotLeader(stale.message, leader="")

    async def _in_the_background(self, command: Command, timeout_s: float) -> None:
        try:
            await self._append(command, None, timeout_s)
        except errors.Error as error:
            _logger.info("%s may be lost: %s", command.kind, error.message, extra={"event": "unacknowledged"})

    async def _append(self, command: Command, wanted: Configuration | None, timeout_s: float) -> None:
        try:
            await self.driver.propose(JOURNAL_GROUP, encode_command(command), wanted, timeout_s=timeout_s)
        except errors.Conflict as error:
            # Another leader's entry took its place: nothing happened, and it may be proposed again.
            raise errors.NotLeader(error.message, leader="") from error

    async def _all_applied(self, index: int, timeout_s: float) -> None:
        """Return when every member that votes has applied ``index``."""
        others = [node for node, member in self._names.items() if member.votes and node != self._around.node_id]
        answers = await asyncio.gather(
            *(self._ask_applied(node, index, timeout_s) for node in others), return_exceptions=True
        )
        for node, answer in zip(others, answers, strict=True):
            if isinstance(answer, errors.Error):
                raise errors.TimedOut(
                    f"the command stands at {index}, and {self._say(node)} has not applied it: {answer.message}",
                    index=index,
                    final=True,
                ) from answer
            if isinstance(answer, BaseException):
                raise answer

    async def _ask_applied(self, node: NodeId, index: int, timeout_s: float) -> int:
        message = AwaitApplied(index, timeout_s)
        reply, _ = await self._around.wire.request(node, message, timeout_s=timeout_s)
        if not isinstance(reply, AppliedAt) or reply.index < index:
            raise errors.FrameError(f"a question for the applied index was answered with {reply!r:.200}")
        return reply.index

    # --- membership --------------------------------------------------------------------------------------------------

    def _alive(self) -> set[NodeId]:
        """Return who was heard lately: within what this leader itself needs to go on leading."""
        since = self._around.clock.boottime_s() - self._options.election_s_min
        heard = {node for node, peer in self.machine.progress.items() if peer.heard_at >= since}
        return {self._around.node_id, *heard}

    async def _change_membership(self, command: Command, timeout_s: float, *, force: bool) -> None:
        """Plan and make one change; `find_outcome` tells then what came of it."""
        async with self._membership:
            if self._membership_unsure:
                await self._wait_applied(self.machine.last_index, timeout_s)
                self._membership_unsure = False
            if find_outcome(self._store, command.request) is not None:
                return
            planned = plan(
                self._store,
                command,
                index=self._journal.applied.index + 1,
                leader=self._around.node_id,
                alive=self._alive(),
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
            extra={"event": "membership", "kind": command.kind, "index": self._journal.applied.index},
        )

    async def _check_caught_up(self, change: m.SetStable) -> None:
        if change.stable and not await self._has_caught_up(NodeId(change.node_id)):
            raise errors.NotReady(f"{change.name} has not caught up", name=change.name, final=True)

    async def _has_caught_up(self, node: NodeId) -> bool:
        """Return whether a node says in time that it has applied what is committed now."""
        try:
            await self._ask_applied(node, self.machine.commit_index, self._options.catch_up_s)
        except errors.Error:
            return False
        return True

    async def _look_after(self) -> None:
        """Make unstable nodes stable that have caught up, and end old tickets, while this node leads."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.epoch == 0:
                continue
            try:
                await self._look_at_unstable()
                for command in self._tickets.due(self._around.clock.boottime_s(), m.read_tickets(self._store)):
                    await self.propose(command, timeout_s=ASK_S)
            except errors.Error as error:
                _logger.info("looking after members: %s", error.message, extra={"event": "look_after"})

    async def _look_at_unstable(self) -> None:
        now = self._around.clock.boottime_s()
        unstable = {
            node: member for node, member in self._names.items() if member.role == "follower" and not member.stable
        }
        self._unstable_since = {node: self._unstable_since.get(node, now) for node in unstable}
        alive = self._alive()
        for node, member in sorted(unstable.items()):
            long_enough = now - self._unstable_since[node] >= self._options.unstable_grace_s
            if node in alive and long_enough and await self._has_caught_up(node):
                await self._set_stable(member, stable=True)

    async def _ask_whether_removed(self) -> None:
        """While nobody is known to lead, ask the others whether this node is a member still: nobody else tells it."""
        pause_s = 2 * self._options.election_s_max
        while self._removed is None:
            await asyncio.sleep(pause_s)
            if self._role.leader is not None:
                continue
            for node in sorted(self._names.keys() - {self._around.node_id}):
                try:
                    await self._around.wire.request(node, Belongs(), timeout_s=ASK_S)
                except errors.Removed as error:
                    facts = error.details
                    self._become_removed(
                        m.RemovedMember(
                            self._around.name,
                            self._around.node_id,
                            0,
                            int(facts.get("epoch", 0)),
                            int(facts.get("index", 0)),
                        )
                    )
                    self._observe("removed")
                    self._notify()
                    return
                except errors.Error:
                    continue

    async def _change(self, kind: str, body: msgspec.Struct, *, force: bool = False) -> None:
        await self.propose(Command(kind, msgspec.msgpack.encode(body)), force=force)

    def _member_named(self, name: str) -> m.Member:
        self._check_usable()
        for member in self._names.values():
            if member.name == name:
                return member
        raise errors.MemberNotFound(f"{name[:128]} is no member", name=name[:128])

    async def add_node(
        self,
        name: str,
        node_id: str,
        address: str,
        *,
        role: m.MemberRole = "follower",
        public_key: str = "",
        ticket: bytes = b"",
    ) -> None:
        """See `HAProtocol.add_node`."""
        await self.read_barrier()
        holders = [each for each in self._names.values() if each.name == name or each.address == address]
        replaces = m.Holder(holders[0].node_id, holders[0].incarnation) if holders else None
        await self._change(m.ADD, m.AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """See `HAProtocol.remove_node`."""
        await self.read_barrier()
        member = self._member_named(name)
        await self._change(m.REMOVE, m.RemoveMember(name, member.node_id), force=force)

    async def set_role(self, name: str, role: m.MemberRole, *, force: bool = False) -> None:
        """See `HAProtocol.set_role`."""
        await self.read_barrier()
        member = self._member_named(name)
        await self._change(m.SET_ROLE, m.SetRole(name, member.node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        """See `HAProtocol.update_address`."""
        await self.read_barrier()
        member = self._member_named(name)
        await self._change(m.UPDATE_ADDRESS, m.UpdateAddress(name, member.node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        """See `HAProtocol.add_unstable_node`."""
        await self.read_barrier()
        await self._set_stable(self._member_named(name), stable=False)

    async def remove_unstable_node(self, name: str) -> None:
        """See `HAProtocol.remove_unstable_node`."""
        await self.read_barrier()
        await self._set_stable(self._member_named(name), stable=True)

    async def _set_stable(self, member: m.Member, *, stable: bool) -> None:
        await self._change(m.SET_STABLE, m.SetStable(member.name, member.node_id, stable))

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """See `HAProtocol.transfer_leader`."""
        wanted = "" if target is None else self._member_named(target).node_id

        async def ask(left_s: float) -> NodeId:
            leader = self._role.leader
            if leader is None:
                raise self._no_leader()
            if leader == wanted:
                return leader
            if self._leads:
                return await self._transfer_here(wanted, left_s)
            message = TransferLeader(wanted, left_s)
            reply, _ = await self._around.wire.request(leader, message, timeout_s=left_s)
            if not isinstance(reply, Transferred):
                raise errors.FrameError(f"a transfer was answered with {type(reply).__name__}")
            return NodeId(reply.leader)

        return self._say(await self._again(ask, timeout_s, "the transfer")) or ""

    async def _transfer_here(self, wanted: str, timeout_s: float) -> NodeId:
        target = NodeId(wanted) if wanted else None
        try:
            return await self.driver.transfer(JOURNAL_GROUP, target, timeout_s=timeout_s)
        except (errors.InvalidValue, errors.NotReady) as error:
            raise errors.MasterState(f"the leadership stays: {error.message}") from error

    # --- what other nodes ask ----------------------------------------------------------------------------------------

    async def _serve_propose(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, Propose), message
        self._check_sender(node)
        if not self._leads:
            raise self._no_leader()
        command = Command(message.kind, message.body, message.epoch, message.request or secrets.token_bytes(16))
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX or len(command.request) != 16 or command.epoch < 0:
            raise errors.InvalidValue("a proposal with values that cannot be meant")
        try:
            acknowledge = Acknowledge(message.acknowledge)
        except ValueError:
            raise errors.InvalidValue(f"no acknowledgement policy: {message.acknowledge[:40]!r}") from None
        timeout_s = min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX)
        index = await self._propose_here(command, acknowledge, timeout_s, force=message.force)
        return Proposed(index), ()

    async def _serve_await_applied(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del node, attachments
        assert isinstance(message, AwaitApplied), message
        await self._wait_applied(message.index, min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX))
        return AppliedAt(self._journal.applied.index), ()

    async def _serve_transfer(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, TransferLeader), message
        self._check_sender(node)
        if not self._leads:
            raise self._no_leader()
        timeout_s = min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX)
        return Transferred(await self._transfer_here(message.target, timeout_s)), ()

    async def _serve_belongs(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del message, attachments
        self._check_sender(node)
        return Standing(node in self._names, self._journal.applied.index), ()

    def _check_sender(self, node: NodeId) -> None:
        """Refuse a node that was removed, and tell it so."""
        removed = m.find_removed(self._store, node)
        if removed is not None:
            raise m.was_removed(removed)


class _Watcher:
    """One reader of `observe`."""

    def __init__(self, now: Observed) -> None:
        self.waiting = deque([now], OBSERVED_MAX)
        self.wake = asyncio.Event()

    def tell(self, now: Observed) -> None:
        self.waiting.append(now)
        self.wake.set()


def _is_passing(error: errors.Error) -> bool:
    """Return whether another try, perhaps at another node, may succeed: leaders change, connections break."""
    if error.details.get("final"):
        return False
    return isinstance(error, errors.NoLeader | errors.NotReady | errors.Unreachable | errors.TimedOut)


def _nothing() -> None:
    return None
