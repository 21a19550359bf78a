"""The backend ``raft``: coordination embedded in the nodes, on one group of `srengine.consensus`.

::

    propose, add_node, ...  on any node
        │                                         ┌── not the leader: `messages.Propose` to the one that is, with the
        ▼                                         │   same request id until it is answered
    leader: stamp epoch, plan membership ──► Driver.propose ──► log, majority ──► JournalState.apply on every node
        │                                                                              │
        └──────── outcome by request id ◄── agreed state (outcomes.py) ◄───────────────┘

* **Leading takes two.** The election of the group names a leader; `fencing` puts its epoch into the journal. Commands
  that are proposed in between wait for it.
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
import itertools
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from srengine import errors, limits
from srengine.consensus.driver import Driver, prepare
from srengine.consensus.entries import Entry, EntryKind
from srengine.consensus.log import LOG_NAME, NodeLog
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Bundle
from srengine.consensus.services import Health
from srengine.ha import members as m
from srengine.ha.backends import Answer, Attachments, Surroundings
from srengine.ha.backends.raft_currency import Currency
from srengine.ha.backends.raft_leading import Leading
from srengine.ha.backends.raft_options import raft_options
from srengine.ha.backends.raft_reconciling import Reconciling
from srengine.ha.backends.raft_standing import Standing, whom_to_ask
from srengine.ha.backends.raft_state import COPIES_NAME, JournalState, StateCopies
from srengine.ha.epochs import check_epochs, newest_epoch
from srengine.ha.fencing import fence
from srengine.ha.journal import Command, decode_command, encode_command, new_request
from srengine.ha.membership import configuration_of, is_membership
from srengine.ha.messages import (
    JOURNAL_GROUP,
    AppliedAt,
    AwaitApplied,
    Belongs,
    DigestAt,
    FetchState,
    MemberStanding,
    Propose,
    Proposed,
    TransferLeader,
    Transferred,
)
from srengine.ha.protocol import Acknowledge, Observed
from srengine.transport.peers import Peer
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

RETRY_S: Final = 0.05
"""Pause before a proposal is sent again, unless something changes before."""
ATTEMPT_S: Final = 1.0
"""How long the first try of a proposal waits for its answer, which may be lost; doubled for each further one."""
ASK_S: Final = 2.0
"""How long one question between nodes may take, unless it says otherwise."""
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
        self._standing = Standing(around)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._log: NodeLog | None = None
        self._runs = False
        """`start` has come so far that there is somebody to ask. Clients may be there earlier."""
        self._unwatch: Callable[[], None] = _nothing

    # --- start and stop ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `HAProtocol.start`. `CorruptionError` when the epochs are no chain, when the log promised what is lost,
        or when the state is behind the log.
        """
        around = self._around
        await asyncio.to_thread(check_epochs, self._store)
        self._log = log = await asyncio.to_thread(
            NodeLog.open,
            around.data_dir / LOG_NAME,
            insecure=around.insecure,
            allow_remote_fs=around.allow_remote_fs,
        )
        if JOURNAL_GROUP not in log.groups():
            # A node that joins: its log begins when the leader sends something.
            await asyncio.to_thread(log.bootstrap, JOURNAL_GROUP)
        self._journal = JournalState(around.machine)
        self._standing.begin(lambda: self._journal.visible_index)
        group = prepare(log, JOURNAL_GROUP, self._journal)
        if self._journal.applied.index < group.floor.index:
            raise errors.CorruptionError(
                f"the agreed state of this node stands at {self._journal.applied.index}, behind what its log keeps "
                f"(from {group.floor.index + 1}): it was lost or put back",
                applied=self._journal.applied.index,
                floor=group.floor.index,
            )
        self.driver = Driver(
            around.node_id,
            log,
            around.wire,
            around.clock,
            bounds=self._options.bounds,
            metrics=around.metrics,
            on_health=self._on_health,
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
        self.leading = Leading(
            around, self._options, self._standing, self._journal, self.driver, self.machine, self._spawn
        )
        self.currency = Currency(
            lambda: self.machine.commit_index,
            lambda: self._journal.visible_index,
            lambda: around.machine.occupied,
            around.clock,
        )
        copies = StateCopies(around.data_dir / COPIES_NAME, self._journal, around.wire)
        self.reconciling = Reconciling(around, self._standing, self._journal, copies, self._options.reconcile_s)
        wire = around.wire
        wire.serve(DigestAt, self.reconciling.serve)
        wire.serve_posts(Bundle, self._received)
        wire.serve(Propose, self._serve_propose)
        wire.serve(AwaitApplied, self._serve_await_applied)
        wire.serve(TransferLeader, self._serve_transfer)
        wire.serve(Belongs, self._serve_belongs)
        wire.serve_stream(FetchState, copies.serve)
        self.driver.add(JOURNAL_GROUP, self.machine, self._journal, sink=copies, on_visible=self._standing.on_applied)
        self._unwatch = self.driver.watch_roles(JOURNAL_GROUP, self._standing.on_role)
        self._runs = True
        self._spawn(self.leading.look_after(), "raft: unstable nodes and tickets")
        self._spawn(self.reconciling.run(), "raft: reconcile")
        self._spawn(self.currency.run(self._stands_still), "raft: currency")
        self._spawn(self._ask_whether_removed(), "raft: membership of this node")

    async def stop(self) -> None:
        """See `HAProtocol.stop`."""
        if self._standing.stopped:
            return
        self._standing.stopped = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._unwatch()
        if self._log is not None:
            if hasattr(self, "driver"):
                await self.driver.stop()
            self._log.close()
        await self._standing.stop()

    def trust(self, *, trusted: bool, held: tuple[int, int] = (0, 0)) -> bool:
        """Tell whether this node may vote, when that is found out after the start; see `Driver.trust`."""
        return self._runs and self.driver.trust(JOURNAL_GROUP, trusted=trusted, held=held)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._around.spawn(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_health(self, health: Health, error: errors.Error | None) -> None:
        """Say how the log's disk is: whoever looks at a node that follows nobody must not have to guess."""
        if health in {Health.FULL, Health.FENCED} and error is not None:
            self._around.alarm(f"journal_disk_{health.value}", error.message)
        _logger.log(
            logging.INFO if health is Health.OK else logging.WARNING,
            "the disk of the journal is %s",
            health.value,
            extra={"event": "journal_disk", "health": health.value},
        )

    def _stands_still(self) -> None:
        """Give up a leadership that is worth nothing: what is acknowledged and read goes through the agreed state.

        One that has no epoch yet is given up when fencing fails.
        """
        if self.epoch:
            self._around.alarm("applying_stands_still", f"nothing was applied for {limits.STALENESS_S_MAX:g} s")
            self.driver.step_down(JOURNAL_GROUP, "nothing is applied here")

    def _received(self, peer: Peer, message: msgspec.Struct) -> None:
        assert isinstance(message, Bundle), message
        if not self._standing.stopped:
            self.driver.receive(peer, message)

    # --- the election ------------------------------------------------------------------------------------------------

    @property
    def removed(self) -> errors.Removed | None:
        """See `HAProtocol.removed`."""
        row = self._standing.removed
        return None if row is None else m.was_removed(row)

    @property
    def observed(self) -> Observed:
        """See `HAProtocol.observed`."""
        return self._standing.observed

    def observe(self) -> AsyncIterator[Observed]:
        """See `HAProtocol.observe`."""
        return self._standing.observe()

    @property
    def epoch(self) -> int:
        """See `HAProtocol.epoch`."""
        return self.leading.epoch if self._runs else 0

    async def fencing(self) -> bool:
        """See `HAProtocol.fencing`."""
        return await fence(self.leading.try_fence, self._around.options.fencing, metrics=self._around.metrics)

    async def resign(self, reason: str) -> None:
        """See `HAProtocol.resign`."""
        if not self._standing.stopped and self._standing.leads:
            self.driver.step_down(JOURNAL_GROUP, reason)

    # --- lookups -----------------------------------------------------------------------------------------------------

    async def get_leader(self) -> str:
        """See `HAProtocol.get_leader`."""
        return self._standing.leader_member().address

    async def get_leader_name(self) -> str:
        """See `HAProtocol.get_leader_name`."""
        return self._standing.leader_member().name

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        """See `HAProtocol.get_electable_nodes`."""
        self._standing.check_usable()
        leader = self._standing.role.leader
        return sorted(
            member.name
            for node_id, member in self._standing.members.items()
            if member.votes and (include_leader or node_id != leader)
        )

    async def get_observer_nodes(self) -> list[str]:
        """See `HAProtocol.get_observer_nodes`."""
        self._standing.check_usable()
        return sorted(member.name for member in self._standing.members.values() if member.role == "observer")

    async def get_latest_epoch(self) -> int:
        """See `HAProtocol.get_latest_epoch`."""
        await self.read_barrier()
        return newest_epoch(self._store)[0]

    @property
    def applied_index(self) -> int:
        """See `Journal.applied_index`."""
        return self._journal.visible_index if self._runs else self._around.machine.applied_index

    @property
    def current(self) -> bool:
        """See `HAProtocol.current`."""
        return (
            self._runs
            and not self._standing.stopped
            and self._standing.removed is None
            and self._standing.role.leader is not None
            and self.currency.within(limits.STALENESS_S_MAX)
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
            await self._standing.wait_applied(index, None)
            assert self._log is not None
            log = self._log.group(JOURNAL_GROUP)
            if index <= log.floor.index:
                raise errors.BelowPurgeMark(
                    f"entries up to {log.floor.index} are gone from the journal", floor=log.floor.index
                )
            stop = min(self._journal.visible_index, log.last_index) + 1
            for entry in await asyncio.to_thread(log.entries, index, stop, SUBSCRIBE_BYTES):
                if entry.index != index:
                    break
                index += 1
                if entry.data:
                    yield entry.index, decode_command(entry.data)

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
            command = msgspec.structs.replace(command, request=new_request())

        async def ask(left_s: float) -> int:
            if self.epoch and acknowledge is Acknowledge.MAJORITY and not is_membership(command.kind):
                # Nothing but a proposal, which keeps its time itself.
                return await self.leading.propose(command, acknowledge, left_s)
            async with asyncio.timeout(left_s):
                if self._standing.leads:
                    return await self.leading.propose(command, acknowledge, left_s, force=force)
                leader = self._standing.role.leader
                if leader is None:
                    raise self._standing.no_leader()
                message = Propose(
                    command.kind, command.body, left_s, command.epoch, command.request, force, acknowledge.value
                )
                reply, _ = await self._around.wire.request(leader, message, timeout_s=left_s)
                if not isinstance(reply, Proposed):
                    raise errors.FrameError(f"a proposal was answered with {type(reply).__name__}")
                await self._standing.wait_applied(reply.index, left_s)
                return reply.index

        return await self._again(ask, timeout_s, "the command")

    async def _again(self, ask: Callable[[float], Awaitable[_T]], timeout_s: float, what: str) -> _T:
        """Ask until it is answered: over changes of leader and lost answers, within one deadline.

        ``ask`` keeps the time that it is given: it ends with `TimedOut` or `TimeoutError`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        unknown = False
        attempt_s = ATTEMPT_S
        last: errors.Error | None = None
        while (left_s := deadline - loop.time()) > 0:
            self._standing.check_usable()
            try:
                if not self._runs:
                    raise errors.NotReady(f"{self._around.name} has just started")
                return await ask(min(left_s, attempt_s))
            except TimeoutError:
                unknown = True
                attempt_s *= 2
            except errors.Removed as error:
                self._hear_removed(error)
                raise
            except errors.Error as error:
                if not _is_passing(error):
                    raise
                if isinstance(error, errors.TimedOut):
                    attempt_s *= 2
                unknown = unknown or isinstance(error, errors.TimedOut) or error.details.get("sent") is True
                last = error
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(RETRY_S, max(0.0, deadline - loop.time()))):
                    await self._standing.changed.wait()
        self._standing.check_usable()
        if unknown:
            raise errors.TimedOut(f"{what} is not acknowledged yet; it may still be") from last
        raise last if last is not None else errors.TimedOut(f"{what} was not answered in {timeout_s:.3g} s")

    async def _ask_whether_removed(self) -> None:
        """While nobody is known to lead, ask others whether this node is a member still: nobody else tells it."""
        pause_s = 2 * self._options.election_s_max
        for turn in itertools.count():
            await asyncio.sleep(pause_s)
            if self._standing.removed is not None:
                return
            if self._standing.role.leader is not None:
                continue
            for node in whom_to_ask(self._standing.members, self._around.node_id, turn):
                try:
                    await self._around.wire.request(node, Belongs(), timeout_s=ASK_S)
                except errors.Removed as error:
                    self._hear_removed(error)
                except errors.Error:
                    continue

    def _hear_removed(self, error: errors.Removed) -> None:
        """Believe a member that says that this node was removed; another id that was is somebody else's business."""
        facts = error.details
        if facts.get("node_id") == self._around.node_id:
            epoch, index = int(facts.get("epoch", 0)), int(facts.get("index", 0))
            self._standing.become_removed(m.RemovedMember(self._around.name, self._around.node_id, 0, epoch, index))

    # --- membership --------------------------------------------------------------------------------------------------

    async def _change(self, kind: str, body: msgspec.Struct, *, force: bool = False) -> None:
        await self.propose(Command(kind, msgspec.msgpack.encode(body)), force=force)

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
        holders = [each for each in self._standing.members.values() if each.name == name or each.address == address]
        replaces = m.Holder(holders[0].node_id, holders[0].incarnation) if holders else None
        await self._change(m.ADD, m.AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """See `HAProtocol.remove_node`."""
        await self.read_barrier()
        member = self._standing.member_named(name)
        await self._change(m.REMOVE, m.RemoveMember(name, member.node_id), force=force)

    async def set_role(self, name: str, role: m.MemberRole, *, force: bool = False) -> None:
        """See `HAProtocol.set_role`."""
        await self.read_barrier()
        member = self._standing.member_named(name)
        await self._change(m.SET_ROLE, m.SetRole(name, member.node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        """See `HAProtocol.update_address`."""
        await self.read_barrier()
        member = self._standing.member_named(name)
        await self._change(m.UPDATE_ADDRESS, m.UpdateAddress(name, member.node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        """See `HAProtocol.add_unstable_node`."""
        await self.read_barrier()
        await self._set_stable(self._standing.member_named(name), stable=False)

    async def remove_unstable_node(self, name: str) -> None:
        """See `HAProtocol.remove_unstable_node`."""
        await self.read_barrier()
        await self._set_stable(self._standing.member_named(name), stable=True)

    async def _set_stable(self, member: m.Member, *, stable: bool) -> None:
        await self._change(m.SET_STABLE, m.SetStable(member.name, member.node_id, stable))

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """See `HAProtocol.transfer_leader`."""
        wanted = "" if target is None else self._standing.member_named(target).node_id

        async def ask(left_s: float) -> NodeId:
            leader = self._standing.role.leader
            if leader is None:
                raise self._standing.no_leader()
            if leader == wanted:
                return leader
            if self._standing.leads:
                return await self.leading.transfer(wanted, left_s)
            message = TransferLeader(wanted, left_s)
            reply, _ = await self._around.wire.request(leader, message, timeout_s=left_s)
            if not isinstance(reply, Transferred):
                raise errors.FrameError(f"a transfer was answered with {type(reply).__name__}")
            return NodeId(reply.leader)

        return self._standing.name_of(await self._again(ask, timeout_s, "the transfer")) or ""

    # --- what other nodes ask ----------------------------------------------------------------------------------------

    async def _serve_propose(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, Propose), message
        self._check_sender(node)
        if not self._standing.leads:
            raise self._standing.no_leader()
        command = Command(message.kind, message.body, message.epoch, message.request or new_request())
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX or len(command.request) != 16 or command.epoch < 0:
            raise errors.InvalidValue("a proposal with values that cannot be meant")
        try:
            acknowledge = Acknowledge(message.acknowledge)
        except ValueError:
            raise errors.InvalidValue(f"no acknowledgement policy: {message.acknowledge[:40]!r}") from None
        timeout_s = min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX)
        index = await self.leading.propose(command, acknowledge, timeout_s, force=message.force)
        return Proposed(index), ()

    async def _serve_await_applied(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del node, attachments
        assert isinstance(message, AwaitApplied), message
        await self._standing.wait_applied(message.index, min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX))
        return AppliedAt(self._journal.visible_index), ()

    async def _serve_transfer(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, TransferLeader), message
        self._check_sender(node)
        if not self._standing.leads:
            raise self._standing.no_leader()
        timeout_s = min(max(message.timeout_s, 0.0), limits.PROPOSE_S_MAX)
        return Transferred(await self.leading.transfer(message.target, timeout_s)), ()

    async def _serve_belongs(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del message, attachments
        self._check_sender(node)
        return MemberStanding(node in self._standing.members, self._journal.visible_index), ()

    def _check_sender(self, node: NodeId) -> None:
        """Refuse a node that was removed, and tell it so."""
        removed = m.find_removed(self._store, node)
        if removed is not None:
            raise m.was_removed(removed)


def _is_passing(error: errors.Error) -> bool:
    """Return whether another try, perhaps at another node, may succeed: leaders change, connections break."""
    if error.details.get("final"):
        return False
    return isinstance(error, errors.NoLeader | errors.NotReady | errors.Unreachable | errors.TimedOut)


def _nothing() -> None:
    return None
