"""A running node: everything wired, in the order in which it starts and stops.

::

    lock the directory -> identity -> ports -> (bootstrap, or ask the first member) -> boot number -> journal -> tablets
    -> ready

* A node that belongs to no cluster answers introductions only.
* The boot number is raised durably before anything of the new run is told to anybody.
* *Ready*: the first member when the journal and all tablets are served; others when they are members and answer (a read
  there waits, is passed on, or says NOT_READY until the replica is current).

Stopping (`stop`): no new requests, what was begun finishes or ends with `Closed`, tasks end, the store closes. A fault
that nobody expected takes the same way with the error as the reason; a node is never half alive.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.clock import Clock, SystemClock
from srengine.cluster import catalog
from srengine.ha.contact import Contact
from srengine.ha.epochs import EpochsApplier
from srengine.ha.group import Surroundings
from srengine.ha.journal import Command
from srengine.ha.journal_store import JournalStore
from srengine.ha.members import IDENTIFY, Identify, Member, MembersApplier, read_members
from srengine.ha.messages import (
    Introduce,
    Introduction,
)
from srengine.ha.metadata import MetadataMachine
from srengine.ha.one_node import FollowingJournal, LeadingJournal
from srengine.ha.roster_machine import Process
from srengine.metrics import Metrics
from srengine.node import bootstrap, status
from srengine.node.identity import Identity, load_identity, new_identity, save_identity, started
from srengine.node.identity import file_id as identity_file_id
from srengine.node.options import NodeOptions
from srengine.node.peers import PeerServices
from srengine.node.reach import Ways
from srengine.node.services import Services
from srengine.node.supervisor import Supervisor
from srengine.node.trust import Trust
from srengine.security import AllowList, ensure_node_keys, load_allow_list, prove_closed
from srengine.storage import MetadataStore, Store
from srengine.sync.messages import ReplicaStates, ReplicaStatesReply
from srengine.sync.service import SyncService
from srengine.transport import Endpoint, Peer, Reply
from srengine.transport import Identity as TransportIdentity
from srengine.transport.addresses import stays_on_this_machine

_logger = logging.getLogger(__name__)

THREADS: Final = 32
ALARMS_KEPT: Final = 50
ALARM_AGAIN_S: Final = 60.0
STATES_TIMEOUT_S: Final = 1.5
DRAIN_S: Final = 5.0
SAY_AGAIN_S: Final = 5.0
CONTACT_WAIT_S_MAX: Final = 2.0
"""How long a question for an unknown table waits for the leader to be heard; as long as a `local` read waits."""


class Runtime:
    """One node on the running event loop. `start`, then wait for `ready` or `failed`, then `stop`."""

    def __init__(self, options: NodeOptions, *, clock: Clock | None = None) -> None:
        self.options = options.checked()
        self.name = self.options.name
        self.clock: Clock = clock or SystemClock()
        self.metrics = Metrics()
        self.identity = new_identity(self.name, self.options.cluster)
        self.members: list[Member] = []
        self.tables: dict[str, catalog.Table] = {}
        self.catalog_index = 0
        """``tables`` and ``members`` show the journal up to here; never ahead of what is applied."""
        self.alarms: deque[str] = deque(maxlen=ALARMS_KEPT)
        self.addresses: dict[str, str] = {}
        """Real addresses of the own ports, by port."""
        self.bootstrapped = False
        self.stopping = False
        self._nonce = secrets.token_hex(8)
        self._stack = contextlib.AsyncExitStack()
        self._tables_changed = asyncio.Condition()
        self._said: dict[str, float] = {}
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
        await self._load_identity()
        self.metadata = MetadataStore(
            options.data / "meta", insecure=options.insecure, allow_remote_fs=options.allow_remote_fs
        )
        self._stack.callback(self.metadata.close)
        await self._open_ports()
        self._stack.push_async_callback(self.supervisor.stop)
        self.machine = MetadataMachine(self.metadata, [MembersApplier(), EpochsApplier(), catalog.CatalogApplier()])
        settled = bootstrap.Settling(self)
        work = asyncio.ensure_future(settled.run())
        await self._or_failure(work)
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

    async def _load_identity(self) -> None:
        options = self.options
        loaded = load_identity(options.data, insecure=options.insecure)
        if loaded is None:
            # Not written yet: a directory that never joined a cluster stays empty.
            self.identity = new_identity(self.name, options.cluster)
            self.copied = False
        else:
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
            self.copied = loaded.copied and bool(found.cluster_id)
            self.identity = started(loaded) if found.cluster_id else found
            if not self.identity.cluster_name:
                self.identity = replace(self.identity, cluster_name=options.cluster)

    async def _open_ports(self) -> None:
        options = self.options
        listens = (options.listen, options.peer_listen, options.bulk_listen)
        keyed = any(member.public_key for member in options.initial)
        routable = not all(stays_on_this_machine(address) for address in listens)
        keys = None
        allowed: AllowList | None = None
        if keyed or (routable and not options.insecure):
            await prove_closed()
            keys = ensure_node_keys(options.data, insecure=options.insecure)
            allowed_file = options.data / "keys" / "allowed"
            allowed = load_allow_list(allowed_file, insecure=options.insecure) if allowed_file.exists() else AllowList()
            allowed.allow(keys.public, ("client", "peer", "bulk"), self.name)
            for member in options.initial:
                if member.name == self.name and member.public_key and member.public_key != keys.public.hex():
                    raise errors.Conflict(f"--initial gives {self.name} another key than {options.data}/keys holds")
                if member.public_key:
                    allowed.allow(bytes.fromhex(member.public_key), ("client", "peer", "bulk"), member.name)
        self.endpoint = Endpoint(
            self._transport_identity(keys),
            authenticator=allowed,
            admit=self._admit,
            insecure=options.insecure,
            metrics=self.metrics,
        )
        self._stack.push_async_callback(self.endpoint.close)
        self.ways = Ways(self.endpoint, self._introduce)
        self.endpoint.serve(Introduce, self._introduced, ports=("client",))
        self.addresses["client"] = await self.endpoint.listen("client", options.listen)
        self.addresses["peer"] = await self.endpoint.listen("peer", options.peer_listen)
        self.addresses["bulk"] = await self.endpoint.listen("bulk", options.bulk_listen)

    def _transport_identity(self, keys: Any) -> TransportIdentity:
        return TransportIdentity(
            node_id=self.identity.node_id, name=self.name, cluster_id=self.identity.cluster_id or None, keys=keys
        )

    def adopt(self, identity: Identity) -> None:
        """Take a changed identity: durable, then told on new connections."""
        save_identity(self.options.data, identity)
        self.identity = identity
        self.endpoint.identity = self._transport_identity(self.endpoint.identity.keys)

    def _admit(self, peer: Peer) -> None:
        if peer.port != "client" and (not self.identity.cluster_id or peer.cluster_id != self.identity.cluster_id):
            raise errors.ForeignData(
                f"{self.name} belongs to {self.identity.cluster_id or 'no cluster'}, the peer to {peer.cluster_id}"
            )

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
        self.journal_store = JournalStore(self.metadata, self.identity.cluster_id)
        self._read_members()
        self._make_journal()
        self.sync = SyncService(
            around=self.around,
            store=self.store,
            rows=self.metadata,
            standing=self.trust.standing,
            file_ids=identity_file_id,
            metrics=self.metrics,
            directory_trusted=self.trust.trusted,
        )
        self._stack.callback(self._close_groups)
        self._serve()
        # NB: before anything more is applied: what is read below holds at least this, and the rest is followed.
        self.catalog_index = self.journal.applied_index
        self.journal.start()
        await self._read_tables()
        self.trust.opened()
        self.supervisor.spawn(self._follow_journal(), "catalog")
        self.supervisor.spawn(self._call_members(), "call members")
        if self.leads:
            self.supervisor.spawn(self._identify_members(), "identify members")

    def _make_journal(self) -> None:
        self.journal: LeadingJournal | FollowingJournal
        if self.leads:
            others = [member.name for member in self.members if member.name != self.name]
            self.journal = LeadingJournal(
                self.journal_store, self.machine, others=others, trusted=self.trust.trusted(), around=self.around
            )
        else:
            self.journal = FollowingJournal(
                self.journal_store, self.machine, leader=self.first, trusted=self.trust.trusted, around=self.around
            )

    def _serve(self) -> None:
        PeerServices(self).register()
        Services(self).register()

    def distrust_groups(self, reason: str) -> None:
        """Tell the journal and every tablet that the directory is an older state."""
        if isinstance(self.journal, LeadingJournal):
            self.journal.distrust(reason)
        self.sync.distrust(reason)

    def _close_groups(self) -> None:
        self.sync.close()
        self.journal.close()

    # --- members and tables ------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this is the first member."""
        return self.identity.number == 0

    @property
    def first(self) -> str:
        """Name of the first member, which leads everything for now."""
        if self.members:
            return self.members[0].name
        return self.options.initial[0].name

    def _read_members(self) -> None:
        self.members = read_members(self.metadata)
        given = {member.name: member for member in self.options.initial}
        known = [(member.name, member.address, member.public_key) for member in self.members] or [
            (member.name, member.address, member.public_key) for member in self.options.initial
        ]
        for name, address, public_key in known:
            # What the command line says is newer than what the journal remembers.
            if name in given:
                address, public_key = given[name].address, given[name].public_key  # noqa: PLW2901
            self.ways.know(name, address, public_key)

    def address_of(self, name: str) -> str:
        """Return a member's client address, empty for a stranger."""
        return self.ways[name].address if self.ways.knows(name) else ""

    def is_alive(self, name: str) -> bool:
        """Return whether the member is this node or was heard lately; nodes other than the first hear the first
        only.
        """
        if name == self.name:
            return True
        if self.leads:
            return self.contact.alive(name)
        return name != self.first or self.journal.current

    async def _read_tables(self) -> None:
        tables = await asyncio.to_thread(catalog.read_tables, self.metadata)
        await self.sync.open_tables(tables)
        async with self._tables_changed:
            self.tables = {table.name: table for table in tables}
            self._tables_changed.notify_all()

    async def _follow_journal(self) -> None:
        async for index, command in self.journal.subscribe(self.catalog_index + 1):
            self._read_members()
            if command.kind == catalog.CREATE_TABLE:
                await self._read_tables()
            async with self._tables_changed:
                self.catalog_index = index
                self._tables_changed.notify_all()

    async def wait_catalog(self, timeout_s: float) -> None:
        """Return when the catalog here answers for all that was acknowledged; `NotReady`.

        On the first member that is what stood in the journal when it began to serve; others ask it when they miss
        something.
        """
        if not isinstance(self.journal, LeadingJournal):
            return
        await self.journal.driver.wait_serving(timeout_s)
        floor = self.journal.driver.machine.served_from
        if self.catalog_index >= floor:
            return
        try:
            async with asyncio.timeout(timeout_s), self._tables_changed:
                await self._tables_changed.wait_for(lambda: self.catalog_index >= floor)
        except TimeoutError:
            raise errors.NotReady(
                f"the catalog stands at {self.catalog_index}, {floor} may be acknowledged", index=self.catalog_index
            ) from None

    async def wait_for_table(self, name: str, timeout_s: float) -> None:
        """Return when the table is in this node's catalog and its tablets are open here; `TimedOut`."""
        try:
            async with asyncio.timeout(timeout_s), self._tables_changed:
                await self._tables_changed.wait_for(lambda: name in self.tables)
        except TimeoutError:
            raise errors.TimedOut(f"table {name} is not known on {self.name} yet", name=name) from None

    async def _wait_contact(self) -> None:
        """Return when this follower's journal is current; `NotReady` when that takes longer than a moment."""
        assert isinstance(self.journal, FollowingJournal), self.journal
        try:
            async with asyncio.timeout(CONTACT_WAIT_S_MAX):
                while not self.journal.current:
                    self.journal.driver.changed.clear()
                    await self.journal.driver.changed.wait()
        except TimeoutError:
            raise errors.NotReady(f"{self.name} has no contact with {self.first} yet") from None

    async def table_of_leader(self, name: str) -> catalog.Table | None:
        """Return a table that this node learns of within a moment, None when there is none then."""
        await self._wait_contact()
        with contextlib.suppress(errors.TimedOut):
            await self.wait_for_table(name, limits.PULL_HOLD_S)
        table = self.tables.get(name)
        if table is None and self.catalog_index < self.journal_store.position.sequence:
            # An entry is here that the leader did not call committed yet; it may be the one.
            raise errors.NotReady(f"{self.name} does not know yet whether there is a table {name}", name=name)
        return table

    async def _identify_members(self) -> None:
        """Record the ids under which members show themselves, when they are not the known ones."""
        while True:
            await asyncio.sleep(1.0)
            for member in self.members:
                node_id = self.identity.node_id if member.name == self.name else self.contact.node_id(member.name)
                if node_id is None or node_id == member.node_id or not self.journal.current:
                    continue
                command = Command(IDENTIFY, msgspec.msgpack.encode(Identify(member.name, node_id)))
                try:
                    await self.journal.propose(command, timeout_s=5.0)
                except errors.Error as error:
                    _logger.warning("cannot record the id of %s: %s", member.name, error.message)

    async def _call_members(self) -> None:
        """Introduce this node to all members, so that those that gave up connecting try again at once."""
        for member in self.members:
            if member.name != self.name:
                with contextlib.suppress(errors.Error):
                    await self.ways[member.name].introduce()

    # --- alarms ------------------------------------------------------------------------------------------------------

    def alarm(self, event: str, message: str) -> None:
        """Say what a person must see: log, status, counter; the same thing once a minute."""
        self.metrics.add("srengine_node_alarms_total", event=event)
        now = self.clock.monotonic_s()
        text = f"{event}: {message}"
        if now - self._said.get(text, -ALARM_AGAIN_S) < ALARM_AGAIN_S:
            return
        if len(self._said) >= ALARMS_KEPT:
            self._said.clear()
        self._said[text] = now
        _logger.error("%s: %s", event, message, extra={"event": event})
        if text not in self.alarms:
            self.alarms.append(text)

    # --- ready -------------------------------------------------------------------------------------------------------

    async def _wait_ready(self) -> None:
        if self.leads:
            assert isinstance(self.journal, LeadingJournal)
            while True:
                try:
                    await self.wait_catalog(SAY_AGAIN_S)
                    for leader in list(self.sync.leaders.values()):
                        await leader.driver.wait_serving(SAY_AGAIN_S)
                    break
                except (errors.NotReady, errors.TimedOut) as error:
                    _logger.info("not ready: %s", error.message, extra={"event": "waiting"})
        _logger.info("ready", extra={"event": "ready", "address": self.addresses["client"]})

    def ready_event(self) -> dict[str, object]:
        """Return what the command line prints when the node is ready."""
        return {
            "event": "ready",
            "name": self.name,
            "id": self.identity.node_id,
            "cluster": self.identity.cluster_name,
            "cluster_id": self.identity.cluster_id,
            "address": self.addresses["client"],
            "peer_address": self.addresses["peer"],
            "bulk_address": self.addresses["bulk"],
            "leader": self.first,
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
            if self.bootstrapped and message.name == self.first:
                self.contact.leader_called()
        return Reply(
            Introduction(
                name=self.name,
                node_id=self.identity.node_id,
                cluster_name=self.identity.cluster_name,
                cluster_id=self.identity.cluster_id,
                initial=self._initial(),
                peer_address=self.addresses.get("peer", ""),
                bulk_address=self.addresses.get("bulk", ""),
                boot_number=self.identity.boot_number,
                members=tuple(member.name for member in self.members),
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
        return ReplicaStatesReply(
            replicas=tuple(self.sync.states(table)),
            name=self.name,
            node_id=self.identity.node_id,
            state="LEADER" if self.leads else "FOLLOWER",
            journal_index=self.journal.applied_index,
            disk_used=status.directory_bytes(self.options.data),
            disk_free=usage.free,
            alarms=tuple(self.alarms),
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

    async def stop(self) -> None:
        """Stop in order: no new requests, those begun have `DRAIN_S` to end; idempotent."""
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._idle.wait()
        stack, self._stack = self._stack, contextlib.AsyncExitStack()
        await stack.aclose()
