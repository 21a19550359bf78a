"""Backend ``etcd``: an existing etcd holds election, epochs and journal; the nodes hold the agreed state.

For users who run an etcd, or more members than a group of ours should have. The parts, one file each::

    etcd_session    this node's lease: for how long it may believe that it leads
    etcd_mirror     what etcd says of the cluster, followed by a watch
    etcd_election   who leads, and the campaign
    etcd_journal    entries in etcd: appended under the election key, read, trimmed
    etcd_applying   entries into the agreed state of this node
    etcd_leading    what this node does while it leads; etcd_writer: what it writes
    etcd_roster     the members as this node has applied them
    etcd_copies     copies of the state at two nodes, before the journal is trimmed
    etcd_settings, etcd_keys, etcd_client, etcd_http    settings, keys, gateway, HTTP

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
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors, limits
from srengine.ha import fencing
from srengine.ha.backends.etcd_applying import EtcdApplying
from srengine.ha.backends.etcd_client import EtcdClient
from srengine.ha.backends.etcd_copies import EtcdCopies
from srengine.ha.backends.etcd_election import EtcdElection
from srengine.ha.backends.etcd_journal import EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import Keys
from srengine.ha.backends.etcd_leading import EtcdLeading
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_roster import EtcdRoster
from srengine.ha.backends.etcd_session import TRANSIENT, EtcdSession
from srengine.ha.backends.etcd_settings import EtcdSettings
from srengine.ha.epochs import newest_epoch
from srengine.ha.journal import REQUEST_BYTES, Command, new_request
from srengine.ha.members import (
    ADD,
    REMOVE,
    SET_ROLE,
    SET_STABLE,
    UPDATE_ADDRESS,
    AddMember,
    Holder,
    Member,
    MemberRole,
    RemoveMember,
    SetRole,
    SetStable,
    UpdateAddress,
    read_cluster,
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
from srengine.ha.protocol import Acknowledge, Observed
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.ha.backends import Answer, Attachments, Surroundings

_logger = logging.getLogger(__name__)

BACKEND: Final = "etcd"
MAINTENANCE_S: Final = 1.0
"""How often copies of the state are thought of."""
RETRY_S: Final = 0.05
"""Pause before something is asked again, of whoever leads then."""


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
        self._roster = EtcdRoster(around)
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
        self._leading = EtcdLeading(
            around,
            place,
            self.settings,
            journal=self._journal,
            applying=self._applying,
            mirror=self._mirror,
            session=self._session,
            roster=self._roster,
            propose=self._propose_own,
        )
        self._election = EtcdElection(
            place,
            self._mirror,
            self._session,
            applied=lambda: self._applying.index,
            member=lambda: self._roster.own,
            removed=lambda: self._roster.removed is not None,
            knows=lambda node_id: self._roster.by_id(node_id) is not None,
            moved=self._leading.moved,
        )
        self._leading.join(self._election)
        self._copies = EtcdCopies(
            place,
            self._journal,
            self._mirror,
            machine=self._machine,
            wire=around.wire,
            directory=around.data_dir / BACKEND,
            kept=self.settings.kept,
        )
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
        self._roster.read()
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
            spawn(self._leading.look_after(), "etcd: unstable nodes and tickets"),
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
        self._leading.end_leadership("this node stops")
        self._election.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leading.stop()
        await self._applying.close()
        if self._started:
            await self._session.end()
        self._client.close()

    def _check_open(self) -> None:
        if self._stopped or not self._started:
            raise errors.Closed("this node takes no part in coordination")
        if self._roster.removed is not None:
            raise was_removed(self._roster.removed)

    @property
    def removed(self) -> errors.Removed | None:
        """See `HAProtocol.removed`."""
        row = self._roster.removed
        return None if row is None else was_removed(row)

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
        self._roster.read()
        self._election.changed()

    def _stuck(self, error: errors.Error) -> None:
        """Give leadership away: what is acknowledged cannot be applied here."""
        self._around.alarm("journal_stuck", f"the agreed state cannot be written: {error.message}")
        if self._election.term:
            self._leading.spawn_once(self.resign("the agreed state cannot be written"), "etcd: resign")

    # --- epochs ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """See `HAProtocol`."""
        writer = self._leading.writer()
        return 0 if writer is None else writer.epoch

    async def fencing(self) -> bool:
        """See `HAProtocol`."""
        self._check_open()
        return await fencing.fence(self._leading.fence_once, self._around.options.fencing, metrics=self._around.metrics)

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
        return self._mirror.fresh(self._applying.index, limits.STALENESS_S_MAX)

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
            command = msgspec.structs.replace(command, request=new_request())
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
            raise self._election.too_late(f"{command.kind} acknowledged; it may still be", timeout_s, last) from last

    async def _propose_own(self, command: Command) -> int:
        return await self.propose(command, timeout_s=self.settings.lease_s)

    async def _propose_once(self, command: Command, acknowledge: Acknowledge, timeout_s: float, *, force: bool) -> int:
        writer = self._leading.writer()
        if writer is not None:
            return await self._leading.propose_here(writer, command, acknowledge, timeout_s, force=force)
        message = Propose(
            command.kind, command.body, timeout_s, command.epoch, command.request, force, acknowledge.value
        )
        reply, _ = await self._around.wire.request(self._leader_elsewhere(), message, timeout_s=timeout_s)
        if not isinstance(reply, Proposed):
            raise errors.FrameError(f"a proposal was answered with {type(reply).__name__}")
        await self._applying.reach(reply.index)
        return reply.index

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
        async with self._election.within(timeout_s, "what was acknowledged before is applied here"):
            head = await self._journal.head(timeout_s=timeout_s)
            await self._applying.reach(head)
        return self._applying.index

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
                writer = self._leading.writer()
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
        member = self._roster.by_id(candidacy.node_id)
        if member is not None:
            return member
        raise errors.UnknownMaster(f"{candidacy.name} holds the election and is no member that this node knows")

    async def get_electable_nodes(self, *, include_leader: bool = True) -> list[str]:
        """See `HAProtocol`."""
        self._check_open()
        leader = "" if include_leader else self._election.observed.leader
        return sorted(member.name for member in self._roster.members if member.votes and member.name != leader)

    async def get_observer_nodes(self) -> list[str]:
        """See `HAProtocol`."""
        self._check_open()
        return sorted(member.name for member in self._roster.members if member.role == "observer")

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
        holders = [member for member in self._roster.members if member.name == name or member.address == address]
        replaces = Holder(holders[0].node_id, holders[0].incarnation) if holders else None
        await self._change(ADD, AddMember(name, node_id, address, role, public_key, replaces, ticket))

    async def remove_node(self, name: str, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(REMOVE, RemoveMember(name, self._roster.find(name).node_id), force=force)

    async def set_role(self, name: str, role: MemberRole, *, force: bool = False) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(SET_ROLE, SetRole(name, self._roster.find(name).node_id, role), force=force)

    async def update_address(self, name: str, address: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._change(UPDATE_ADDRESS, UpdateAddress(name, self._roster.find(name).node_id, address))

    async def add_unstable_node(self, name: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._set_stable(self._roster.find(name), stable=False)

    async def remove_unstable_node(self, name: str) -> None:
        """See `HAProtocol`."""
        await self.read_barrier()
        await self._set_stable(self._roster.find(name), stable=True)

    async def _set_stable(self, member: Member, *, stable: bool) -> None:
        await self._change(SET_STABLE, SetStable(member.name, member.node_id, stable=stable))

    # --- the leadership ----------------------------------------------------------------------------------------------

    async def resign(self, reason: str) -> None:
        """See `HAProtocol`."""
        self._leading.end_leadership(reason)
        await self._election.resign(held_back_s=2.0 * self.settings.lease_s)

    async def transfer_leader(self, target: str | None = None, *, timeout_s: float = 10.0) -> str:
        """See `HAProtocol`."""
        wanted = "" if target is None else self._roster.find(target).node_id
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
            raise self._election.too_late("the leadership handed over", timeout_s, last) from last

    async def _transfer_once(self, wanted: str, timeout_s: float) -> str:
        leading = self._leading_member()
        if leading.node_id == wanted:
            return leading.name
        if self._election.term:
            return (await self._leading.hand_over(wanted, timeout_s)).name
        message = TransferLeader(wanted, timeout_s)
        reply, _ = await self._around.wire.request(NodeId(leading.node_id), message, timeout_s=timeout_s)
        if not isinstance(reply, Transferred):
            raise errors.FrameError(f"a transfer was answered with {type(reply).__name__}")
        member = self._roster.by_id(reply.leader)
        return reply.leader if member is None else member.name

    # --- what other nodes ask ----------------------------------------------------------------------------------------

    async def _serve_propose(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, Propose), message
        self._check_open()
        self._roster.check_sender(node)
        writer = self._leading.writer()
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
        async with self._election.within(timeout_s, f"{command.kind} acknowledged"):
            work = self._leading.propose_here(writer, command, acknowledge, timeout_s, force=message.force)
            return Proposed(await self._leading.while_leading(writer, work)), ()

    async def _serve_await_applied(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, AwaitApplied), (node, message)
        async with self._election.within(_bounded(message.timeout_s), f"journal index {message.index} applied here"):
            await self._applying.reach(message.index)
        return AppliedAt(self._applying.index), ()

    async def _serve_transfer(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del attachments
        assert isinstance(message, TransferLeader), message
        self._check_open()
        self._roster.check_sender(node)
        if not self._election.term:
            raise errors.NotLeader(f"{self._name} does not lead", leader=self._election.observed.leader or "")
        return Transferred((await self._leading.hand_over(message.target, _bounded(message.timeout_s))).node_id), ()

    async def _serve_belongs(self, node: NodeId, message: msgspec.Struct, attachments: Attachments) -> Answer:
        del message, attachments
        self._check_open()
        self._roster.check_sender(node)
        return MemberStanding(self._roster.by_id(node) is not None, self._applying.index), ()


def _passes(error: errors.Error) -> bool:
    """Return whether another try, perhaps at another node, may succeed: leaders change, connections break."""
    if error.details.get("final"):
        return False
    return isinstance(error, errors.NoLeader | errors.NotReady | errors.Unreachable | errors.TimedOut)


def _bounded(timeout_s: float) -> float:
    return min(max(timeout_s, 0.0), limits.PROPOSE_S_MAX)
