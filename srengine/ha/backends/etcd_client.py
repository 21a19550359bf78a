"""A client of etcd's v3 JSON gateway: ranges, transactions, leases, watches; several servers, typed errors.

Every server of an etcd cluster answers every question, so a question goes to the server that answered last, and to the
next one when that one fails. Two kinds of questions, kept apart:

* *Reading* (`range`, `status`) may be asked twice: it goes round until the time allowed is over.
* *Changing* (`txn`, `grant`, `keepalive`, `revoke`) is asked again only when the server certainly did not act: nothing
  was sent, or it refused. Otherwise whether it acted is unknown, and the caller gets `errors.TimedOut`. Callers make
  their transactions such that asking again is safe (a compare that the first success makes fail).

What etcd refuses becomes an error of ours:

=====================================  ============================================================================
gRPC code                              error
=====================================  ============================================================================
3 invalid argument                     `errors.InvalidValue` (a request over etcd's limit is one)
4 deadline exceeded, 14 unavailable    no leader, or none in time: `errors.NoQuorum` for reading, `errors.TimedOut`
                                       (unknown) for changing
5 not found                            `errors.NotFound` (a lease that is over)
7 permission denied                    `errors.Denied`
8 resource exhausted                   `errors.QuotaExceeded`
11 out of range                        `Compacted`
16 unauthenticated                     a new token once, then `errors.NotAuthenticated`
=====================================  ============================================================================

All servers must be of one etcd cluster: the id in the first answer is remembered, another one is `errors.ForeignData`.
Whatever arrives is bounded (`ANSWER_BYTES_MAX`, `LINE_BYTES_MAX`) and decoded into the structs below or refused.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from srengine import errors
from srengine.clock import Clock, SystemClock
from srengine.ha.backends.etcd_http import Answer, Server, parse_address

ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
"""One answer, as JSON. A range that is larger is asked for in smaller pages."""
LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""One line of a watch: etcd cuts at its request limit, 1.5 MiB (a third more as base64)."""
ATTEMPT_S: Final = 2.0
"""How long one server may take before another is asked: longer than a write to a slow disk, shorter than a lease."""
ROUND_PAUSE_S: Final = 0.1
"""Pause after all servers failed."""
SERVERS_MAX: Final = 16

_T = TypeVar("_T")


class Compacted(errors.Error):
    """The revision asked for is gone; read the present instead."""

    code: ClassVar[str] = "COMPACTED"
    retryable: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """Where etcd is and how to get in. Paths are of PEM files; ``ca_file`` None trusts the system's authorities."""

    servers: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.servers) <= SERVERS_MAX:
            raise errors.InvalidValue(f"{len(self.servers)} addresses of etcd; 1 to {SERVERS_MAX} are possible")
        for address in self.servers:
            parse_address(address)
        if (self.cert_file is None) != (self.key_file is None):
            raise errors.InvalidValue("a certificate for etcd needs its key, and a key its certificate")
        if (self.ca_file or self.cert_file) and not any(address.startswith("https:") for address in self.servers):
            raise errors.InvalidValue("certificates are for https addresses of etcd; there is none")
        if bool(self.user) != bool(self.password):
            raise errors.InvalidValue("a user of etcd needs a password, and a password its user")

    @classmethod
    def parse(cls, servers: str, **more: Any) -> EtcdOptions:
        """Return the options for a comma-separated list.

        >>> EtcdOptions.parse("http://a:2379, http://b:2379").servers
        ('http://a:2379', 'http://b:2379')
        """
        return cls(tuple(part.strip() for part in servers.split(",") if part.strip()), **more)

    def context(self) -> ssl.SSLContext | None:
        """Return what https needs; None when no address is https."""
        if not any(address.startswith("https:") for address in self.servers):
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            raise errors.InvalidValue(f"the certificates for etcd cannot be used: {error}") from error
        return context


# --- what etcd answers -----------------------------------------------------------------------------------------------


class Header(msgspec.Struct, frozen=True):
    """``revision``: of the whole store, grows with every change. ``raft_term``: of etcd's own election."""

    cluster_id: int = 0
    member_id: int = 0
    revision: int = 0
    raft_term: int = 0


class KeyValue(msgspec.Struct, frozen=True):
    """One key. ``version``: puts since it was created; ``lease``: 0 when it is bound to none."""

    key: bytes
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class RangeReply(msgspec.Struct, frozen=True):
    """``more``: the limit cut it. ``count``: keys in the range, limit or not."""

    header: Header = Header()
    kvs: tuple[KeyValue, ...] = ()
    more: bool = False
    count: int = 0

    @property
    def first(self) -> KeyValue | None:
        """The first key, None without one."""
        return self.kvs[0] if self.kvs else None


class Deleted(msgspec.Struct, frozen=True):
    """Answer to `delete`."""

    deleted: int = 0


class OperationReply(msgspec.Struct, frozen=True):
    """Answer to one operation of a transaction."""

    response_range: RangeReply | None = None
    response_delete_range: Deleted | None = None

    @property
    def range(self) -> RangeReply:
        """The answer to a `get`."""
        return self.response_range or RangeReply()


class TxnReply(msgspec.Struct, frozen=True):
    """``succeeded``: all compares held, and ``responses`` belong to the success side."""

    header: Header = Header()
    succeeded: bool = False
    responses: tuple[OperationReply, ...] = ()


class LeaseReply(msgspec.Struct, frozen=True):
    """``TTL`` 0: the lease is over."""

    ID: int = 0
    TTL: int = 0
    header: Header = Header()


class StatusReply(msgspec.Struct, frozen=True):
    """One server's state."""

    header: Header = Header()
    version: str = ""
    dbSize: int = 0  # noqa: N815  # as etcd spells it
    leader: int = 0


class Event(msgspec.Struct, frozen=True):
    """A change of a key: PUT, or DELETE (then only ``key`` and ``mod_revision`` are set)."""

    kv: KeyValue
    type: str = "PUT"


class WatchReply(msgspec.Struct, frozen=True):
    """Changes, in the order of revisions. Those of one revision may come in several replies (``fragment``)."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    fragment: bool = False
    events: tuple[Event, ...] = ()


class _Failure(msgspec.Struct, frozen=True):
    code: int = 2
    grpc_code: int = 0
    error: Any = ""
    message: str = ""


class _KeptAlive(msgspec.Struct, frozen=True):
    result: LeaseReply | None = None
    error: _Failure | None = None


class _WatchLine(msgspec.Struct, frozen=True):
    result: WatchReply | None = None
    error: _Failure | None = None


class _Token(msgspec.Struct, frozen=True):
    token: str = ""


# --- what etcd is asked ----------------------------------------------------------------------------------------------

Compare = dict[str, Any]
Operation = dict[str, Any]


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key behind all that begin with ``prefix``.

    >>> prefix_end(b"a/")
    b'a0'
    """
    assert prefix, prefix
    assert prefix[-1] < 255, prefix
    return prefix[:-1] + bytes([prefix[-1] + 1])


def absent(key: bytes) -> Compare:
    """Hold when there is no such key."""
    return {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}


def present(key: bytes) -> Compare:
    """Hold when there is such a key."""
    return {"key": key, "target": "CREATE", "result": "GREATER", "create_revision": 0}


def unchanged(key: bytes, mod_revision: int) -> Compare:
    """Hold when the key was last changed at ``mod_revision``; 0: it is absent."""
    return {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": mod_revision}


def holds(key: bytes, value: bytes) -> Compare:
    """Hold when the key has that value; never for an absent key."""
    return {"key": key, "target": "VALUE", "result": "EQUAL", "value": value}


def put(key: bytes, value: bytes, *, lease: int = 0) -> Operation:
    """Set a key, bound to a lease unless that is 0."""
    return {"request_put": {"key": key, "value": value, "lease": lease}}


def get(key: bytes, range_end: bytes | None = None, *, limit: int = 0, keys_only: bool = False) -> Operation:
    """Read a key, or those in [key, range_end)."""
    return {"request_range": _range(key, range_end, limit=limit, keys_only=keys_only)}


def delete(key: bytes, range_end: bytes | None = None) -> Operation:
    """Remove a key, or those in [key, range_end)."""
    return {"request_delete_range": {"key": key} if range_end is None else {"key": key, "range_end": range_end}}


def _range(key: bytes, range_end: bytes | None, *, limit: int, keys_only: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"key": key}
    if range_end is not None:
        asked["range_end"] = range_end
    if limit:
        asked["limit"] = limit
    if keys_only:
        asked["keys_only"] = True
    return asked


class EtcdClient:
    """Asks the servers of one etcd cluster. Belongs to one event loop; `close` it there."""

    def __init__(self, options: EtcdOptions, *, clock: Clock | None = None) -> None:
        self.options = options
        self._clock = clock or SystemClock()
        context = options.context()
        self._servers = [
            Server(address, context if address.startswith("https:") else None) for address in options.servers
        ]
        self._preferred = 0
        """Place of the server that answered last."""
        self._token = ""
        self._cluster_id = 0
        """Of the etcd cluster; 0 before the first answer."""
        self._encoder = msgspec.json.Encoder()
        self._closed = False

    def close(self) -> None:
        """Close the connections; later calls raise `errors.Closed`."""
        self._closed = True
        for server in self._servers:
            server.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def range(
        self,
        key: bytes,
        range_end: bytes | None = None,
        *,
        limit: int = 0,
        keys_only: bool = False,
        descending: bool = False,
        timeout_s: float = 5.0,
    ) -> RangeReply:
        """Read a key or those in [key, range_end), in key order; linearizable."""
        asked = _range(key, range_end, limit=limit, keys_only=keys_only)
        if descending:
            asked |= {"sort_order": "DESCEND", "sort_target": "KEY"}
        return await self._ask("/v3/kv/range", asked, RangeReply, timeout_s=timeout_s, reading=True)

    async def read(self, operations: Sequence[Operation], *, timeout_s: float = 5.0) -> TxnReply:
        """Do several `get` at one revision; linearizable."""
        assert all("request_range" in operation for operation in operations), operations
        asked = {"success": operations}
        return await self._ask("/v3/kv/txn", asked, TxnReply, timeout_s=timeout_s, reading=True)

    async def status(self, *, timeout_s: float = 5.0) -> StatusReply:
        """Return the state of the server that answers first."""
        return await self._ask("/v3/maintenance/status", {}, StatusReply, timeout_s=timeout_s, reading=True)

    # --- changing ----------------------------------------------------------------------------------------------------

    async def txn(
        self,
        compare: Iterable[Compare],
        success: Iterable[Operation],
        failure: Iterable[Operation] = (),
        *,
        timeout_s: float = 5.0,
    ) -> TxnReply:
        """Do ``success`` if all of ``compare`` hold, else ``failure``; at one revision."""
        asked = {"compare": list(compare), "success": list(success), "failure": list(failure)}
        return await self._ask("/v3/kv/txn", asked, TxnReply, timeout_s=timeout_s)

    async def grant(self, ttl_s: int, *, timeout_s: float = 5.0) -> LeaseReply:
        """Return a new lease; etcd may give it a longer time than asked for."""
        return await self._ask("/v3/lease/grant", {"TTL": ttl_s}, LeaseReply, timeout_s=timeout_s)

    async def keepalive(self, lease: int, *, timeout_s: float = 5.0) -> int:
        """Renew a lease and return its seconds; 0 when it is over."""
        # Repeating is harmless: a renewal renews.
        reply = await self._ask("/v3/lease/keepalive", {"ID": lease}, _KeptAlive, timeout_s=timeout_s, reading=True)
        if reply.error is not None:
            raise _refused(reply.error, reading=True)
        return 0 if reply.result is None else reply.result.TTL

    async def revoke(self, lease: int, *, timeout_s: float = 5.0) -> bool:
        """End a lease and remove what is bound to it; False when it was over already."""
        try:
            await self._ask("/v3/lease/revoke", {"ID": lease}, LeaseReply, timeout_s=timeout_s, reading=True)
        except errors.NotFound:
            return False
        return True

    # --- watching ----------------------------------------------------------------------------------------------------

    async def watch(
        self, key: bytes, range_end: bytes | None, *, start_revision: int, timeout_s: float = 5.0
    ) -> AsyncGenerator[WatchReply, None]:
        """Yield the changes of [key, range_end) from ``start_revision`` on; the first reply has ``created``.

        Ends only by an error: `Compacted` when ``start_revision`` is gone; `errors.Unreachable`, `errors.NoQuorum` or
        `errors.TimedOut` when the server is lost or has lost etcd's leader. The caller then watches again, from behind
        the last revision that it has seen whole. Each call takes the next server.
        """
        asked: dict[str, Any] = {"key": key, "start_revision": start_revision, "fragment": True}
        if range_end is not None:
            asked["range_end"] = range_end
        body = self._encoder.encode({"create_request": asked})
        decoder = msgspec.json.Decoder(_WatchLine, strict=False)
        if self.options.user and not self._token:
            await self._authenticate(self._servers[self._preferred], timeout_s)
        server = self._servers[self._preferred]
        # hasleader: a server that loses etcd's leader ends the stream in place of falling silent.
        headers = [*self._headers(), ("Grpc-Metadata-hasleader", "true")]
        try:
            async for line in server.lines(
                "/v3/watch", body, headers=headers, bytes_max=LINE_BYTES_MAX, timeout_s=timeout_s
            ):
                if line:
                    yield self._watched(decoder, line)
        except (errors.Unreachable, errors.NoQuorum, errors.TimedOut):
            self._pass_over(server)
            raise
        except errors.NotAuthenticated:
            self._token = ""
            raise

    def _watched(self, decoder: msgspec.json.Decoder[_WatchLine], line: bytes) -> WatchReply:
        try:
            decoded = decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise errors.FrameError(f"etcd sent a line that is no watch reply: {error}") from error
        if decoded.error is not None:
            raise _refused(decoded.error, reading=True)
        reply = decoded.result or WatchReply()
        self._check_cluster(reply.header)
        if reply.compact_revision:
            raise Compacted("the revision is gone", revision=reply.compact_revision)
        if reply.canceled:
            raise errors.Unreachable(f"etcd ended the watch: {reply.cancel_reason or 'no reason given'}")
        return reply

    # --- the servers -------------------------------------------------------------------------------------------------

    async def _ask(self, target: str, asked: Any, kind: type[_T], *, timeout_s: float, reading: bool = False) -> _T:
        body = self._encoder.encode(asked)
        deadline = self._clock.monotonic_s() + timeout_s
        # With another server to ask, a silent one gets half of the time at most.
        attempt_s = min(ATTEMPT_S, timeout_s / min(2, len(self._servers)))
        authenticated = False
        failed = 0
        while True:
            if self._closed:
                raise errors.Closed("the client of etcd is closed")
            server = self._servers[self._preferred]
            left = deadline - self._clock.monotonic_s()
            try:
                if self.options.user and not self._token:
                    await self._authenticate(server, max(0.05, min(left, attempt_s)))
                answer = await server.post(
                    target,
                    body,
                    headers=self._headers(),
                    bytes_max=ANSWER_BYTES_MAX,
                    timeout_s=max(0.05, min(left, attempt_s)),
                )
                return self._decoded(answer, kind, reading=reading)
            except errors.NotAuthenticated:
                if authenticated or not self.options.user:
                    raise
                authenticated, self._token = True, ""
            except (errors.Unreachable, errors.TimedOut, errors.NoQuorum) as error:
                self._pass_over(server)
                unsent = isinstance(error, errors.Unreachable) and not error.details.get("sent", True)
                if not reading and not unsent:
                    raise errors.TimedOut(f"whether etcd acted is not known: {error}") from error
                failed += 1
                if self._clock.monotonic_s() >= deadline:
                    raise
            if failed and failed % len(self._servers) == 0:
                await asyncio.sleep(ROUND_PAUSE_S)

    def _pass_over(self, server: Server) -> None:
        if self._servers[self._preferred] is server:
            self._preferred = (self._preferred + 1) % len(self._servers)

    def _headers(self) -> list[tuple[str, str]]:
        return [("Authorization", self._token)] if self._token else []

    async def _authenticate(self, server: Server, timeout_s: float) -> None:
        body = self._encoder.encode({"name": self.options.user, "password": self.options.password})
        answer = await server.post(
            "/v3/auth/authenticate", body, headers=[], bytes_max=ANSWER_BYTES_MAX, timeout_s=timeout_s
        )
        try:
            self._token = self._decoded(answer, _Token, reading=True).token
        except (errors.InvalidValue, errors.Denied) as error:
            raise errors.NotAuthenticated(f"etcd does not know the user or the password: {error}") from error

    def _decoded(self, answer: Answer, kind: type[_T], *, reading: bool) -> _T:
        if answer.status != 200:
            try:
                failure = msgspec.json.decode(answer.body, type=_Failure, strict=False)
            except (msgspec.MsgspecError, RecursionError, ValueError):
                raise errors.FrameError(
                    f"etcd's gateway answered {answer.status}; is this an etcd with /v3?", status=answer.status
                ) from None
            raise _refused(failure, reading=reading)
        try:
            decoded = msgspec.json.decode(answer.body, type=kind, strict=False)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise errors.FrameError(f"etcd's answer is not understood: {error}") from error
        self._check_cluster(getattr(decoded, "header", None))
        return decoded

    def _check_cluster(self, header: Header | None) -> None:
        if header is None or not header.cluster_id:
            return
        if not self._cluster_id:
            self._cluster_id = header.cluster_id
        elif header.cluster_id != self._cluster_id:
            raise errors.ForeignData(
                f"two etcd clusters answer: {self._cluster_id:x} and {header.cluster_id:x}; name servers of one",
                expected=f"{self._cluster_id:x}",
                found=f"{header.cluster_id:x}",
            )


def _refused(failure: _Failure, *, reading: bool) -> errors.Error:
    """Return the error for what etcd says; see the module's table."""
    words = failure.message or (failure.error if isinstance(failure.error, str) else "no reason given")
    message = f"etcd: {words}"
    code = failure.grpc_code or failure.code
    match code:
        case 3 if "invalid auth token" in words or "authentication failed" in words:
            return errors.NotAuthenticated(message)
        case 3:
            return errors.InvalidValue(message)
        case 4 | 14 | 13 | 1:
            return errors.NoQuorum(message) if reading else errors.TimedOut(message)
        case 5:
            return errors.NotFound(message)
        case 7:
            return errors.Denied(message)
        case 8:
            return errors.QuotaExceeded(message)
        case 11:
            return Compacted(message)
        case 16:
            return errors.NotAuthenticated(message)
        case _:
            return errors.Unreachable(message, grpc_code=code, sent=True)
