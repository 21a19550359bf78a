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
from srengine.ha import fencing, membership
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_applying import EtcdApplying
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_copies import EtcdCopies
from srengine.ha.backends.etcd_election import EtcdElection
from srengine.ha.backends.etcd_journal import EtcdJournal
from srengine.ha.backends.etcd_keys import Keys
from srengine.ha.backends.etcd_messages import Forward, Forwarded, HandedOver, Handover
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_session import RENEWALS, TRANSIENT, EtcdSession
from srengine.ha.backends.etcd_writer import EtcdWriter
from srengine.ha.epochs import claim, newest_epoch, read_epoch
from srengine.ha.journal import REQUEST_BYTES, Command, encode_command
from srengine.ha.members import (
    ADD,
    REMOVE,
    SET_ROLE,
    SET_STABLE,
    UPDATE_ADDRESS,
    AddMember,
    Bootstrap,
    Holder,
    Member,
    MemberRole,
    RemoveMember,
    SetRole,
    SetStable,
    UpdateAddress,
    find_member,
    read_cluster,
    read_members,
)
from srengine.ha.outcomes import Outcome
from srengine.ha.protocol import Fencing, Observed, Role
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
FORWARD_RETRY_S: Final = 0.1
FRESH_S: Final = limits.STALENESS_S_MAX
DRAIN_S: Final = 2.0
ENDED_GRACE_S: Final = 0.5
"""How long a former leader still waits to apply what it has appended for others."""


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Settings of the backend, by the names under which `HAOptions.settings` has them.

    ``cluster_id``: needed while the node's own state does not say it yet. ``kept``: entries that stay in etcd when the
    journal is trimmed.
    """

    etcd: EtcdOptions
    cluster_id: str = ""
    lease_s: int = LEASE_S
    kept: int = KEPT

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> EtcdSettings:
        """Check and return them; `errors.InvalidValue` for an unknown name or an impossible value."""
        known = {"servers", "user", "password", "ca_file", "cert_file", "key_file"}
        own = {"cluster_id", "lease_s", "kept"}
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
        return made


async def found_cluster(options: EtcdOptions, bootstrap: Bootstrap, *, timeout_s: float = 10.0) -> str:
    """Found a cluster in etcd unless its name is taken; return the cluster id that the name has.

    When it is not that of ``bootstrap``, another node was first and nothing was changed: adopt the id that is returned,
    or refuse. All first members may call this at once, again and again.
    """
    client = EtcdClient(options)
    try:
        check_name(bootstrap.cluster.name, "cluster")
        journal = EtcdJournal(client, Keys(bootstrap.cluster.cluster_id))
        first = encode_command(Command("ha.bootstrap", msgspec.msgpack.encode(bootstrap)))
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
        keys = self._keys = Keys(self.cluster_id)
        self._journal = EtcdJournal(self._client, keys, clock=around.clock)
        self._applying = EtcdApplying(self._machine, applied=self._applied, stuck=self._stuck)
        self._members: list[Member] = []
        self._member: Member | None = None
        """This node in the agreed state."""
        self._session = EtcdSession(
            self._client,
            keys,
            node_id=self._node_id,
            name=self._name,
            lease_s=self.settings.lease_s,
            clock=around.clock,
            applied=lambda: self._applying.index,
            changed=self._changed,
        )
        self._mirror = EtcdMirror(
            self._client,
            keys,
            self._journal,
            clock=around.clock,
            delivered=self._applying.index,
            deliver=self._applying.deliver,
            fetch=self._fetch_state,
            changed=self._changed,
        )
        self._election = EtcdElection(
            self._client,
            keys,
            mirror=self._mirror,
            session=self._session,
            node_id=self._node_id,
            name=self._name,
            clock=around.clock,
            applied=lambda: self._applying.index,
            member=lambda: self._member,
            moved=self._moved,
        )
        self._copies = EtcdCopies(
            self._client,
            keys,
            self._journal,
            self._mirror,
            machine=self._machine,
            wire=around.wire,
            directory=around.data_dir / BACKEND,
            node_id=self._node_id,
            name=self._name,
            kept=self.settings.kept,
        )
        self._writer: EtcdWriter | None = None
        self._writing: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        """One change of membership at a time."""
        self._tasks: list[asyncio.Task[None]] = []
        self._started = False
        self._stopped = False

    def _own_cluster_id(self) -> str:
        known = read_cluster(self._rows)
        told = self.settings.cluster_id
        if known is None:
            if not told:
                raise errors.InvalidValue("which cluster in etcd is this node's? Its directory does not say; cluster_id")
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
        wire.serve(Forward, self._serve_forward)
        wire.serve(Handover, self._serve_handover)
        spawn = self._around.spawn
        self._tasks = [
            spawn(self._mirror.run(), "etcd: follow"),
            spawn(self._mirror.beat(), "etcd: ask"),
            spawn(self._applying.run(), "etcd: apply"),
            spawn(self._session.run(), "etcd: lease"),
            spawn(self._election.look_out(), "etcd: look out"),
            spawn(self._election.stand(), "etcd: stand"),
            spawn(self._maintain(), "etcd: maintain"),
        ]

    async def _check_history(self) -> None:
        """What this node has applied must be what etcd holds."""
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
        """What is acknowledged cannot be applied here: another node should lead."""
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
        there = {member.node_id for member in members}
        for member in members:
            if member.node_id and member.node_id != self._node_id and member not in before:
                self._around.wire.know(NodeId(member.node_id), member.name, member.address, member.public_key)
        for member in before:
            if member.node_id and member.node_id not in there:
                self._around.wire.forget(NodeId(member.node_id))

    def _moved(self, observed: Observed) -> None:
        """The election says something new."""
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
        """The writer found that the leadership is over."""
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

    async def propose(self, command: Command, *, timeout_s: float = 10.0) -> int:
        """See `HAProtocol`."""
        return await self._propose(command, force=False, timeout_s=timeout_s)

    async def _propose(self, command: Command, *, force: bool, timeout_s: float) -> int:
        self._check_open()
        if not command.request:
            command = msgspec.structs.replace(command, request=secrets.token_bytes(REQUEST_BYTES))
        async with self._within(timeout_s, f"{command.kind} acknowledged; it may still be"):
            while True:
                writer = self._leading()
                if writer is not None:
                    return await self._write(writer, command, force=force)
                index = await self._forward(command, force=force, timeout_s=timeout_s)
                if index is not None:
                    await self._applying.reach(index)
                    return index
                await asyncio.sleep(FORWARD_RETRY_S)
                self._check_open()

    async def _write(self, writer: EtcdWriter, command: Command, *, force: bool) -> int:
        if membership.is_membership(command.kind):
            async with self._planning:
                await self._applying.reach(writer.head)
                membership.plan(
                    self._rows,
                    command,
                    index=self._applying.index + 1,
                    leader=self._node_id,
                    alive=[NodeId(node_id) for node_id in {*self._mirror.sessions, self._node_id}],
                    force=force,
                )
                outcome = await writer.write(command)
        else:
            outcome = await writer.write(command)
        refusal = outcome.refusal
        if refusal is not None:
            raise refusal
        return outcome.index

    async def _forward(self, command: Command, *, force: bool, timeout_s: float) -> int | None:
        """Let the leader propose it; None when there is none, or it cannot be asked, or does not act as one yet."""
        leader = self._leader_elsewhere()
        if leader is None:
            return None
        message = Forward(command.kind, command.body, command.epoch, command.request, timeout_s, force)
        try:
            reply, _ = await self._around.wire.request(leader, message, timeout_s=timeout_s)
        except (errors.Unreachable, errors.UnknownMaster, errors.NotReady, errors.Closed, errors.TimedOut) as error:
            _logger.info("%s could not be forwarded: %s", command.kind, error)
            return None
        if not isinstance(reply, Forwarded):
            raise errors.FrameError(f"a forwarded command was answered with {type(reply).__name__}")
        return reply.index

    def _leader_elsewhere(self) -> NodeId | None:
        observed = self._election.observed
        candidacy = self._mirror.candidacy
        if observed.leader is None or candidacy is None or candidacy.node_id == self._node_id:
            return None
        return NodeId(candidacy.node_id)

    async def _serve_forward(self, asker: NodeId, message: msgspec.Struct, _: Attachments) -> Answer:
        assert isinstance(message, Forward), (asker, message)
        self._check_open()
        writer = self._leading()
        if writer is None:
            raise errors.UnknownMaster(f"{self._name} does not lead")
        command = Command(message.kind, message.body, message.epoch, message.request)
        async with self._within(message.timeout_s, f"{command.kind} acknowledged"):
            return Forwarded(await self._write_while_leading(writer, command, force=message.force)), ()

    async def _write_while_leading(self, writer: EtcdWriter, command: Command, *, force: bool) -> int:
        """Write for another node. When the leadership ends meanwhile, that node must not wait for an entry to be applied
        here: it asks the next leader, which finds the request's outcome.
        """
        work = asyncio.ensure_future(self._write(writer, command, force=force))
        ended = asyncio.ensure_future(writer.ended.wait())
        try:
            await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await asyncio.wait({work}, timeout=ENDED_GRACE_S)
            if not work.done():
                raise errors.TimedOut(f"{self._name} leads no more; whether the command will stand is unknown")
            return work.result()
        finally:
            for task in (work, ended):
                task.cancel()

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
            observed = self._election.observed
            if observed.role in {Role.UNKNOWN, Role.INIT}:
                raise errors.UnknownMaster(f"not within {timeout_s:.1f} s: {what}; {observed.reason}") from None
            raise errors.TimedOut(f"not within {timeout_s:.1f} s: {what}") from None

    async def _fetch_state(self) -> int:
        """The mirror needs entries that are gone."""
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
        leader = None if include_leader else self._leading_member().name
        return sorted(member.name for member in self._members if member.votes and member.name != leader)

    async def get_observer_nodes(self) -> list[str]:
        """See `HAProtocol`."""
        self._check_open()
        return sorted(member.name for member in self._members if member.role == "observer")

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
        holders = [member for member in self._members if member.name == name or member.address == address]
        replaces = Holder(holders[0].node_id, holders[0].incarnation) if len(holders) == 1 else None
        await self._change(ADD, AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self._change(REMOVE, RemoveMember(name, self._find(name).node_id), force=force)

    async def set_role(self, name: str, role: MemberRole, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self._change(SET_ROLE, SetRole(name, self._find(name).node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        """See `HAProtocol`."""
        await self._change(UPDATE_ADDRESS, UpdateAddress(name, self._find(name).node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        """See `HAProtocol`."""
        await self._change(SET_STABLE, SetStable(name, self._find(name).node_id, stable=False))

    async def remove_unstable_node(self, name: str) -> None:
        """See `HAProtocol`: it has caught up when it has applied what the journal held when this was called."""
        member = self._find(name)
        head = await self._journal.head()
        try:
            async with asyncio.timeout(self.settings.lease_s):
                while not self._holds(member, head):
                    await asyncio.sleep(self.settings.lease_s / RENEWALS / 2)
        except TimeoutError:
            said = self._mirror.session(member.node_id)
            where = "is not alive" if said is None else f"has applied {said.applied} of {head} entries"
            raise errors.NotReady(f"{name} has not caught up: it {where}", name=name) from None
        await self._change(SET_STABLE, SetStable(name, member.node_id, stable=True))

    def _holds(self, member: Member, index: int) -> bool:
        if member.node_id == self._node_id:
            return self._applying.index >= index
        said = self._mirror.session(member.node_id)
        return said is not None and said.applied >= index

    def _find(self, name: str) -> Member:
        self._check_open()
        member = find_member(self._rows, name)
        if member is None:
            raise errors.MemberNotFound(f"{name} is no member", name=name)
        return member

    async def _change(self, kind: str, body: msgspec.Struct, *, force: bool = False) -> None:
        await self._propose(Command(kind, msgspec.msgpack.encode(body)), force=force, timeout_s=10.0)

    # --- the leadership ----------------------------------------------------------------------------------------------

    async def resign(self, reason: str) -> None:
        """See `HAProtocol`."""
        self._end_leadership(reason)
        await self._election.resign(held_back_s=2.0 * self.settings.lease_s)

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """See `HAProtocol`."""
        self._check_open()
        if self._election.term:
            return await self._hand_over(target, timeout_s)
        leader = self._leader_elsewhere()
        if leader is None:
            raise errors.UnknownMaster(self._election.observed.reason)
        reply, _ = await self._around.wire.request(leader, Handover(target or "", timeout_s), timeout_s=timeout_s)
        if not isinstance(reply, HandedOver):
            raise errors.FrameError(f"a handover was answered with {type(reply).__name__}")
        return reply.name

    async def _serve_handover(self, asker: NodeId, message: msgspec.Struct, _: Attachments) -> Answer:
        assert isinstance(message, Handover), (asker, message)
        self._check_open()
        if not self._election.term:
            raise errors.UnknownMaster(f"{self._name} does not lead")
        return HandedOver(await self._hand_over(message.target or None, message.timeout_s)), ()

    async def _hand_over(self, target: str | None, timeout_s: float) -> str:
        member = self._successor(target)
        writer = self._leading()
        if writer is not None:
            # What is written already is answered first; what comes now fails or is answered by the successor.
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
        return member.name

    def _successor(self, target: str | None) -> Member:
        """Return who takes over: the one named, or the alive voter that has applied most."""
        if target is not None:
            member = self._find(target)
            if member.node_id == self._node_id:
                raise errors.MasterState(f"{target} leads already", name=target)
            if not member.votes:
                raise errors.MasterState(f"{target} may not lead: it is an observer or has not caught up", name=target)
            if self._mirror.session(member.node_id) is None:
                raise errors.MasterState(f"{target} is not alive", name=target)
            return member
        best: tuple[int, str] | None = None
        chosen: Member | None = None
        for member in self._members:
            said = self._mirror.session(member.node_id)
            if member.votes and member.node_id != self._node_id and said is not None:
                rank = (said.applied, member.name)
                if best is None or rank > best:
                    best, chosen = rank, member
        if chosen is None:
            raise errors.MasterState("no other member can lead now")
        return chosen

