"""A small synchronous client for tests of real nodes: asks one node by its own connection, without routing or retries.

The product's client hides which node answers and tries again; these tests want to see exactly that.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import xxhash

from srengine import errors
from srengine.client import messages, packing
from srengine.storage import encode_operations
from srengine.transport import Channel, Endpoint, Identity, Reply

PUT, DELETE = 0, 1


class Asker:
    """Ask any node, one request at a time or several."""

    def __init__(self, timeout_s: float = 20.0, *, enter: Callable[[], None] | None = None) -> None:
        """``enter`` is called on the asking thread before it makes a socket: it may move it to another host."""
        self.timeout_s = timeout_s
        self._enter = enter
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._endpoint: Endpoint = self._call(self._make())
        self._channels: dict[str, Channel] = {}
        self._sessions: dict[str, bytes] = {}
        self._numbers = itertools.count(1)

    async def _make(self) -> Endpoint:
        if self._enter is not None:
            self._enter()
        return Endpoint(Identity())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._endpoint.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _ask(
        self, address: str, message: msgspec.Struct, attachments: Sequence[bytes], timeout_s: float
    ) -> Reply:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._endpoint.channel(address)
        channel.wake()
        return await channel.request(message, attachments, timeout_s=timeout_s)

    def ask(
        self,
        address: str,
        message: msgspec.Struct,
        attachments: Sequence[bytes] = (),
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Ask once; raises what the node or the transport says."""
        return self._call(self._ask(address, message, attachments, timeout_s or self.timeout_s))

    # --- the requests that tests need --------------------------------------------------------------------------------

    def create(self, address: str, table: str, *, tablets: int = 2, replicas: int = 3) -> None:
        try:
            self.ask(address, messages.CreateDatabase(table.partition(".")[0]))
        except errors.Conflict:
            pass
        self.ask(address, messages.CreateTable(table, tablets, replicas))

    def write(
        self,
        address: str,
        table: str,
        changes: dict[bytes, bytes | None],
        *,
        consistency: str = "quorum",
        timeout_s: float = 20.0,
        number: int | None = None,
    ) -> list[messages.WriteReply]:
        """Put (or delete, for None) without conditions; one request for each tablet that has a key."""
        session = self._session(address, table)
        by_tablet: dict[int, list[Any]] = {}
        count = self.tablets(address, table)
        for key, value in changes.items():
            operation = (DELETE, key, None, 0, 0) if value is None else (PUT, key, value, 0, 0)
            by_tablet.setdefault(tablet_of(key, count), []).append(operation)
        replies = []
        for tablet, operations in sorted(by_tablet.items()):
            message = messages.Write(
                table, tablet, session, number or next(self._numbers), consistency=consistency, timeout_s=timeout_s
            )
            reply = self.ask(address, message, [encode_operations(operations)], timeout_s=timeout_s + 5)
            replies.append(reply.message)
        return replies

    def _session(self, address: str, table: str) -> bytes:
        if table not in self._sessions:
            self._sessions[table] = self.ask(address, messages.OpenSession(table)).message.session
        return self._sessions[table]

    def read(
        self, address: str, table: str, keys: Iterable[bytes], *, consistency: str = "quorum", timeout_s: float = 20.0
    ) -> dict[bytes, bytes | None]:
        count = self.tablets(address, table)
        found: dict[bytes, bytes | None] = {}
        by_tablet: dict[int, list[bytes]] = {}
        for key in keys:
            by_tablet.setdefault(tablet_of(key, count), []).append(key)
        for tablet, wanted in sorted(by_tablet.items()):
            message = messages.Read(table, tablet, tuple(wanted), consistency, timeout_s=timeout_s)
            reply = self.ask(address, message, timeout_s=timeout_s + 5)
            records = packing.unpack_records(packing.single(reply.attachments), reply.message.count)
            found.update({key: record.value for key, record in zip(wanted, records, strict=True)})
        return found

    def everything(self, address: str, table: str, *, consistency: str = "quorum") -> dict[bytes, bytes]:
        """Scan all tablets of a table."""
        pairs: dict[bytes, bytes] = {}
        for tablet in range(self.tablets(address, table)):
            start: bytes | None = None
            while True:
                message = messages.Scan(table, tablet, start, consistency=consistency)
                reply = self.ask(address, message)
                found = packing.unpack_pairs(packing.single(reply.attachments), reply.message.count)
                pairs.update(found)
                if reply.message.done:
                    break
                start = found[-1][0] + b"\x00"
        return pairs

    def members(self, address: str) -> messages.MemberList:
        return self.ask(address, messages.ListMembers()).message

    def leader(self, address: str) -> str | None:
        """Return the name of the leader as the node at ``address`` knows it, None while it knows none or is away."""
        try:
            return self.status(address)["leader"]
        except errors.Error:
            return None

    def remove(self, address: str, name: str, *, force: bool = False) -> None:
        self.ask(address, messages.RemoveMember(name, force))

    def put_register(
        self, address: str, name: str, value: bytes, *, if_version: int | None = None, timeout_s: float = 10.0
    ) -> int:
        """Put once, at this node; return the version."""
        message = messages.PutRegister(name, value, secrets.token_bytes(16), if_version, timeout_s)
        return self.ask(address, message, timeout_s=timeout_s + 2).message.version

    def register(self, address: str, name: str, *, timeout_s: float = 10.0) -> messages.Register:
        return self.ask(address, messages.GetRegister(name, timeout_s), timeout_s=timeout_s + 2).message

    def get_register(self, address: str, name: str, *, timeout_s: float = 10.0) -> bytes:
        return self.register(address, name, timeout_s=timeout_s).value

    def tablets(self, address: str, table: str) -> int:
        return len(self.ask(address, messages.DescribeTable(table)).message.tablets)

    def status(self, address: str) -> dict[str, Any]:
        return json.loads(self.ask(address, messages.Status()).message.status)

    def replicas(self, address: str, table: str = "") -> list[dict[str, Any]]:
        return json.loads(self.ask(address, messages.SyncStatus(table)).message.replicas)

    def settled(self, address: str, table: str) -> list[dict[str, Any]] | None:
        """Return the replicas when all are SYNCED at one sequence and root for each tablet, else None."""
        try:
            replicas = self.replicas(address, table)
        except errors.Error:
            return None
        if not replicas or any(replica["state"] != "SYNCED" for replica in replicas):
            return None
        positions: dict[int, set[tuple[int, str]]] = {}
        for replica in replicas:
            positions.setdefault(replica["tablet"], set()).add((replica["sequence"], replica["root"]))
        return replicas if all(len(found) == 1 for found in positions.values()) else None


def tablet_of(key: bytes, count: int) -> int:
    return xxhash.xxh3_64_intdigest(key) % count


def numbered(first: int, last: int, text: str = "v") -> dict[bytes, bytes | None]:
    """Return pairs key-NNNNNN -> text-N for first <= N < last."""
    return {b"key-%06d" % number: f"{text}-{number}".encode() for number in range(first, last)}
