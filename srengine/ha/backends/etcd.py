"""Backend ``etcd``: an existing etcd holds election, epochs and journal; the nodes hold the agreed state.

For users who run an etcd, or more members than a group of ours should have. The parts, one file each::

    etcd_session    this node's lease: for how long it may believe that it leads
    etcd_mirror     what etcd says of the cluster, followed by a watch
    etcd_election   who leads, and the campaign
    etcd_journal    entries in etcd: appended under the election key, read, trimmed
    etcd_applying   entries into the agreed state of this node
    etcd_writer     what this node writes while it leads
    etcd_copies     copies of the state at two nodes, before the journal is trimmed
    etcd_keys, etcd_client, etcd_http    keys, gateway, HTTP

Invariants:

* A command enters the journal only by a transaction that requires that the election key was last changed at the term of
  its writer. The key is bound to the writer's lease. So nothing that a former leader sends, whenever it arrives, has an
  effect; its own belief in the lease only decides what it *says* (`Observed`), and ends earlier than the lease.
* An epoch is an entry of the journal and a key beside it, made by one transaction that requires that the key is absent.
* The agreed state is applied from the journal alone, the same machine and the same commands as with ``raft``.
* Reads of it are linearizable after `EtcdBackend.read_barrier`, which asks etcd for the journal's end.

What it does not do: work without etcd (no node leads while etcd has no quorum; what is applied stays readable), or
compact etcd's own history, which is its administrator's (``--auto-compaction``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from srengine import errors, limits
from srengine.clock import SystemClock
from srengine.ha import fencing, membership
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_applying import EtcdApplying
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_copies import EtcdCopies
from srengine.ha.backends.etcd_election import EtcdElection
from srengine.ha.backends.etcd_journal import EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import Keys
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_session import TRANSIENT, EtcdSession
from srengine.ha.backends.etcd_writer import EtcdWriter
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.journal import REQUEST_BYTES, Command, encode_command
from srengine.ha.members import (
    ADD,
    BOOTSTRAP,
    REMOVE,
    SET_ROLE,
    SET_STABLE,
    UPDATE_ADDRESS,
    AddMember,
    Bootstrap,
    Holder,
    Member,
    MemberRole,
    RemovedMember,
    RemoveMember,
    SetRole,
    SetStable,
    UpdateAddress,
    find_removed,
    read_cluster,
    read_members,
    read_tickets,
    was_removed,
)
from srengine.ha.messages import (
    AppliedAt,
    AwaitApplied,
    Belongs,
    MemberStanding,
    Propose,
    Proposed,
    TransferLeader,
    Transferred,
)
from srengine.ha.outcomes import Outcome, find_outcome
from srengine.ha.protocol import Acknowledge, Fencing, Observed, Role
from srengine.types import NodeId, check_name

if TYPE_CHECKING:
    from srengine.ha.backends import Answer, Attachments, Surroundings

_logger = logging.getLogger(__name__)

BACKEND: Final = "etcd"
LEASE_S: Final = 3
"""Default time of a lease: longer than etcd takes to elect its own leader (1 to 2 s), so that this costs us none."""
LEASE_S_MIN: Final = 2
"""Etcd with its own defaults grants none that is shorter."""
LEASE_S_MAX: Final = 600
KEPT: Final = 10_000
MAINTENANCE_S: Final = 1.0
LOOK_S: Final = 0.25
"""How often a leader looks at unstable nodes and tickets."""
RETRY_S: Final = 0.05
PROPOSE_S_MAX: Final = 60.0
"""How long another node may let this one try."""
FRESH_S: Final = limits.STALENESS_S_MAX
DRAIN_S: Final = 2.0
ENDED_GRACE_S: Final = 0.5
"""How long a former leader still waits to apply what it has appended for others."""


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Settings of the backend, by the names under which `HAOptions.settings` has them.

    ``cluster_id``: needed while the node's own state does not say it yet. ``kept``: entries that stay in etcd when the
    journal is trimmed. ``unstable_grace_s``: a follower that has caught up stays unstable for so long at least.
    ``catch_up_s``: how fast it must be to count as caught up.
    """

    etcd: EtcdOptions
    cluster_id: str = ""
    lease_s: int = LEASE_S
    kept: int = KEPT
    unstable_grace_s: float = 0.0
    catch_up_s: float = 1.0

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> EtcdSettings:
        """Check and return them; `errors.InvalidValue` for an unknown name or an impossible value."""
        known = {"servers", "user", "password", "ca_file", "cert_file", "key_file"}
        own = {"cluster_id", "lease_s", "kept", "unstable_grace_s", "catch_up_s"}
        unknown = sorted(set(settings) - known - own)
        if unknown:
            raise errors.InvalidValue(f"the etcd backend has no setting {unknown[0]!r}", name=unknown[0])
        servers = settings.get("servers", ())
        more = {name: value for name, value in settings.items() if name in known and name != "servers"}
        if isinstance(servers, str):
            options = EtcdOptions.parse(servers, **more)
        else:
            options = EtcdOptions(tuple(servers), **more)
        made = cls(options, **{name: value for name, value in settings.items() if name in own})
        if not isinstance(made.lease_s, int) or not LEASE_S_MIN <= made.lease_s <= LEASE_S_MAX:
            raise errors.InvalidValue(f"lease_s is {made.lease_s!r}; whole seconds, {LEASE_S_MIN} to {LEASE_S_MAX}")
        if not isinstance(made.kept, int) or made.kept < 1:
            raise errors.InvalidValue(f"kept is {made.kept!r}; 1 or more entries")
        for name, least in (("unstable_grace_s", 0.0), ("catch_up_s", 0.001)):
            value = getattr(made, name)
            if not isinstance(value, int | float) or not least <= value <= LEASE_S_MAX:
                raise errors.InvalidValue(f"{name} is {value!r}; seconds, {least:g} to {LEASE_S_MAX}")
        return made


async def found_cluster(options: EtcdOptions, bootstrap: Bootstrap, *, timeout_s: float = 10.0) -> str:
    """Found a cluster in etcd unless its name is taken; return the cluster id that the name has.

    When it is not that of ``bootstrap``, another node was first and nothing was changed: adopt the id that is returned,
    or refuse. All first members may call this at once, again and again.
    """
    client = EtcdClient(options)
    try:
        check_name(bootstrap.cluster.name, "cluster")
        place = EtcdPlace(client, Keys(bootstrap.cluster.cluster_id), "", "", SystemClock())
        journal = EtcdJournal(place)
        first = encode_command(Command(BOOTSTRAP, msgspec.msgpack.encode(bootstrap)))
        return await journal.bootstrap(bootstrap.cluster.name, first, timeout_s=timeout_s)
    finally:
        client.close()


async def find_cluster(options: EtcdOptions, name: str, *, timeout_s: float = 10.0) -> str | None:
    """Return the cluster id that a name has in etcd, None when it has none."""
    client = EtcdClient(options)
    try:
        found = (await client.range(Keys.name(check_name(name, "cluster")), timeout_s=timeout_s)).first
        return None if found is None else found.value.decode(errors="replace")
    finally:
        client.close()


class EtcdBackend:
    """See `protocol.HAProtocol`; made by `backends.find_backend("etcd")`."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._machine = around.machine
        self._rows = around.machine.store
        self._node_id = around.node_id
        self._name = around.name
        self._clock = around.clock
        self.settings = EtcdSettings.read(around.options.settings)
        self.cluster_id = self._own_cluster_id()
        self._client = EtcdClient(self.settings.etcd, clock=around.clock)
        self._keys = Keys(self.cluster_id)
        place = EtcdPlace(self._client, self._keys, self._node_id, self._name, around.clock)
        self._journal = EtcdJournal(place)
        self._applying = EtcdApplying(self._machine, applied=self._applied, stuck=self._stuck)
        self._members: list[Member] = []
        self._member: Member | None = None
        """This node in the agreed state."""
        self._removed: RemovedMember | None = None
        """Set once the agreed state says that this node was removed."""
        self._session = EtcdSession(
            place,
            lease_s=self.settings.lease_s,
            applied=lambda: self._applying.index,
            changed=self._changed,
        )
        self._mirror = EtcdMirror(
            place,
            self._journal,
            delivered=self._applying.index,
            deliver=self._applying.deliver,
            fetch=self._fetch_state,
            changed=self._changed,
        )
        self._election = EtcdElection(
            place,
            self._mirror,
            self._session,
            applied=lambda: self._applying.index,
            member=lambda: self._member,
            removed=lambda: self._removed is not None,
            moved=self._moved,
        )
        self._copies = EtcdCopies(
            place,
            self._journal,
            self._mirror,
            machine=self._machine,
            wire=around.wire,
            directory=around.data_dir / BACKEND,
            kept=self.settings.kept,
        )
        self._writer: EtcdWriter | None = None
        self._writing: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        """One change of membership at a time."""
        self._unstable_since: dict[str, float] = {}
        """When this leader first saw a node unstable, by node id."""
        self._tickets = membership.TicketKeeper()
        self._tasks: list[asyncio.Task[None]] = []
        self._started = False
        self._stopped = False

    def _own_cluster_id(self) -> str:
        known = read_cluster(self._rows)
        told = self.settings.cluster_id
        if known is None:
            if not told:
                raise errors.InvalidValue(
                    "which cluster in etcd is this node's? Its directory does not say; cluster_id"
                )
            return told
        if told and told != known.cluster_id:
            raise errors.ForeignData(
                f"this directory belongs to cluster {known.cluster_id}, not to {told}",
                expected=told,
                found=known.cluster_id,
            )
        return known.cluster_id

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """See `HAProtocol`."""
        return BACKEND

    async def start(self) -> None:
        """See `HAProtocol`. Raises `ForeignData` when etcd holds another cluster or another history than this node."""
        assert not self._started, "started twice"
        self._started = True
        await self._journal.check_cluster()
        await self._check_history()
        self._read_members()
        self._copies.open()
        wire = self._around.wire
        wire.serve(Propose, self._serve_propose)
        wire.serve(AwaitApplied, self._serve_await_applied)
        wire.serve(TransferLeader, self._serve_transfer)
        wire.serve(Belongs, self._serve_belongs)
        spawn = self._around.spawn
        self._tasks = [
            spawn(self._mirror.run(), "etcd: follow"),
            spawn(self._mirror.beat(), "etcd: ask"),
            spawn(self._applying.run(), "etcd: apply"),
            spawn(self._session.run(), "etcd: lease"),
            spawn(self._election.look_out(), "etcd: look out"),
            spawn(self._election.stand(), "etcd: stand"),
            spawn(self._maintain(), "etcd: copies"),
            spawn(self._look_after(), "etcd: unstable nodes and tickets"),
        ]

    async def _check_history(self) -> None:
        """Refuse an etcd that does not hold what this node has applied."""
        index, term = self._machine.applied
        head = await self._journal.head()
        if index > head:
            raise errors.ForeignData(
                f"this node has applied entry {index}, and etcd's journal ends at {head}: an older state was restored"
                " there, or it is not this node's etcd",
                index=index,
                head=head,
            )
        kv = (await self._client.range(self._keys.journal(index))).first if index else None
        if kv is not None and (await self._journal.entry(kv, index)).term != term:
            raise errors.ForeignData(f"entry {index} in etcd is not the one that this node has applied", index=index)

    async def stop(self) -> None:
        """See `HAProtocol`."""
        if self._stopped:
            return
        self._stopped = True
        self._end_leadership("this node stops")
        self._election.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stop_writing()
        await self._applying.close()
        if self._started:
            await self._session.end()
        self._client.close()

    def _check_open(self) -> None:
        if self._stopped or not self._started:
            raise errors.Closed("this node takes no part in coordination")
        if self._removed is not None:
            raise was_removed(self._removed)

    @property
    def removed(self) -> errors.Removed | None:
        """See `HAProtocol.removed`."""
        return None if self._removed is None else was_removed(self._removed)

    # --- what is observed --------------------------------------------------------------------------------------------

    @property
    def observed(self) -> Observed:
        """See `HAProtocol`."""
        return self._election.observed

    def observe(self) -> AsyncIterator[Observed]:
        """See `HAProtocol`."""
        return self._election.observe()

    def _changed(self) -> None:
        self._election.changed()

    def _applied(self) -> None:
        self._read_members()
        self._election.changed()

    def _stuck(self, error: errors.Error) -> None:
        """Give leadership away: what is acknowledged cannot be applied here."""
        self._around.alarm("journal_stuck", f"the agreed state cannot be written: {error.message}")
        if self._election.term:
            self._spawn_once(self.resign(f"the agreed state cannot be written: {error.message}"))

    def _read_members(self) -> None:
        """Take the members over, and tell the wire where they are."""
        members = read_members(self._rows)
        if members == self._members:
            return
        before, self._members = self._members, members
        self._member = next((member for member in members if member.node_id == self._node_id), None)
        removed = None if self._member is not None else find_removed(self._rows, self._node_id)
        if removed is not None and self._removed is None:
            self._removed = removed
            _logger.error(
                "this node was removed in epoch %d",
                removed.epoch,
                extra={"event": "removed", "epoch": removed.epoch, "index": removed.index},
            )
            self._around.alarm("removed", f"this node was removed from the cluster in epoch {removed.epoch}")
        there = {member.node_id for member in members}
        for member in members:
            if member.node_id and member.node_id != self._node_id and member not in before:
                self._around.wire.know(NodeId(member.node_id), member.name, member.address, member.public_key)
        for member in before:
            if member.node_id and member.node_id not in there:
                self._around.wire.forget(NodeId(member.node_id))

    def _moved(self, observed: Observed) -> None:
        """Take note that the election says something new."""
        writer = self._writer
        if writer is not None and (observed.role is not Role.LEADER or observed.term != writer.term):
            self._end_leadership(observed.reason)

    def _end_leadership(self, reason: str) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            _logger.warning("epoch %d is over here: %s", writer.epoch, reason)
            writer.close(reason)

    async def _stop_writing(self) -> None:
        """Wait for the end of an earlier leadership's writing: its last transaction may still be on its way."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    # --- epochs ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """See `HAProtocol`."""
        writer = self._leading()
        return 0 if writer is None else writer.epoch

    def _leading(self) -> EtcdWriter | None:
        term = self._election.term
        writer = self._writer
        return writer if writer is not None and writer.term == term else None

    async def fencing(self) -> bool:
        """See `HAProtocol`."""
        self._check_open()
        return await fencing.fence(self._fence_once, self._around.options.fencing, metrics=self._around.metrics)

    async def _fence_once(self) -> Fencing:
        term = self._election.term
        if not term:
            raise errors.UnknownMaster("the election does not name this node")
        if self._leading() is not None:
            return Fencing.SUCCESS
        await self._stop_writing()
        async with self._within(self.settings.lease_s, "the journal's end"):
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
        stamped = msgspec.structs.replace(command, request=secrets.token_bytes(REQUEST_BYTES))
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
            async with self._within(self.settings.lease_s, "the epoch applied"):
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
        self._end_leadership(reason)
        self._around.metrics.add("srengine_ha_etcd_lost_total")
        self._spawn_once(self._leave(term))

    def _spawn_once(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks = [*(one for one in self._tasks if not one.done()), task]

    async def _leave(self, term: int) -> None:
        """Give up the election of a term that has lost its writer: to act again, this node needs another term."""
        with contextlib.suppress(*TRANSIENT):
            await self._mirror.ask()
        if self._election.term == term:
            await self._election.resign(held_back_s=0.0)

    def _lease_deadline(self) -> float:
        return self._clock.monotonic_s() + self._session.until - self._clock.boottime_s()

    async def get_latest_epoch(self) -> int:
        """See `HAProtocol`."""
        await self.read_barrier()
        return newest_epoch(self._rows)[0]

    # --- the journal -------------------------------------------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        """See `HAProtocol`."""
        return self._applying.index

    @property
    def current(self) -> bool:
        """See `HAProtocol`."""
        return self._mirror.fresh(self._applying.index, FRESH_S)

    async def propose(
        self,
        command: Command,
        *,
        timeout_s: float = 10.0,
        acknowledge: Acknowledge = Acknowledge.MAJORITY,
        force: bool = False,
    ) -> int:
        """See `HAProtocol.propose`. ``force``: see `remove_node`."""
        self._check_open()
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX:
            raise errors.InvalidValue(f"a command of {len(command.body)} bytes is too large", bytes=len(command.body))
        if not command.request:
            command = msgspec.structs.replace(command, request=secrets.token_bytes(REQUEST_BYTES))
        last: errors.Error | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._check_open()
                    try:
                        return await self._propose_once(command, acknowledge, timeout_s, force=force)
                    except errors.Error as error:
                        # The request id makes it one command, however often it is asked for.
                        if not _passes(error):
                            raise
                        last = error
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise self._too_late(f"{command.kind} acknowledged; it may still be", timeout_s, last) from last

    async def _propose_once(self, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool) -> int:
        writer = self._leading()
        if writer is not None:
            return await self._propose_here(writer, command, acknowledge, timeout_s, force=force)
        message = Propose(
            command.kind, command.body, timeout_s, command.epoch, command.request, force, acknowledge.value
        )
        reply, _ = await self._around.wire.request(self._leader_elsewhere(), message, timeout_s=timeout_s)
        if not isinstance(reply, Proposed):
            raise errors.FrameError(f"a proposal was answered with {type(reply).__name__}")
        await self._applying.reach(reply.index)
        return reply.index

    async def _propose_here(
        self, writer: EtcdWriter, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool
    ) -> int:
        """Put a command into the journal as the acting leader; return its index once it is applied here."""
        try:
            if membership.is_membership(command.kind):
                outcome = await self._change_membership(writer, command, force=force)
            elif acknowledge is Acknowledge.NONE:
                writer.propose(command)
                self._spawn_once(self._in_the_background(writer, command))
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
        others = [member for member in self._members if member.votes and member.node_id != self._node_id]
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

    def _leader_elsewhere(self) -> NodeId:
        """Return the node to ask; raise that there is none."""
        observed, candidacy = self._election.observed, self._mirror.candidacy
        if observed.leader is None or candidacy is None:
            raise errors.UnknownMaster(observed.reason)
        if candidacy.node_id == self._node_id:
            raise errors.NotReady(f"{self._name} was elected and has no epoch yet", leader=self._name)
        return NodeId(candidacy.node_id)

    async def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """See `HAProtocol`. `BelowPurgeMark` for entries that were trimmed."""
        index = max(1, from_index)
        while True:
            self._check_open()
            await self._applying.reach(index)
            entries = self._applying.recent(index)
            if entries is None:
                entries = await self._journal.commands(index, self._applying.index)
            for found, command in entries:
                assert found == index, (found, index)
                yield found, command
                index += 1

    async def read_barrier(self, *, timeout_s: float = 10.0) -> int:
        """See `HAProtocol`."""
        self._check_open()
        async with self._within(timeout_s, "what was acknowledged before is applied here"):
            head = await self._journal.head(timeout_s=timeout_s)
            await self._applying.reach(head)
        return self._applying.index

    @contextlib.asynccontextmanager
    async def _within(self, timeout_s: float, what: str) -> AsyncIterator[None]:
        """Turn the end of the time into the error that says most: nobody leads, or it took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise self._too_late(what, timeout_s, None) from None

    def _too_late(self, what: str, timeout_s: float, last: errors.Error | None) -> errors.Error:
        observed = self._election.observed
        known = last is None or not isinstance(last, errors.TimedOut | errors.Unreachable)
        if observed.role in {Role.UNKNOWN, Role.INIT} and known:
            return errors.UnknownMaster(f"not within {timeout_s:.1f} s: {what}; {observed.reason}")
        reason = "" if last is None else f"; last: {last.message}"
        return errors.TimedOut(f"not within {timeout_s:.1f} s: {what}{reason}")

    async def _fetch_state(self) -> int:
        """Bring the state up to the floor: the mirror needs entries that are gone."""
        await self._applying.settle()
        await self._copies.fetch()
        self._around.metrics.add("srengine_ha_etcd_states_fetched_total")
        return await self._applying.replaced()

    async def _maintain(self) -> None:
        """Make copies; as leader, trim."""
        while True:
            await asyncio.sleep(MAINTENANCE_S)
            try:
                await self._copies.maybe_make(self._applying.index)
                writer = self._leading()
                if writer is not None:
                    await self._copies.maybe_trim(writer.term)
            except (*TRANSIENT, errors.NotReady) as error:
                _logger.info("no copy of the state was made: %s", error)
            except errors.DiskFull as error:
                self._around.alarm("state_copy", f"no copy of the state could be written: {error.message}")

    async def _look_after(self) -> None:
        """While this node leads: make unstable nodes stable that have caught up, and end old tickets."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._leading() is None:
                self._unstable_since.clear()
                continue
            try:
                await self._look_at_unstable()
                for command in self._tickets.due(self._clock.boottime_s(), read_tickets(self._rows)):
                    await self.propose(command, timeout_s=self.settings.lease_s)
            except errors.Error as error:
                _logger.info("looking after members: %s", error.message, extra={"event": "look_after"})

    async def _look_at_unstable(self) -> None:
        now = self._clock.boottime_s()
        unstable = {
            member.node_id: member for member in self._members if member.role == "follower" and not member.stable
        }
        self._unstable_since = {node: self._unstable_since.get(node, now) for node in unstable}
        for node, member in sorted(unstable.items()):
            long_enough = now - self._unstable_since[node] >= self.settings.unstable_grace_s
            if node in self._mirror.sessions and long_enough and await self._has_caught_up(member):
                await self._set_stable(member, stable=True)

    # --- members -----------------------------------------------------------------------------------------------------

    async def get_leader(self) -> str:
        """See `HAProtocol`."""
        return self._leading_member().address

    async def get_leader_name(self) -> str:
        """See `HAProtocol`."""
        return self._leading_member().name

    def _leading_member(self) -> Member:
        self._check_open()
        observed, candidacy = self._election.observed, self._mirror.candidacy
        if observed.leader is None or candidacy is None:
            raise errors.UnknownMaster(observed.reason)
        for member in self._members:
            if member.node_id == candidacy.node_id:
                return member
        raise errors.UnknownMaster(f"{candidacy.name} holds the election and is no member that this node knows")

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        """See `HAProtocol`."""
        self._check_open()
        leader = "" if include_leader else self._election.observed.leader
        return sorted(member.name for member in self._members if member.votes and member.name != leader)

    async def get_observer_nodes(self) -> list[str]:
        """See `HAProtocol`."""
        self._check_open()
        return sorted(member.name for member in self._members if member.role == "observer")

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
        member = self._find(change.name)
        if not await self._has_caught_up(member):
            raise errors.NotReady(f"{change.name} has not caught up", name=change.name, final=True)

    async def _has_caught_up(self, member: Member) -> bool:
        """Return whether a node says in time that it has applied all that is in the journal now."""
        try:
            await self._ask_applied(member, self._applying.index, self.settings.catch_up_s)
        except errors.Error:
            return False
        return True

    def _find(self, name: str) -> Member:
        self._check_open()
        for member in self._members:
            if member.name == name:
                return member
        raise errors.MemberNotFound(f"{name[:128]} is no member", name=name[:128])

    async def _change(self, kind: str, body: msgspec.Struct, *, force: bool = False) -> None:
        await self.propose(Command(kind, msgspec.msgpack.encode(body)), force=force)

    async def add_node(
        self,
        name: str,
        node_id: str,
        address: str,
        *,
        role: MemberRole = "follower",
        public_key: str = "",
        ticket: bytes = b"",
    ) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        holders = [member for member in self._members if member.name == name or member.address == address]
        replaces = Holder(holders[0].node_id, holders[0].incarnation) if holders else None
        await self._change(ADD, AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(REMOVE, RemoveMember(name, self._find(name).node_id), force=force)

    async def set_role(self, name: str, role: MemberRole, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(SET_ROLE, SetRole(name, self._find(name).node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(UPDATE_ADDRESS, UpdateAddress(name, self._find(name).node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._set_stable(self._find(name), stable=False)

    async def remove_unstable_node(self, name: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._set_stable(self._find(name), stable=True)

    async def _set_stable(self, member: Member, *, stable: bool) -> None:
        await self._change(SET_STABLE, SetStable(member.name, member.node_id, stable=stable))

    # --- the leadership ----------------------------------------------------------------------------------------------

    async def resign(self, reason: str) -> None:
        """See `HAProtocol`."""
        self._end_leadership(reason)
        await self._election.resign(held_back_s=2.0 * self.settings.lease_s)

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """See `HAProtocol`."""
        wanted = "" if target is None else self._find(target).node_id
        last: errors.Error | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._check_open()
                    try:
                        return await self._transfer_once(wanted, timeout_s)
                    except errors.Error as error:
                        if not _passes(error):
                            raise
                        last = error
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise self._too_late("the leadership handed over", timeout_s, last) from last

    async def _transfer_once(self, wanted: str, timeout_s: float) -> str:
        leading = self._leading_member()
        if leading.node_id == wanted:
            return leading.name
        if self._election.term:
            return (await self._hand_over(wanted, timeout_s)).name
        message = TransferLeader(wanted, timeout_s)
        reply, _ = await self._around.wire.request(NodeId(leading.node_id), message, timeout_s=timeout_s)
        if not isinstance(reply, Transferred):
            raise errors.FrameError(f"a transfer was answered with {type(reply).__name__}")
        for member in self._members:
            if member.node_id == reply.leader:
                return member.name
        return reply.leader

    async def _hand_over(self, wanted: str, timeout_s: float) -> Member:
        member = self._successor(wanted)
        writer = self._leading()
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
            for member in self._members
            if member.votes
            and member.node_id != self._node_id
            and (said := self._mirror.session(member.node_id)) is not None
            and wanted in {"", member.node_id}
        ]
        if not candidates:
            who = next((member.name for member in self._members if member.node_id == wanted), "no other member")
            raise errors.MasterState(f"the leadership stays: {who} cannot lead now (not alive, or no voter)")
        return max(candidates, key=lambda candidate: (candidate[0], candidate[1].name))[1]

    # --- what other nodes ask ----------------------------------------------------------------------------------------

    async def _serve_propose(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, Propose), message
        self._check_sender(node)
        writer = self._leading()
        if writer is None:
            self._leader_elsewhere()  # raises when there is none
            raise errors.NotLeader(f"{self._name} does not lead", leader=self._election.observed.leader or "")
        command = Command(message.kind, message.body, message.epoch, message.request)
        if (
            len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX
            or len(command.request) != REQUEST_BYTES
            or command.epoch < 0
        ):
            raise errors.InvalidValue("a proposal with values that cannot be meant")
        try:
            acknowledge = Acknowledge(message.acknowledge)
        except ValueError:
            raise errors.InvalidValue(f"no acknowledgement policy: {message.acknowledge[:40]!r}") from None
        timeout_s = _bounded(message.timeout_s)
        async with self._within(timeout_s, f"{command.kind} acknowledged"):
            work = self._propose_here(writer, command, acknowledge, timeout_s, force=message.force)
            return Proposed(await self._while_leading(writer, work)), ()

    async def _while_leading(self, writer: EtcdWriter, work: Coroutine[Any, Any, int]) -> int:
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

    async def _serve_await_applied(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, AwaitApplied), (node, message)
        async with self._within(_bounded(message.timeout_s), f"journal index {message.index} applied here"):
            await self._applying.reach(message.index)
        return AppliedAt(self._applying.index), ()

    async def _serve_transfer(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, TransferLeader), message
        self._check_sender(node)
        if not self._election.term:
            raise errors.NotLeader(f"{self._name} does not lead", leader=self._election.observed.leader or "")
        return Transferred((await self._hand_over(message.target, _bounded(message.timeout_s))).node_id), ()

    async def _serve_belongs(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del message, attachments
        self._check_sender(node)
        return MemberStanding(any(member.node_id == node for member in self._members), self._applying.index), ()

    def _check_sender(self, node: NodeId) -> None:
        """Refuse a node that was removed, and tell it so."""
        self._check_open()
        removed = find_removed(self._rows, node)
        if removed is not None:
            raise was_removed(removed)


def _passes(error: errors.Error) -> bool:
    """Return whether another try, perhaps at another node, may succeed: leaders change, connections break."""
    if error.details.get("final"):
        return False
    return isinstance(error, errors.NoLeader | errors.NotReady | errors.Unreachable | errors.TimedOut)


def _bounded(timeout_s: float) -> float:
    return min(max(timeout_s, 0.0), PROPOSE_S_MAX)
