"""What a client and a node say to each other: every request with its answer, as values.

A request is answered by exactly one reply or by a typed error of `srengine.errors`. All of them are frozen structs in
map encoding, so a later version may add fields with defaults; unknown fields are ignored. Bulk bytes (operations of a
write, values of a read, pairs of a scan) never travel inside a message but as one *attachment* beside it, packed by
`srengine.client.packing`; the message carries what is needed to check the attachment's size.

Routing::

    client                      any node                        leader of the tablet
      | ClusterInfo  ------------> |                                   |
      | <--- ClusterInfoReply      |  (tables, tablets, leaders)       |
      | OpenSession(table) ------> |                                   |
      | <--- SessionOpened         |                                   |
      | Write(table, tablet, ...) ----------------------------------> |
      | <------------------------------------ WriteReply or NotLeader(leader=address)

The tablet of a key is ``XXH3-64(key, seed 0) mod tablets``. A node that does not lead a tablet either forwards a
request or refuses it with `NotLeader`, whose ``leader`` fact is the client address to ask instead ("" when nobody is
known).
"""

from __future__ import annotations

import msgspec

from srengine.codec import registry

# --- the cluster -----------------------------------------------------------------------------------------------------


class ClusterInfo(msgspec.Struct, frozen=True):
    """Ask any node for the catalog: answered by `ClusterInfoReply`. Needs no quorum; may be slightly old."""


class NodeInfo(msgspec.Struct, frozen=True):
    """One member as routing sees it."""

    name: str
    id: str
    address: str
    """Client address, ``tcp://host:port``."""
    alive: bool = True
    public_key: str = ""
    """CURVE key of the node in hexadecimal, "" where the cluster runs without keys."""


class TabletInfo(msgspec.Struct, frozen=True):
    """Where one tablet lives. ``leader`` is a client address, "" when nobody is known to lead."""

    id: str
    leader: str
    replicas: tuple[str, ...]
    """Client addresses of all replicas, the leader's included."""


class TableInfo(msgspec.Struct, frozen=True):
    """One table: ``tablets`` in the order of the tablet index."""

    name: str
    """``database.table``"""
    tablets: tuple[TabletInfo, ...]
    replicas: int


class ClusterInfoReply(msgspec.Struct, frozen=True):
    """The catalog as the answering node has applied it."""

    cluster_id: str
    cluster_name: str
    nodes: tuple[NodeInfo, ...]
    tables: tuple[TableInfo, ...]
    catalog_version: int = 0
    epoch: int = 0


class Status(msgspec.Struct, frozen=True):
    """Ask for the cluster at a glance; with ``node`` (a name) that node's own view of itself only."""

    node: str = ""


class StatusReply(msgspec.Struct, frozen=True):
    """``status`` is the JSON text (UTF-8) of docs/cli.md."""

    status: bytes


class SyncStatus(msgspec.Struct, frozen=True):
    """Ask for the state of each replica of each tablet (of one table, when ``table`` is given)."""

    table: str = ""


class SyncStatusReply(msgspec.Struct, frozen=True):
    """``replicas`` is the JSON text (UTF-8) of a list of objects.

    Keys: table, tablet, node, leader, term, state, sequence, behind, root (hexadecimal), verified_at, bytes_received,
    path, reason, scrubbed_at, scrub_records, repairs, quarantined. A replica that does not answer is listed with state
    UNKNOWN.
    """

    replicas: bytes


class SyncRun(msgspec.Struct, frozen=True):
    """Have every node read its replicas (of one table) whole now, compare them with their leaders, and repair them."""

    table: str = ""
    timeout_s: float = 600.0


class SyncRunReply(msgspec.Struct, frozen=True):
    """``rounds`` is the JSON text (UTF-8) of a list of objects, see docs/cli.md (State)."""

    rounds: bytes


# --- catalog ---------------------------------------------------------------------------------------------------------


class CreateDatabase(msgspec.Struct, frozen=True):
    """Create a database; `Conflict` when it exists. Answered by `DatabaseList` with this one."""

    name: str


class ListDatabases(msgspec.Struct, frozen=True):
    """Ask for all databases: answered by `DatabaseList`."""


class DatabaseList(msgspec.Struct, frozen=True):
    """Names in order."""

    names: tuple[str, ...]


class CreateTable(msgspec.Struct, frozen=True):
    """Create ``database.table``. Answered by `TableInfo` once a majority of each tablet's replicas can be written.

    `NotFound` without the database, `Conflict` when the table exists.
    """

    name: str
    tablets: int = 8
    replicas: int = 3
    timeout_s: float = 10.0


class ListTables(msgspec.Struct, frozen=True):
    """Ask for all tables (of one database, when given): answered by `TableList`."""

    database: str = ""


class TableList(msgspec.Struct, frozen=True):
    """Tables in order of their names."""

    tables: tuple[TableInfo, ...]


class DescribeTable(msgspec.Struct, frozen=True):
    """Ask for one table: answered by `TableInfo`, or `NotFound`. ``served``: not before its leader serves it."""

    name: str
    served: bool = False


# --- members ---------------------------------------------------------------------------------------------------------


class ListMembers(msgspec.Struct, frozen=True):
    """Ask for the members as the journal has them, linearizable: answered by `MemberList`."""


class MemberInfo(msgspec.Struct, frozen=True):
    """One member. ``stable``: a follower that votes, or an observer that has caught up once."""

    name: str
    id: str
    address: str
    role: str
    stable: bool
    incarnation: int
    public_key: str = ""


class MemberList(msgspec.Struct, frozen=True):
    """``version`` and ``digest`` (hexadecimal) are equal on all nodes for equal members."""

    members: tuple[MemberInfo, ...]
    leader: str
    version: int
    digest: str


class AddMember(msgspec.Struct, frozen=True):
    """Let a new node in: answered by `Ticket`. `Conflict` when the name belongs to a member that is alive.

    ``public_key``: of the new node, in hexadecimal, where the cluster runs with keys.
    """

    name: str
    role: str = "follower"
    timeout_s: float = 10.0
    public_key: str = ""


class Ticket(msgspec.Struct, frozen=True):
    """What the new node brings to ``--join``; good for one node."""

    name: str
    ticket: str


class RemoveMember(msgspec.Struct, frozen=True):
    """Remove a member: answered by `Changed`. `MasterState` for the leader, `MemberNotFound`, `NoQuorum` when those
    that are left alive would be no majority and not ``force``.
    """

    name: str
    force: bool = False
    timeout_s: float = 10.0


class UpdateAddress(msgspec.Struct, frozen=True):
    """Change a member's client address: answered by `Changed`. `MemberNotFound`, `Conflict` when it is taken."""

    name: str
    address: str
    timeout_s: float = 10.0


class SetRole(msgspec.Struct, frozen=True):
    """Make a member a follower or an observer: answered by `Changed`. `MasterState` for the leader."""

    name: str
    role: str
    timeout_s: float = 10.0


class TransferLeader(msgspec.Struct, frozen=True):
    """Hand leadership over (``target`` empty: to the member that holds most): answered by `Changed` with its name."""

    target: str = ""
    timeout_s: float = 10.0


class Changed(msgspec.Struct, frozen=True):
    """A change of membership is done; ``name`` is the member, ``version`` of the membership afterwards."""

    name: str
    version: int


# --- registers -------------------------------------------------------------------------------------------------------


class PutRegister(msgspec.Struct, frozen=True):
    """Set a small named value in the journal: answered by `Register`. With ``if_version`` (0: must not be there) only
    when the current version is that, else `Conflict`. ``request``: 16 random bytes; a repeated one happens once.
    """

    name: str
    value: bytes
    request: bytes
    if_version: int | None = None
    timeout_s: float = 10.0


class GetRegister(msgspec.Struct, frozen=True):
    """Read a register, linearizable: answered by `Register`, or `NotFound`."""

    name: str
    timeout_s: float = 10.0


class Register(msgspec.Struct, frozen=True):
    """``version``: journal index of the last change."""

    name: str
    value: bytes
    version: int


# --- data ------------------------------------------------------------------------------------------------------------


class OpenSession(msgspec.Struct, frozen=True):
    """Open a session, under which writes are numbered from 1 so that a repeated one has its effect once.

    ``timeout_s``: how long the leader may wait for the replicas before it answers `NoQuorum`.
    """

    table: str
    timeout_s: float = 10.0


class SessionOpened(msgspec.Struct, frozen=True):
    """``session`` (16 bytes) is known to every tablet of the table, or becomes so with its first write there."""

    session: bytes


class Write(msgspec.Struct, frozen=True):
    """Apply the operations in the attachment to one tablet, all in one entry.

    ``attachments[0]`` is ``srengine.storage.encode_operations(...)``. ``consistency`` is ``quorum`` or ``all``: how
    many replicas must hold the entry durably before the answer. A repeated (session, number) is answered with the kept
    result. ``timeout_s``: how long the leader may wait for the replicas before it answers `NoQuorum` or `TimedOut`.
    """

    table: str
    tablet: int
    session: bytes
    number: int
    consistency: str = "quorum"
    timeout_s: float = 10.0


class WriteReply(msgspec.Struct, frozen=True):
    """``results`` has a byte for each operation: 0 applied, 1 condition failed, 2 nothing to do.

    Sequences of the operations are ``first_sequence .. last_sequence`` as the kernel reports them.
    """

    results: bytes
    first_sequence: int
    last_sequence: int
    root: bytes = b""
    duplicate: bool = False


class Read(msgspec.Struct, frozen=True):
    """Look keys of one tablet up. ``consistency`` is ``local``, ``one``, ``quorum`` or ``all``.

    The answer may hold fewer items than keys when it would exceed ``bytes_max``, but at least one; the client asks for
    the rest. ``timeout_s``: how long the replica may wait to become current before it answers `NotReady`.
    """

    table: str
    tablet: int
    keys: tuple[bytes, ...]
    consistency: str = "quorum"
    bytes_max: int = 4 * 1024 * 1024
    timeout_s: float = 10.0


class ReadReply(msgspec.Struct, frozen=True):
    """``attachments[0]`` is `packing.pack_records` of the first ``count`` keys, in their order.

    ``as_of``: seconds since the Unix epoch by the answering node; what was acknowledged before is contained.
    """

    count: int
    as_of: float = 0.0


class Scan(msgspec.Struct, frozen=True):
    """Read keys of one tablet in key order, ``start`` (inclusive) to ``stop`` (exclusive); None: no bound.

    At most ``limit`` pairs (0: no limit) and about ``bytes_max`` bytes, but at least one pair unless there is none.
    ``keys_only``: values are left empty. ``reverse``: from ``stop`` downwards.
    """

    table: str
    tablet: int
    start: bytes | None = None
    stop: bytes | None = None
    reverse: bool = False
    limit: int = 0
    bytes_max: int = 1024 * 1024
    consistency: str = "quorum"
    keys_only: bool = False
    timeout_s: float = 10.0


class ScanReply(msgspec.Struct, frozen=True):
    """``attachments[0]`` is `packing.pack_pairs`; ``done``: nothing of the range is left behind the last key."""

    count: int
    done: bool
    as_of: float = 0.0


registry.register("client.cluster_info", ClusterInfo)
registry.register("client.cluster_info_reply", ClusterInfoReply)
registry.register("client.status", Status)
registry.register("client.status_reply", StatusReply)
registry.register("client.sync_status", SyncStatus)
registry.register("client.sync_status_reply", SyncStatusReply)
registry.register("client.sync_run", SyncRun)
registry.register("client.sync_run_reply", SyncRunReply)
registry.register("client.create_database", CreateDatabase)
registry.register("client.list_databases", ListDatabases)
registry.register("client.database_list", DatabaseList)
registry.register("client.create_table", CreateTable)
registry.register("client.list_tables", ListTables)
registry.register("client.table_list", TableList)
registry.register("client.describe_table", DescribeTable)
registry.register("client.table_info", TableInfo)
registry.register("client.list_members", ListMembers)
registry.register("client.member_list", MemberList)
registry.register("client.add_member", AddMember)
registry.register("client.ticket", Ticket)
registry.register("client.remove_member", RemoveMember)
registry.register("client.update_address", UpdateAddress)
registry.register("client.set_role", SetRole)
registry.register("client.transfer_leader", TransferLeader)
registry.register("client.changed", Changed)
registry.register("client.put_register", PutRegister)
registry.register("client.get_register", GetRegister)
registry.register("client.register", Register)
registry.register("client.open_session", OpenSession)
registry.register("client.session_opened", SessionOpened)
registry.register("client.write", Write)
registry.register("client.write_reply", WriteReply)
registry.register("client.read", Read)
registry.register("client.read_reply", ReadReply)
registry.register("client.scan", Scan)
registry.register("client.scan_reply", ScanReply)
