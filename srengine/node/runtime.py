"""A running node: everything wired, in the order in which it starts and stops.

::

    lock the directory -> identity -> ports -> (found, join or be let in: bootstrap.py) -> boot number
    -> backend of coordination and role (ha/) -> tablets -> ready

* A node that belongs to no cluster answers introductions only.
* The boot number is raised durably before anything of the new run is told to anybody.
* *Ready*: the first member when all tablets that it leads are served; others when they are members and answer (a read
  there waits, is passed on, or says NOT_READY until the replica is current).
* Two things are led, by nodes of their own: the *journal* by whoever is elected and fenced (coordination.py), and until
  tablets are groups of consensus all *tablets* by the first member (`leads_tablets`).

Stopping (`stop`): leadership is handed over, no new requests, what was begun finishes or ends with `Closed`, tasks end,
the store closes. A fault that nobody expected takes the same way with the error as the reason; a node is never half
alive.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.clock import Clock, SystemClock
from srengine.cluster import catalog
from srengine.ha import epochs
from srengine.ha.contact import Contact
from srengine.ha.group import Surroundings
from srengine.ha.members import Member, MembersApplier, find_removed, read_events, was_removed
from srengine.ha.messages import Introduce, Introduction, KnownMember
from srengine.ha.metadata import MetadataMachine
from srengine.ha.protocol import HAProtocol, Role
from srengine.ha.registers import RegistersApplier
from srengine.ha.roster_machine import Process
from srengine.metrics import Metrics
from srengine.node import bootstrap, coordination, status
from srengine.node.agreed import Agreed
from srengine.node.alarms import Alarms
from srengine.node.identity import Identity, load_identity, new_identity, save_identity, started
from srengine.node.identity import file_id as identity_file_id
from srengine.node.membership import MembershipServices
from srengine.node.options import NodeOptions
from srengine.node.peers import PeerServices
from srengine.node.ports import Ports
from srengine.node.reach import Ways
from srengine.node.services import Services
from srengine.node.supervisor import Supervisor
from srengine.node.trust import NODE_TABLE, Trust
from srengine.node.watch import Watch
from srengine.node.wire import NodeWire
from srengine.storage import MetadataStore, Store
from srengine.sync.messages import ReplicaStates, ReplicaStatesReply
from srengine.sync.service import SyncService
from srengine.transport import Peer, Reply
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

THREADS: Final = 32
STATES_TIMEOUT_S: Final = 1.5
DRAIN_S: Final = 5.0
SAY_AGAIN_S: Final = 5.0
_INITIAL: Final = b"initial"
"""Local row: addresses of ``--initial``, the index at which they were first given, and the members that they moved."""


class Runtime:
    """One node on the running event loop. `start`, then wait for `supervisor.failed`, then `stop`."""

    def __init__(self, options: NodeOptions, *, clock: Clock | None = None) -> None:
        self.options = options.checked()
        self.name = self.options.name
        self.clock: Clock = clock or SystemClock()
        self.metrics = Metrics()
        self.alarm = Alarms(self.clock, self.metrics)
        self.identity = new_identity(self.name, self.options.cluster)
        self.identity_kept = False
        """Whether the directory holds the identity."""
        self.copied = False
        self.told_members: tuple[KnownMember, ...] = ()
        """Members as the cluster that let this node in has told them; used until the journal tells better."""
        self.bootstrapped = False
        self.stopping = False
        self.coordination: coordination.Coordination = None  # type: ignore[assignment]  # before the node has a cluster
        self._nonce = secrets.token_hex(8)
        self._stack = contextlib.AsyncExitStack()
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # --- the start ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start; returns when the node is ready, raises the reason when it cannot be."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="srengine")
        loop.set_default_executor(threads)
        self.supervisor = Supervisor()
        options = self.options
        self.store = Store(
            options.data,
            map_bytes=options.map_bytes,
            allow_remote_fs=options.allow_remote_fs,
            insecure=options.insecure,
        )
        self._stack.callback(self.store.close)
        self._load_identity()
        self.metadata = MetadataStore(
            options.data / "meta", insecure=options.insecure, allow_remote_fs=options.allow_remote_fs
        )
        self._stack.callback(self.metadata.close)
        self.machine = MetadataMachine(
            self.metadata, [epochs.EpochsApplier(), MembersApplier(), RegistersApplier(), catalog.CatalogApplier()]
        )
        self.ports = Ports(options, self.identity, self.metrics, self._admit)
        self.endpoint = await self.ports.open()
        self._stack.push_async_callback(self.endpoint.close)
        self.ways = Ways(self.endpoint, self._introduce)
        self.settling = bootstrap.Settling(self)
        self.endpoint.serve(Introduce, self._introduced, ports=("client",))
        await self.ports.listen(self.endpoint)
        self._stack.push_async_callback(self._stop_coordination)
        # NB: ends first what waits for coordination, which would call its end a fault.
        self._stack.push_async_callback(self.supervisor.stop)
        self._compare_options()
        self.wire = NodeWire(self.endpoint, self.ways, self.supervisor.spawn, self._given)
        await self._or_failure(asyncio.ensure_future(self.settling.run()))
        await self._begin()
        self.bootstrapped = True
        await self._or_failure(asyncio.ensure_future(self._wait_ready()))

    async def _or_failure(self, work: asyncio.Future[None]) -> None:
        """Wait for ``work``, or raise why the node must stop."""
        ends: set[asyncio.Future[Any]] = {work, self.supervisor.failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            raise self.supervisor.failed.result()
        work.result()

    def _load_identity(self) -> None:
        options = self.options
        loaded = load_identity(options.data, insecure=options.insecure)
        if loaded is None:
            self.identity = new_identity(self.name, options.cluster)
            return
        found = loaded.identity
        if found.name != self.name:
            raise errors.ForeignData(
                f"{options.data} is the directory of node {found.name}, not of {self.name}", name=found.name
            )
        if options.cluster and found.cluster_name and found.cluster_name != options.cluster:
            raise errors.ForeignData(
                f"{options.data} belongs to cluster {found.cluster_name}, not to {options.cluster}",
                cluster=found.cluster_name,
            )
        self.identity_kept = True
        self.copied = loaded.copied and bool(found.cluster_id)
        self.identity = started(loaded) if found.cluster_id else found
        if not self.identity.cluster_name:
            self.identity = replace(self.identity, cluster_name=options.cluster)

    def adopt(self, identity: Identity) -> None:
        """Take a changed identity: durable, then told on new connections."""
        save_identity(self.options.data, identity)
        self.identity = identity
        self.identity_kept = True
        self.endpoint.identity = self.ports.transport_identity(identity)

    def _admit(self, peer: Peer) -> None:
        if peer.port != "client" and not self.identity.cluster_id:
            # NB: not foreign: whoever lets this node in may call before it has heard the answer.
            raise errors.NotReady(f"{self.name} belongs to no cluster yet, the peer to {peer.cluster_id}")
        if peer.port != "client" and peer.cluster_id != self.identity.cluster_id:
            raise errors.ForeignData(
                f"{self.name} belongs to {self.identity.cluster_id}, the peer to {peer.cluster_id}"
            )
        if peer.port != "client" and self.bootstrapped and peer.node_id:
            removed = find_removed(self.machine.store, peer.node_id)
            if removed is not None:
                raise was_removed(removed)

    # --- wiring ------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        self.trust = Trust(self)
        self.trust.open()
        self.contact = Contact(
            name=self.name,
            process=lambda: Process(self.identity.node_id, self.identity.boot_number, self._nonce),
            copied=lambda: self.copied,
            store=self.metadata,
            clock=self.clock,
            on_refused=self.trust.refused,
            on_restored=self.trust.restored,
            on_foreign=self.supervisor.fail,
        )
        self.around = Surroundings(
            name=self.name,
            contact=self.contact,
            reach=self.ways.reach,
            clock=self.clock,
            spawn=self.supervisor.spawn,
            alarm=self.alarm,
        )
        self.coordination = coordination.Coordination(self)
        self.backend: HAProtocol = self.coordination.backend
        self.agreed = Agreed(self.machine.store, self.backend, self.wire, self.ports.allow)
        self.agreed.read_members()
        self._know_told()
        self.sync = SyncService(
            around=self.around,
            store=self.store,
            rows=self.machine.store,
            standing=self.trust.standing,
            file_ids=identity_file_id,
            metrics=self.metrics,
            directory_trusted=self.trust.trusted,
            scrub_bytes_s=self.options.scrub_bytes_s,
            scrub_interval_s=self.options.scrub_interval_s,
        )
        self._stack.callback(self.sync.close)
        PeerServices(self).register()
        Services(self).register()
        MembershipServices(self).register()
        await self.coordination.start()
        await self.agreed.refresh(self.sync)
        self.trust.opened()
        self.sync.start()
        self.supervisor.spawn(self.agreed.follow(self.sync), "follow the journal")
        self.supervisor.spawn(self.agreed.look_again(self.sync), "look at the agreed state")
        self.supervisor.spawn(self._call_members(), "call members")
        self.supervisor.spawn(Watch(self).run(), "watch")

    def _given(self, name: str, address: str, public_key: str) -> tuple[str, str]:
        """Return where a member is: as its row says, unless the command line has since named another address.

        So a whole cluster can be started at new addresses, although nobody could put them into the journal.
        """
        self.ports.allow(name, public_key)
        given = {each.name: each for each in self.options.initial}.get(name)
        if given is None or name not in self._moved_by_options:
            return address, public_key
        moved_at = max((row.index for row in read_events(self.machine.store) if row.name == name), default=0)
        if moved_at > self._options_index:
            return address, public_key
        return given.address, given.public_key or public_key

    def _compare_options(self) -> None:
        """Find out which members ``--initial`` has at another address than at the last start that named it."""
        before = self.metadata.get(NODE_TABLE, _INITIAL)
        self._moved_by_options: set[str] = set()
        self._options_index = 0
        if not self.options.initial:
            return
        now = {member.name: member.address for member in self.options.initial}
        if before is not None:
            known, self._options_index, moved = msgspec.msgpack.decode(
                before, type=tuple[dict[str, str], int, list[str]]
            )
            self._moved_by_options = set(moved)
            if known == now:
                return
            self._moved_by_options = {name for name in now if name in known and known[name] != now[name]}
            self._options_index = self.machine.applied_index
        row = (now, self._options_index, sorted(self._moved_by_options))
        with self.metadata.transaction() as transaction:
            transaction.put(NODE_TABLE, _INITIAL, msgspec.msgpack.encode(row))

    def _know_told(self) -> None:
        """Know the members of a cluster that this node has just founded or entered, before its journal names them."""
        known = {member.node_id for member in self.agreed.members}
        for told in self.told_members or self.settling.first_members():
            if told.node_id and told.node_id not in known:
                self.ports.allow(told.name, told.public_key)
                self.wire.know(NodeId(told.node_id), told.name, told.address, told.public_key)

    def distrust_groups(self, reason: str) -> None:
        """Tell coordination and every tablet that the directory is an older state."""
        self.coordination.distrust()
        self.sync.distrust(reason)

    # --- members and tables ------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """Members as shown here, in the order of their numbers."""
        return self.agreed.members

    @property
    def tables(self) -> dict[str, catalog.Table]:
        """Tables as shown here, by name."""
        return self.agreed.tables

    @property
    def leads_tablets(self) -> bool:
        """Whether this is the first member, which leads all tablets for now."""
        return self.identity.number == 0

    @property
    def first(self) -> str:
        """Name of the member that leads all tablets for now."""
        return self.agreed.first or (self.options.initial[0].name if self.options.initial else self.name)

    @property
    def public_key(self) -> str:
        """The own public key in hexadecimal, empty where none is used."""
        return self.ports.public_key

    @property
    def advertised(self) -> str:
        """The client address at which others reach this node."""
        return self.ports.addresses["client"]

    def address_of(self, name: str) -> str:
        """Return a member's client address, empty for a stranger."""
        return self.ways[name].address if self.ways.knows(name) else ""

    def is_alive(self, name: str) -> bool:
        """Return whether the member is this node, or is connected."""
        return name == self.name or self.wire.connected(name)

    async def wait_catalog(self, timeout_s: float) -> None:
        """Return when members and tables here hold all that was acknowledged; `NoQuorum` and below, `TimedOut`."""
        await self.agreed.wait_current(self.sync, timeout_s)

    async def wait_for_table(self, name: str, timeout_s: float) -> None:
        """Return when the table is in this node's catalog and its tablets are open here; `TimedOut`."""
        await self.agreed.wait_for_table(name, timeout_s)

    async def _call_members(self) -> None:
        """Introduce this node to all members, so that those that gave up connecting try again at once."""
        for member in self.members:
            if member.name != self.name:
                with contextlib.suppress(errors.Error):
                    await self.ways[member.name].introduce()

    # --- ready -------------------------------------------------------------------------------------------------------

    async def _wait_ready(self) -> None:
        if self.leads_tablets:
            while True:
                try:
                    await self.wait_catalog(SAY_AGAIN_S)
                    for leader in list(self.sync.leaders.values()):
                        await leader.driver.wait_serving(SAY_AGAIN_S)
                    break
                except (errors.NoQuorum, errors.TimedOut) as error:
                    _logger.info("not ready: %s", error.message, extra={"event": "waiting"})
                    await asyncio.sleep(bootstrap.ASK_AGAIN_S)
        _logger.info("ready", extra={"event": "ready", "address": self.ports.addresses["client"]})

    def why_not_ready(self) -> str:
        """Return why this node should be asked nothing that must be current, empty when it may be."""
        if self.stopping:
            return "it is stopping"
        if not self.bootstrapped:
            return "it is starting"
        if self.coordination.role in {Role.INIT, Role.UNKNOWN}:
            return "it hears no leader"
        if not self.backend.current:
            return (
                f"it has applied the journal up to {self.backend.applied_index}, and for {limits.STALENESS_S_MAX:g} s "
                f"not what the leader called committed"
            )
        return ""

    def ready_event(self) -> dict[str, object]:
        """Return what the command line prints when the node is ready."""
        return {
            "event": "ready",
            "name": self.name,
            "id": self.identity.node_id,
            "cluster": self.identity.cluster_name,
            "cluster_id": self.identity.cluster_id,
            "address": self.ports.addresses["client"],
            "peer_address": self.ports.addresses["peer"],
            "bulk_address": self.ports.addresses["bulk"],
            "leader": self.backend.observed.leader,
        }

    # --- what arrives ------------------------------------------------------------------------------------------------

    def _introduce(self) -> Introduce:
        return Introduce(self.name, self.identity.cluster_name, self._initial())

    def _initial(self) -> tuple[str, ...]:
        return tuple(f"{member.name}={member.address}" for member in self.options.initial)

    async def _introduced(self, peer: Peer, message: Introduce, attachments: Sequence[memoryview]) -> Reply:
        del peer, attachments
        if message.name and message.name != self.name:
            self.ways.wake(message.name)
            if self.bootstrapped:
                self.wire.wake(message.name)
                if message.name == self.first:
                    self.contact.leader_called()
        if not self.identity.cluster_id and self.settling.agrees(message.cluster_name, message.initial):
            # Who asks may found a cluster with this very id.
            self.settling.keep_id()
        return Reply(
            Introduction(
                name=self.name,
                node_id=self.identity.node_id,
                cluster_name=self.identity.cluster_name,
                cluster_id=self.identity.cluster_id,
                initial=self._initial(),
                peer_address=self.ports.addresses.get("peer", ""),
                bulk_address=self.ports.addresses.get("bulk", ""),
                boot_number=self.identity.boot_number,
                members=bootstrap.known(self.members) if self.bootstrapped else (),
                bootstrap=self.settling.first_entry(),
            )
        )

    # --- status ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count a client's request; `NotReady` while the node stops."""
        if self.stopping:
            raise errors.NotReady(f"{self.name} is stopping")
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    def own_states(self, table: str = "") -> ReplicaStatesReply:
        """Return what this node says of itself."""
        usage = shutil.disk_usage(self.options.data)
        why = self.why_not_ready()
        return ReplicaStatesReply(
            replicas=tuple(self.sync.states(table)),
            name=self.name,
            node_id=self.identity.node_id,
            state=self.coordination.role.value,
            ready=not why,
            why=why,
            journal_index=self.backend.applied_index,
            disk_used=status.directory_bytes(self.options.data),
            disk_free=usage.free,
            alarms=tuple(self.alarm.kept),
        )

    async def _states(self, table: str = "") -> dict[str, ReplicaStatesReply | None]:
        async def ask(name: str) -> ReplicaStatesReply | None:
            if name == self.name:
                return await asyncio.to_thread(self.own_states, table)
            try:
                reply = await self.ways[name].request(ReplicaStates(table), timeout_s=STATES_TIMEOUT_S)
            except errors.Error:
                return None
            return reply.message if isinstance(reply.message, ReplicaStatesReply) else None

        names = [member.name for member in self.members]
        answers = await asyncio.gather(*(ask(name) for name in names))
        return dict(zip(names, answers, strict=True))

    async def status(self, node: str = "") -> dict[str, Any]:
        """Return the JSON of docs/cli.md (State)."""
        return status.cluster_status(self, await self._states(), node)

    async def sync_status(self, table: str = "") -> list[dict[str, Any]]:
        """Return one object for each replica of each tablet."""
        return status.replica_status(self, await self._states(table), table)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _stop_coordination(self) -> None:
        if self.coordination is not None:
            await self.coordination.stop()

    async def stop(self) -> None:
        """Stop in order: leadership is handed over, no new requests, those begun have `DRAIN_S` to end; idempotent."""
        if self.bootstrapped and not self.stopping:
            await self.coordination.hand_over()
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._idle.wait()
        stack, self._stack = self._stack, contextlib.AsyncExitStack()
        await stack.aclose()
