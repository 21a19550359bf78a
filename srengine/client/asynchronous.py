"""`AsyncClient`: a cluster seen from one event loop.

Nothing is sent by constructing one: the first request connects, to the first endpoint that answers. All methods are
coroutines of one loop; `srengine.Client` is the same for threads and drives an `AsyncClient`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from srengine import errors, types
from srengine.client import messages, routing
from srengine.client.calls import Call, Caller, ChannelSource, expect
from srengine.client.link import open_source, read_key_file
from srengine.client.sessions import Sessions
from srengine.client.tables import AsyncTable
from srengine.security import parse_public_key

TIMEOUT_S_DEFAULT = 10.0
ROUND_SLACK_S = 10.0
"""What the answer of a round may need beyond the round itself."""


class AsyncClient:
    """A cluster client for asyncio.

    ``endpoints``: ``"tcp://host:port[,…]"`` or several of them; each may carry the node's key as ``#HEXKEY``.
    ``token``: refused until a cluster has users (`UnsupportedFeature`). ``key_file``: file with the client's CURVE key.
    ``server_key``: the nodes' CURVE key, hexadecimal, for endpoints that do not carry one. ``timeout_s``: seconds that
    one call may take, retries and failover included. ``source``: where channels come from instead of the network
    (tests, a node inside this process).

    Every call raises the typed errors of `srengine.errors`; those of the way are `Unreachable`, `TimedOut`, `NoQuorum`
    (with `NoLeader` and `NotReady` below it). Raises `InvalidValue` for endpoints and keys that are none.
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] = routing.DEFAULT_ENDPOINT,
        *,
        token: str | None = None,
        key_file: str | None = None,
        server_key: str | None = None,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        source: ChannelSource | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise errors.InvalidValue(f"timeout_s is {timeout_s!r}; it must be a positive number of seconds")
        if token is not None:
            # NB: refused, not ignored: who names a user must not be served as nobody.
            raise errors.UnsupportedFeature("this version has no users yet: a token proves nothing; leave it out")
        addresses, keys = routing.parse_endpoints(endpoints)
        self.timeout_s = timeout_s
        self._routes = routing.Routes(addresses, keys)
        self._server_key = parse_public_key(server_key) if server_key else None
        self._keys = read_key_file(key_file) if key_file else None
        self._source = source
        self._caller: Caller | None = None
        self._sessions = Sessions(self)
        self._closed = False

    # --- tables and catalog ------------------------------------------------------------------------------------------

    def table(self, name: str) -> AsyncTable:
        """Return the table ``database.table``. Nothing is asked yet: a missing one is `NotFound` at its first use."""
        return AsyncTable(self, check_table_name(name))

    async def create_database(self, name: str, *, if_missing: bool = False) -> None:
        """Create a database. `Conflict` when it exists, unless ``if_missing``; `InvalidValue` for a bad name."""
        types.check_name(name, "database")
        call = self._any_call(lambda _: messages.CreateDatabase(name))
        try:
            await self._call(call)
        except errors.Conflict:
            if not (if_missing or call.may_have_happened):
                raise

    async def list_databases(self) -> list[str]:
        """Return the names of all databases in order."""
        reply = await self._call(self._any_call(lambda _: messages.ListDatabases()))
        return list(expect(reply.message, messages.DatabaseList).names)

    async def create_table(
        self, name: str, *, tablets: int = 8, replicas: int = 3, if_missing: bool = False
    ) -> messages.TableInfo:
        """Create ``database.table`` with a fixed number of tablets, each on ``replicas`` nodes; return it.

        `NotFound` without the database, `Conflict` when the table exists (unless ``if_missing``), `InvalidValue` for
        bad names and numbers.
        """
        check_table_name(name)
        for number, what in ((tablets, "tablets"), (replicas, "replicas")):
            if not isinstance(number, int) or number < 1:
                raise errors.InvalidValue(f"{what} is {number!r}; it must be a positive whole number")
        call = self._any_call(lambda wait_s: messages.CreateTable(name, tablets, replicas, wait_s))
        try:
            reply = await self._call(call)
        except errors.Conflict:
            if not (if_missing or call.may_have_happened):
                raise
            return await self.describe_table(name)
        info = expect(reply.message, messages.TableInfo)
        self._routes.add_table(info)
        return info

    async def list_tables(self, database: str = "") -> list[messages.TableInfo]:
        """Return all tables, or those of one database, in order of their names."""
        reply = await self._call(self._any_call(lambda _: messages.ListTables(database)))
        return list(expect(reply.message, messages.TableList).tables)

    async def describe_table(self, name: str) -> messages.TableInfo:
        """Return one table with its tablets and where they are; `NotFound` when there is none."""
        check_table_name(name)
        reply = await self._call(self._any_call(lambda _: messages.DescribeTable(name)))
        info = expect(reply.message, messages.TableInfo)
        self._routes.add_table(info)
        return info

    # --- state -------------------------------------------------------------------------------------------------------

    async def status(self, node: str = "") -> dict[str, Any]:
        """Return the cluster at a glance, as ``srengine status -o json``; with ``node`` its own view."""
        reply = await self._call(self._any_call(lambda _: messages.Status(node)))
        seen: dict[str, Any] = _json(expect(reply.message, messages.StatusReply).status, dict)
        return seen

    async def members(self) -> list[dict[str, Any]]:
        """Return the members as `status` shows them: name, id, address, role, state, alive and more."""
        return list((await self.status())["nodes"])

    # --- members -----------------------------------------------------------------------------------------------------

    async def list_members(self) -> messages.MemberList:
        """Return the members as the journal has them (linearizable), with version and digest of the membership."""
        reply = await self._call(self._any_call(lambda _: messages.ListMembers()))
        return expect(reply.message, messages.MemberList)

    async def add_member(self, name: str, *, role: str = "follower", public_key: str = "") -> str:
        """Return the one-time ticket with which a new node ``name`` may join (``node start --join … --ticket …``).

        ``role``: follower (votes once it has caught up) or observer (never votes). ``public_key``: of the new node, as
        ``node init`` prints it; needed where the cluster runs with keys. `Conflict` when a living member has the name,
        `InvalidValue` for a bad name, role or key.
        """
        types.check_name(name, "node")
        reply = await self._call(self._any_call(lambda wait_s: messages.AddMember(name, role, wait_s, public_key)))
        return expect(reply.message, messages.Ticket).ticket

    async def remove_member(self, name: str, *, force: bool = False) -> None:
        """Remove a member; its process ends with exit code 12.

        `MasterState` for the leader, `MemberNotFound`, `NoQuorum` when those left alive would be no majority, unless
        ``force``.
        """
        call = self._any_call(lambda wait_s: messages.RemoveMember(name, force, wait_s))
        try:
            await self._call(call)
        except errors.MemberNotFound:
            if not call.may_have_happened:
                raise

    async def update_address(self, name: str, address: str) -> None:
        """Change a member's client address. `MemberNotFound`, `Conflict` when another member has it, `InvalidValue`."""
        await self._call(self._any_call(lambda wait_s: messages.UpdateAddress(name, address, wait_s)))

    async def set_role(self, name: str, role: str) -> None:
        """Make a member a ``follower`` or an ``observer``. `MasterState` for the leader, `MemberNotFound`."""
        await self._call(self._any_call(lambda wait_s: messages.SetRole(name, role, wait_s)))

    async def transfer_leader(self, target: str | None = None) -> str:
        """Hand leadership to ``target``, or to the member that holds most; return the new leader's name.

        `MasterState` when it is not possible now (nothing changed), `MemberNotFound`.
        """
        reply = await self._call(self._any_call(lambda wait_s: messages.TransferLeader(target or "", wait_s)))
        return expect(reply.message, messages.Changed).name

    # --- registers ---------------------------------------------------------------------------------------------------

    async def put_register(self, name: str, value: bytes, *, if_version: int | None = None) -> int:
        """Set a small named value that the whole cluster agrees on (at most 64 KiB); return its version.

        ``if_version``: only when the current version is that (0: only when there is none), else `Conflict`. For a
        handful of values such as a pointer or a flag; data belongs into tables.
        """
        request = secrets.token_bytes(16)
        reply = await self._call(
            self._any_call(lambda wait_s: messages.PutRegister(name, value, request, if_version, wait_s))
        )
        return expect(reply.message, messages.Register).version

    async def get_register(self, name: str) -> messages.Register:
        """Return a register with its version, linearizable; `NotFound`."""
        reply = await self._call(self._any_call(lambda wait_s: messages.GetRegister(name, wait_s)))
        return expect(reply.message, messages.Register)

    # --- replicas ----------------------------------------------------------------------------------------------------

    async def sync_status(self, table: str = "") -> list[dict[str, Any]]:
        """Return the state of each replica of each tablet (of one table), as ``srengine sync status -o json``."""
        reply = await self._call(self._any_call(lambda _: messages.SyncStatus(table)))
        replicas: list[dict[str, Any]] = _json(expect(reply.message, messages.SyncStatusReply).replicas, list)
        return replicas

    async def sync_run(self, table: str = "", *, timeout_s: float = 600.0) -> list[dict[str, Any]]:
        """Have all replicas (of one table) read whole, compared and repaired now; as ``srengine sync run -o json``.

        ``timeout_s`` bounds the round at each node; a replica that is not done by then is listed as ``timed out``.
        """
        # Twice: an attempt may take half of what is left, and a round is not to be begun again at another node.
        call = self._any_call(lambda _: messages.SyncRun(table, timeout_s), 2 * (timeout_s + ROUND_SLACK_S))
        reply = await self._call(call)
        rounds: list[dict[str, Any]] = _json(expect(reply.message, messages.SyncRunReply).rounds, list)
        return rounds

    # --- life --------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close all connections; calls under way end with `Closed`. A second close does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._source is not None:
            source, self._source, self._caller = self._source, None, None
            await source.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _use(self, source: ChannelSource) -> None:
        assert self._source is None, self._source
        self._source = source

    # --- for the tables of this client -------------------------------------------------------------------------------

    def _deadline(self, timeout_s: float | None = None) -> float:
        return asyncio.get_running_loop().time() + (self.timeout_s if timeout_s is None else timeout_s)

    def _any_call(self, build: Callable[[float], msgspec.Struct], timeout_s: float | None = None) -> Call:
        return Call(build=build, candidates=self._routes.anybody, deadline=self._deadline(timeout_s))

    def _tablet_call(
        self,
        table: str,
        tablet: int,
        consistency: str,
        deadline: float,
        build: Callable[[float], msgspec.Struct],
        attachments: Sequence[bytes | memoryview] = (),
        *,
        is_write: bool = False,
    ) -> Call:
        return Call(
            build=build,
            candidates=lambda: self._routes.candidates(table, tablet, consistency),
            deadline=deadline,
            attachments=attachments,
            tablet=None if consistency == "local" else (table, tablet),
            is_write=is_write,
        )

    async def _call(self, call: Call) -> Any:
        if self._closed:
            raise errors.Closed("the client is closed")
        if self._caller is None:
            if self._source is None:
                self._source = open_source(keys=self._keys)
            self._caller = Caller(self._source, self._routes, self._server_key)
        return await self._caller.call(call)

    async def _tablets(self, table: str, deadline: float) -> int:
        """Return the number of tablets of a table; it never changes while the table exists."""
        known = self._routes.table(table)
        if known is not None:
            return len(known.tablets)
        call = self._any_call(lambda _: messages.ClusterInfo())
        call.deadline = deadline
        self._routes.learn(expect((await self._call(call)).message, messages.ClusterInfoReply))
        known = self._routes.table(table)
        if known is None:  # A node that lags does not know a new table yet; the one that leads does.
            return len((await self.describe_table(table)).tablets)
        return len(known.tablets)


def check_table_name(name: str) -> str:
    """Return ``name`` if it is ``database.table``; `InvalidValue` otherwise."""
    database, dot, table = name.partition(".") if isinstance(name, str) else ("", "", "")
    if not dot:
        raise errors.InvalidValue(f"{name!r} is not a table's name: it is written database.table", what="table")
    types.check_name(database, "database")
    types.check_name(table, "table")
    return name


def _json(text: bytes, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise errors.FrameError("the answer is not JSON") from error
    if not isinstance(value, kind):
        raise errors.FrameError(f"the answer is a {type(value).__name__} where a {kind.__name__} belongs")
    return value
