"""A cluster in memory that speaks the client protocol: three nodes, one truth, and faults on demand.

It is the oracle of the client's tests: tables are dicts, versions one counter for each tablet, request ids are kept for
ever. Messages and attachments pass the real codec, so that what cannot be sent fails here too. Faults stand in a list
for each address and are used up one for each request::

    cluster.faults["tcp://n1:1"] = [errors.Unreachable("down"), LOSE_ANSWER]
"""

from __future__ import annotations

import json
import secrets
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from srengine import errors
from srengine.client import messages, packing, routing
from srengine.codec import registry

OPERATION = struct.Struct("<BBHIQ")
LOSE_ANSWER = "execute, then lose the answer"
ADDRESSES = ("tcp://n1:1", "tcp://n2:1", "tcp://n3:1")


@dataclass
class FakeReply:
    message: Any
    attachments: Sequence[bytes] = ()


@dataclass
class FakeTablet:
    records: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    sequence: int = 0
    kept: dict[tuple[bytes, int], messages.WriteReply] = field(default_factory=dict)


@dataclass
class FakeTable:
    tablets: list[FakeTablet]
    replicas: int = 3


class FakeCluster:
    """State and behaviour of all nodes."""

    def __init__(self, tables: dict[str, int] | None = None) -> None:
        self.outcomes: dict[str, str] = {}
        self.databases = {name.partition(".")[0] for name in tables or {}}
        self.tables = {name: FakeTable([FakeTablet() for _ in range(count)]) for name, count in (tables or {}).items()}
        self.leader = ADDRESSES[0]
        self.told_leader = ADDRESSES[0]
        """What the catalog says; may be wrong."""
        self.down: set[str] = set()
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.sessions: set[bytes] = set()
        self.log: list[tuple[str, Any]] = []
        """(address, message) of every request that arrived, in order."""
        self.executed = 0
        self.page_items_max = 3
        self.read_items_max = 2
        self.status: dict[str, Any] = {
            "cluster": {"id": "c" * 32, "name": "fake"}, "leader": "node-1", "epoch": 1, "term": 1, "config_version": 0,
            "nodes": [{"name": f"node-{i}", "id": str(i) * 32, "address": address, "role": "follower",
                       "state": "LEADER", "alive": True, "stable": True, "journal_lag": 0, "sync": "SYNCED",
                       "disk_used": 1, "disk_free": 2} for i, address in enumerate(ADDRESSES, 1)],
            "tables": [],
        }  # fmt: skip

    def source(self) -> FakeSource:
        return FakeSource(self)

    def put_directly(self, table: str, pairs: dict[bytes, bytes]) -> None:
        tablets = self.tables[table].tablets
        for key, value in pairs.items():
            tablet = tablets[routing.tablet_of(key, len(tablets))]
            tablet.sequence += 1
            tablet.records[key] = (value, tablet.sequence)

    def contents(self, table: str) -> dict[bytes, bytes]:
        found = {key: value for tablet in self.tables[table].tablets for key, (value, _) in tablet.records.items()}
        return dict(sorted(found.items()))

    # --- one request ---------------------------------------------------------------------------------------------

    def handle(self, address: str, message: Any, attachments: Sequence[bytes]) -> FakeReply:
        if address not in ADDRESSES or address in self.down:
            raise errors.Unreachable(f"nobody at {address}", sent=False)
        self.log.append((address, message))
        fault = self.faults[address].pop(0) if self.faults[address] else None
        if isinstance(fault, BaseException):
            raise fault
        if callable(fault):
            fault = fault(message)
        reply = self._answer(address, message, attachments)
        if fault == LOSE_ANSWER:
            raise errors.TimedOut("the answer was lost")
        return reply

    def _answer(  # noqa: C901, PLR0911 - a table of messages
        self, address: str, message: Any, attachments: Sequence[bytes]
    ) -> FakeReply:
        match message:
            case messages.ClusterInfo():
                return FakeReply(self._info())
            case messages.Status():
                return FakeReply(messages.StatusReply(json.dumps(self.status).encode()))
            case messages.SyncStatus(table=table):
                return FakeReply(messages.SyncStatusReply(json.dumps(self._sync(table)).encode()))
            case messages.SyncRun(table=table):
                return FakeReply(messages.SyncRunReply(json.dumps(self._rounds(table)).encode()))
            case messages.CreateDatabase(name=name):
                if name in self.databases:
                    raise errors.Conflict(f"database {name} exists", name=name)
                self.databases.add(name)
                return FakeReply(messages.DatabaseList((name,)))
            case messages.ListDatabases():
                return FakeReply(messages.DatabaseList(tuple(sorted(self.databases))))
            case messages.CreateTable(name=name, tablets=tablets, replicas=replicas):
                if name.partition(".")[0] not in self.databases:
                    raise errors.NotFound("no such database", name=name)
                if name in self.tables:
                    raise errors.Conflict(f"table {name} exists", name=name)
                self.tables[name] = FakeTable([FakeTablet() for _ in range(tablets)], replicas)
                return FakeReply(self._table(name))
            case messages.ListTables(database=database):
                names = sorted(name for name in self.tables if not database or name.startswith(f"{database}."))
                return FakeReply(messages.TableList(tuple(self._table(name) for name in names)))
            case messages.DescribeTable(name=name):
                self._known(name)
                return FakeReply(self._table(name))
            case messages.OpenSession(table=table):
                self._known(table)
                session = secrets.token_bytes(16)
                self.sessions.add(session)
                return FakeReply(messages.SessionOpened(session))
            case messages.Write():
                return FakeReply(self._write(address, message, attachments[0]))
            case messages.Read():
                return self._read(address, message)
            case messages.Scan():
                return self._scan(address, message)
        raise errors.FrameError(f"unknown {message}")

    def _known(self, name: str) -> FakeTable:
        if name not in self.tables:
            raise errors.NotFound(f"there is no table {name}", table=name)
        return self.tables[name]

    def _table(self, name: str) -> messages.TableInfo:
        table = self.tables[name]
        tablets = tuple(
            messages.TabletInfo(f"{i:032x}", self.told_leader, ADDRESSES) for i in range(len(table.tablets))
        )
        return messages.TableInfo(name, tablets, table.replicas)

    def _info(self) -> messages.ClusterInfoReply:
        nodes = tuple(messages.NodeInfo(f"node-{i}", str(i) * 32, address) for i, address in enumerate(ADDRESSES, 1))
        return messages.ClusterInfoReply(
            "c" * 32, "fake", nodes, tuple(self._table(name) for name in sorted(self.tables))
        )

    def _sync(self, table: str) -> list[dict[str, Any]]:
        return [
            {"table": name, "tablet": index, "node": f"node-{i}", "leader": "node-1", "term": 1, "state": "SYNCED",
             "sequence": tablet.sequence, "behind": 0, "root": "00", "verified_at": 0, "bytes_received": 0,
             "path": "log", "reason": "", "scrubbed_at": None, "scrub_records": 0, "repairs": 0, "quarantined": []}
            for name in sorted(self.tables) if table in {"", name}
            for index, tablet in enumerate(self.tables[name].tablets) for i in (1, 2, 3)
        ]  # fmt: skip

    def _rounds(self, table: str) -> list[dict[str, Any]]:
        return [
            {"table": row["table"], "tablet": row["tablet"], "node": row["node"], "leader": "node-1",
             "outcome": self.outcomes.get(row["node"], "equal"), "records": 7, "damages": 0, "repaired": 0, "bytes": 0,
             "rounds": 0, "path": "", "reason": ""}
            for row in self._sync(table)
        ]  # fmt: skip

    def _only_leader(self, address: str) -> None:
        if address != self.leader:
            raise errors.NotLeader("ask the leader", leader=self.leader)

    def _write(self, address: str, message: messages.Write, operations: bytes) -> messages.WriteReply:
        tablet = self._known(message.table).tablets[message.tablet]
        self._only_leader(address)
        if message.session not in self.sessions:
            raise errors.RequestExpired("unknown session")
        kept = tablet.kept.get((message.session, message.number))
        if kept is not None:
            return kept
        self.executed += 1
        results = bytearray()
        first = tablet.sequence + 1
        for kind, condition, key, value, version in decode_operations(operations):
            count = len(self.tables[message.table].tablets)
            assert routing.tablet_of(key, count) == message.tablet, "sent to the wrong tablet"
            tablet.sequence += 1
            current = tablet.records.get(key)
            holds = {0: True, 1: current is None, 2: current is not None and current[1] == version}[condition]
            if not holds:
                results.append(1)
            elif kind == 0:
                tablet.records[key] = (value, tablet.sequence)
                results.append(0)
            else:
                results.append(0 if tablet.records.pop(key, None) is not None else 2)
        reply = messages.WriteReply(bytes(results), first, tablet.sequence)
        tablet.kept[message.session, message.number] = reply
        return reply

    def _read(self, address: str, message: messages.Read) -> FakeReply:
        tablet = self._known(message.table).tablets[message.tablet]
        if message.consistency in {"quorum", "all"}:
            self._only_leader(address)
        records = []
        for key in message.keys[: self.read_items_max]:
            value, version = tablet.records.get(key, (None, 0))
            records.append(packing.PackedRecord(value, version, version))
        return FakeReply(messages.ReadReply(len(records), 12.5), [packing.pack_records(records)])

    def _scan(self, address: str, message: messages.Scan) -> FakeReply:
        tablet = self._known(message.table).tablets[message.tablet]
        if message.consistency in {"quorum", "all"}:
            self._only_leader(address)
        keys = sorted(
            (key for key in tablet.records
             if (message.start is None or key >= message.start) and (message.stop is None or key < message.stop)),
            reverse=message.reverse,
        )  # fmt: skip
        count = min(self.page_items_max, message.limit or len(keys))
        page = [(key, b"" if message.keys_only else tablet.records[key][0]) for key in keys[:count]]
        return FakeReply(messages.ScanReply(len(page), len(page) == len(keys)), [packing.pack_pairs(page)])


def decode_operations(data: bytes) -> list[tuple[int, int, bytes, bytes, int]]:
    """Return (kind, condition, key, value, version) of each operation, read by hand from docs/formats.md."""
    operations = []
    offset = 0
    while offset < len(data):
        kind, condition, key_bytes, value_bytes, version = OPERATION.unpack_from(data, offset)
        offset += OPERATION.size
        key = data[offset : offset + key_bytes]
        offset += key_bytes
        operations.append((kind, condition, key, data[offset : offset + value_bytes], version))
        offset += value_bytes
    assert offset == len(data)
    return operations


class FakeSource:
    """What a client takes for the network."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.closed = False

    def channel(self, address: str, *, port: str = "client", server_key: bytes | None = None) -> FakeChannel:
        assert port == "client"
        return FakeChannel(self.cluster, address)

    async def close(self) -> None:
        self.closed = True


class FakeChannel:
    def __init__(self, cluster: FakeCluster, address: str) -> None:
        self.cluster = cluster
        self.address = address

    def wake(self) -> None:
        pass

    async def request(
        self, message: msgspec.Struct, attachments: Sequence[bytes | memoryview] = (), *, timeout_s: float
    ) -> FakeReply:
        assert timeout_s > 0
        sent = registry.decode(*registry.encode(message))
        reply = self.cluster.handle(self.address, sent, [bytes(item) for item in attachments])
        return FakeReply(
            registry.decode(*registry.encode(reply.message)), [memoryview(item) for item in reply.attachments]
        )
