"""What a node answers to clients: catalog, writes, reads, scans, sessions.

Every request finds its table and tablet in this node's catalog. What needs the leader goes to it: here, when this node
leads the tablet, else it is passed on over the peer port (a node that is asked there and does not lead says
`NotLeader`, so nothing goes in circles). A `local` read is answered by this node's replica or not at all; `one` prefers
it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from srengine import errors, limits
from srengine.client import messages, packing
from srengine.cluster import catalog
from srengine.ha import epochs
from srengine.ha import leader_machine as lm
from srengine.ha.journal import Command
from srengine.node.repairs import run_rounds
from srengine.storage import Batch, check_operations
from srengine.storage.entries import KIND_OPEN_SESSION
from srengine.sync.leading import TabletLeader
from srengine.sync.reading import Found, Range
from srengine.transport import Peer, Reply
from srengine.transport.peers import Buffer
from srengine.types import Record

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_logger = logging.getLogger(__name__)

CHECK_INLINE_BYTES_MAX = 64 * limits.KIB
TIMEOUT_S_MAX = 600.0
CATALOG_WAIT_S_MAX = 5.0
"""How long a question to the catalog waits until this node has applied all that was acknowledged."""
_Handler = Callable[[Peer, Any, Sequence[memoryview]], Awaitable[Reply]]
_WRITE_NEEDS = {"quorum": lm.Need.QUORUM, "all": lm.Need.ALL}


class Services:
    """Handlers of the client protocol."""

    def __init__(self, runtime: Runtime) -> None:
        self._node = runtime

    def register(self) -> None:
        """Put the handlers on the ports."""
        serve = self._node.endpoint.serve
        serve(messages.ClusterInfo, self.cluster_info)
        serve(messages.Status, self.status)
        serve(messages.SyncStatus, self.sync_status)
        serve(messages.SyncRun, self._counted(self.sync_run))
        serve(messages.CreateDatabase, self.create_database)
        serve(messages.ListDatabases, self.list_databases)
        serve(messages.CreateTable, self.create_table)
        serve(messages.ListTables, self.list_tables)
        serve(messages.DescribeTable, self.describe_table)
        serve(messages.OpenSession, self._counted(self.open_session))
        serve(messages.Write, self._counted(self.write))
        serve(messages.Read, self._counted(self.read))
        serve(messages.Scan, self._counted(self.scan))

    def _counted(self, handler: _Handler) -> _Handler:
        """Count requests: a stopping node finishes what it began and takes nothing new."""

        async def counted(peer: Peer, message: Any, attachments: Sequence[memoryview]) -> Reply:
            with self._node.working():
                return await handler(peer, message, attachments)

        return counted

    # --- the cluster -------------------------------------------------------------------------------------------------

    async def cluster_info(self, peer: Peer, message: messages.ClusterInfo, attachments: Sequence[memoryview]) -> Reply:
        """Answer from this node's catalog."""
        del peer, message, attachments
        node = self._node
        # Where things are must be told without a majority, too: a hint that every node checks for itself.
        return Reply(
            messages.ClusterInfoReply(
                cluster_id=node.identity.cluster_id,
                cluster_name=node.identity.cluster_name,
                nodes=tuple(
                    messages.NodeInfo(
                        member.name,
                        member.node_id,
                        node.address_of(member.name),
                        node.is_alive(member.name),
                        member.public_key,
                    )
                    for member in node.members
                ),
                tables=tuple(self._info(table) for table in node.tables.values()),
                catalog_version=node.agreed.index,
                epoch=epochs.newest_epoch(node.machine.store)[0],
            )
        )

    async def status(self, peer: Peer, message: messages.Status, attachments: Sequence[memoryview]) -> Reply:
        """See docs/cli.md (State)."""
        del peer, attachments
        return Reply(messages.StatusReply(msgspec.json.encode(await self._node.status(message.node))))

    async def sync_status(self, peer: Peer, message: messages.SyncStatus, attachments: Sequence[memoryview]) -> Reply:
        """See docs/cli.md (State)."""
        del peer, attachments
        if message.table:
            await self._table(message.table)
        return Reply(messages.SyncStatusReply(msgspec.json.encode(await self._node.sync_status(message.table))))

    async def sync_run(self, peer: Peer, message: messages.SyncRun, attachments: Sequence[memoryview]) -> Reply:
        """See docs/cli.md (State)."""
        del peer, attachments
        if message.table:
            await self._table(message.table)
        rounds = await run_rounds(self._node, message.table, message.timeout_s)
        return Reply(messages.SyncRunReply(msgspec.json.encode(rounds)))

    # --- catalog -----------------------------------------------------------------------------------------------------

    async def create_database(
        self, peer: Peer, message: messages.CreateDatabase, attachments: Sequence[memoryview]
    ) -> Reply:
        """Put it into the journal."""
        del peer, attachments
        command = catalog.CreateDatabase(message.name)
        await self._node.backend.propose(Command(catalog.CREATE_DATABASE, msgspec.msgpack.encode(command)))
        return Reply(messages.DatabaseList((message.name,)))

    async def list_databases(
        self, peer: Peer, message: messages.ListDatabases, attachments: Sequence[memoryview]
    ) -> Reply:
        """Answer from this node's catalog."""
        del peer, message, attachments
        await self._node.wait_catalog(CATALOG_WAIT_S_MAX)
        databases = await asyncio.to_thread(catalog.read_databases, self._node.machine.store)
        return Reply(messages.DatabaseList(tuple(database.name for database in databases)))

    async def create_table(self, peer: Peer, message: messages.CreateTable, attachments: Sequence[memoryview]) -> Reply:
        """Put it into the journal; wait until it can be written, if the member that leads tablets is there."""
        del peer, attachments
        timeout_s = checked_timeout(message.timeout_s)
        node = self._node
        sentence = f"table {message.name} is perhaps created, and not writable yet"
        async with Within(timeout_s, sentence):
            await node.wait_catalog(timeout_s)
            table = catalog.design_table(
                message.name,
                tablets=message.tablets,
                replicas=message.replicas,
                members=[member.name for member in node.members if member.role == "follower"],
            )
            command = Command(catalog.CREATE_TABLE, msgspec.msgpack.encode(catalog.CreateTable(table)))
            await node.backend.propose(command, timeout_s=timeout_s)
            await node.agreed.refresh(node.sync)
            await node.wait_for_table(message.name, timeout_s)
            if node.leads_tablets:
                for tablet in table.tablets:
                    await node.sync.leaders[tablet.id].driver.wait_serving(timeout_s)
            elif node.is_alive(node.first):
                await self._served(message.name, timeout_s)
        return Reply(self._info(table))

    async def _served(self, table: str, timeout_s: float) -> None:
        """Return when the member that leads the table's tablets serves them, or does not answer at all."""
        question = messages.DescribeTable(table, served=True)
        try:
            await self._node.ways[self._node.first].request(question, timeout_s=timeout_s)
        except errors.Unreachable as error:
            _logger.warning("table %s is created; nobody serves it yet: %s", table, error.message)

    async def list_tables(self, peer: Peer, message: messages.ListTables, attachments: Sequence[memoryview]) -> Reply:
        """Answer from this node's catalog."""
        del peer, attachments
        await self._node.wait_catalog(CATALOG_WAIT_S_MAX)
        tables = [table for table in self._node.tables.values() if message.database in {"", table.database}]
        return Reply(messages.TableList(tuple(self._info(table) for table in tables)))

    async def describe_table(
        self, peer: Peer, message: messages.DescribeTable, attachments: Sequence[memoryview]
    ) -> Reply:
        """Answer from this node's catalog, which is brought up to date when it does not know the table."""
        del peer, attachments
        table = await self._table(message.name)
        if message.served and self._node.leads_tablets:
            for tablet in table.tablets:
                await self._led(tablet).driver.wait_serving(CATALOG_WAIT_S_MAX)
        return Reply(self._info(table))

    def _info(self, table: catalog.Table) -> messages.TableInfo:
        address = self._node.address_of
        return messages.TableInfo(
            table.name,
            tuple(
                messages.TabletInfo(tablet.id, address(tablet.leader), tuple(address(node) for node in tablet.nodes))
                for tablet in table.tablets
            ),
            table.replicas,
        )

    # --- writing -----------------------------------------------------------------------------------------------------

    async def open_session(self, peer: Peer, message: messages.OpenSession, attachments: Sequence[memoryview]) -> Reply:
        """Make a session known to every tablet of the table."""
        timeout_s = checked_timeout(message.timeout_s)
        table = await self._table(message.table)
        if not self._node.leads_tablets:
            return await self._pass_on(peer, message, attachments, timeout_s)
        session = secrets.token_bytes(16)
        batch = Batch(b"", session, 0, KIND_OPEN_SESSION)
        await asyncio.gather(*(self._led(tablet).write(batch, lm.Need.QUORUM, timeout_s) for tablet in table.tablets))
        return Reply(messages.SessionOpened(session))

    async def write(self, peer: Peer, message: messages.Write, attachments: Sequence[memoryview]) -> Reply:
        """Apply operations to one tablet; answered when the replicas hold them."""
        timeout_s = checked_timeout(message.timeout_s)
        need = _WRITE_NEEDS.get(message.consistency)
        if need is None:
            raise errors.InvalidValue(f"a write is consistent at quorum or all, not {message.consistency[:40]!r}")
        if message.session and len(message.session) != 16:
            raise errors.InvalidValue(f"a session has 16 bytes, not {len(message.session)}")
        table = await self._table(message.table)
        tablet = _tablet(table, message.tablet)
        leader = self._node.sync.leaders.get(tablet.id)
        if leader is None:
            return await self._pass_on(peer, message, attachments, timeout_s, tablet.leader)
        operations = await self._operations(attachments)
        outcome = await leader.write(Batch(operations, message.session, message.number), need, timeout_s)
        return Reply(
            messages.WriteReply(
                bytes(outcome.results),
                outcome.first_sequence,
                outcome.last_sequence,
                outcome.root,
                outcome.duplicate,
            )
        )

    @staticmethod
    async def _operations(attachments: Sequence[memoryview]) -> bytes:
        operations = bytes(packing.single(attachments))
        if len(operations) > limits.ENTRY_BYTES_MAX:
            raise errors.InvalidValue(f"{len(operations)} bytes of operations are too many for one entry")
        # Checked before it shares a transaction with the writes of others.
        if len(operations) <= CHECK_INLINE_BYTES_MAX:
            count = check_operations(operations)
        else:
            count = await asyncio.to_thread(check_operations, operations)
        if not count:
            raise errors.InvalidValue("a write needs an operation")
        return operations

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, peer: Peer, message: messages.Read, attachments: Sequence[memoryview]) -> Reply:
        """Look keys up."""
        timeout_s = checked_timeout(message.timeout_s)
        if not 1 <= len(message.keys) <= limits.READ_KEYS_MAX:
            raise errors.InvalidValue(f"a read has 1 to {limits.READ_KEYS_MAX} keys, not {len(message.keys)}")
        table = await self._table(message.table)
        tablet = _tablet(table, message.tablet)
        bytes_max = _checked_bytes(message.bytes_max)
        place = self._place(tablet, message.consistency)
        if place == "here":
            follower = self._node.sync.followers[tablet.id]
            found, as_of = await follower.read(message.keys, bytes_max=bytes_max, timeout_s=timeout_s)
        elif place == "leader":
            need = lm.Need.ALL if message.consistency == "all" else lm.Need.QUORUM
            found, as_of = await self._led(tablet).read(
                message.keys,
                bytes_max=bytes_max,
                need=need,
                timeout_s=timeout_s,
                local=message.consistency in {"local", "one"},
            )
        else:
            return await self._pass_on(peer, _at_leader(message), attachments, timeout_s, tablet.leader)
        return _read_reply(found, as_of)

    async def scan(self, peer: Peer, message: messages.Scan, attachments: Sequence[memoryview]) -> Reply:
        """Read a range of one tablet."""
        timeout_s = checked_timeout(message.timeout_s)
        if message.limit < 0:
            raise errors.InvalidValue(f"limit {message.limit} is negative")
        table = await self._table(message.table)
        tablet = _tablet(table, message.tablet)
        bytes_max = _checked_bytes(message.bytes_max)
        place = self._place(tablet, message.consistency)
        if place == "here":
            found, as_of = await self._node.sync.followers[tablet.id].scan(
                start=message.start,
                stop=message.stop,
                reverse=message.reverse,
                limit=message.limit,
                bytes_max=bytes_max,
                keys_only=message.keys_only,
                timeout_s=timeout_s,
            )
        elif place == "leader":
            found, as_of = await self._led(tablet).scan(
                start=message.start,
                stop=message.stop,
                reverse=message.reverse,
                limit=message.limit,
                bytes_max=bytes_max,
                keys_only=message.keys_only,
                need=lm.Need.ALL if message.consistency == "all" else lm.Need.QUORUM,
                timeout_s=timeout_s,
                local=message.consistency in {"local", "one"},
            )
        else:
            return await self._pass_on(peer, _at_leader(message), attachments, timeout_s, tablet.leader)
        return _scan_reply(found, as_of)

    def _place(self, tablet: catalog.Tablet, consistency: str) -> str:
        """Return where a read is answered: ``leader`` (which is here), ``here`` by a replica, ``away``."""
        if consistency not in {"local", "one", "quorum", "all"}:
            raise errors.InvalidValue(f"a read is consistent at local, one, quorum or all, not {consistency[:40]!r}")
        sync = self._node.sync
        if tablet.id in sync.leaders:
            return "leader"
        follower = sync.followers.get(tablet.id)
        if consistency == "local":
            if follower is None:
                raise errors.NotReady(f"{self._node.name} has no replica of this tablet; ask {', '.join(tablet.nodes)}")
            return "here"
        if consistency == "one" and follower is not None and follower.synced:
            return "here"
        return "away"

    # --- ways --------------------------------------------------------------------------------------------------------

    async def _table(self, name: str) -> catalog.Table:
        """Return a table; `NotFound` only after all that was acknowledged is applied here."""
        catalog.check_table_name(name)
        table = self._node.tables.get(name)
        if table is None:
            await self._node.wait_catalog(CATALOG_WAIT_S_MAX)
            table = self._node.tables.get(name)
        if table is None:
            raise errors.NotFound(f"there is no table {name}", name=name)
        return table

    def _led(self, tablet: catalog.Tablet) -> TabletLeader:
        leader = self._node.sync.leaders.get(tablet.id)
        if leader is None:
            raise errors.NotReady(f"tablet {tablet.id} is being opened")
        return leader

    async def _pass_on(
        self,
        peer: Peer,
        message: msgspec.Struct,
        attachments: Sequence[Buffer],
        timeout_s: float,
        leader: str = "",
    ) -> Reply:
        """Let the leader answer; `NotLeader` when it was a node that asked."""
        leader = leader or self._node.first
        if peer.port == "peer":
            raise errors.NotLeader(
                f"{self._node.name} does not lead; {leader} does", leader=self._node.address_of(leader)
            )
        try:
            return await self._node.ways[leader].request(message, attachments, timeout_s=timeout_s + 1.0)
        except errors.Unreachable as error:
            raise errors.NoLeader(
                f"the leader {leader} cannot be reached from {self._node.name}: {error.message}",
                leader=self._node.address_of(leader),
                sent=bool(error.details.get("sent", True)),
            ) from error


def _at_leader(message: messages.Read | messages.Scan) -> messages.Read | messages.Scan:
    """``one`` at the leader is ``quorum``: it has nothing to prefer."""
    if message.consistency == "one":
        return msgspec.structs.replace(message, consistency="quorum")
    return message


def _tablet(table: catalog.Table, number: int) -> catalog.Tablet:
    if not 0 <= number < len(table.tablets):
        raise errors.InvalidValue(f"table {table.name} has tablets 0 to {len(table.tablets) - 1}, not {number}")
    return table.tablets[number]


def checked_timeout(timeout_s: float) -> float:
    """Return the seconds that a client allows; `InvalidValue` for what cannot be meant."""
    if not 0 <= timeout_s <= TIMEOUT_S_MAX:
        raise errors.InvalidValue(f"a timeout of {timeout_s} s is not within 0 to {TIMEOUT_S_MAX:g}")
    return timeout_s


def _checked_bytes(bytes_max: int) -> int:
    if bytes_max < 1:
        raise errors.InvalidValue(f"bytes_max {bytes_max} is not positive")
    return min(bytes_max, limits.VALUE_BYTES_MAX)


def _read_reply(found: Found, as_of: float) -> Reply:
    packed = packing.pack_records([_packed(record) for record in found.records])
    return Reply(messages.ReadReply(len(found.records), as_of), (packed,))


def _packed(record: Record | None) -> packing.PackedRecord:
    if record is None:
        return packing.PackedRecord(None)
    return packing.PackedRecord(record.value, record.version, record.hybrid_clock)


def _scan_reply(found: Range, as_of: float) -> Reply:
    return Reply(messages.ScanReply(len(found.pairs), found.done, as_of), (packing.pack_pairs(found.pairs),))


class Within:
    """``async with Within(seconds, sentence)``: `TimedOut` with the sentence instead of the bare time-out."""

    def __init__(self, timeout_s: float, sentence: str) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._sentence = sentence

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *what: object) -> None:
        try:
            await self._timeout.__aexit__(*what)  # type: ignore[arg-type]
        except TimeoutError:
            raise errors.TimedOut(self._sentence) from None
