"""The same registers behind the real `ha.metadata.MetadataMachine`, with its epochs and outcomes, in memory.

Epochs are claimed by `ha.fence` with predecessor and digest, requests are kept by `ha.outcomes`; only the applier of
registers is the simulator's own. It does what `Registers` does, so half of the seeds run on either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import xxhash

from srengine.consensus.entries import Entry, EntryKind
from srengine.ha.epochs import FENCE, EpochsApplier, check_epochs, claim, newest_epoch, read_epoch
from srengine.ha.journal import Command as Journaled
from srengine.ha.metadata import Applying, MetadataMachine
from srengine.ha.tables import Batch, Overlay, Tables
from tests.simulator.registers import Command, Outcome, Registers, Result, Verb, decode

REGISTERS: Final = "sim_registers"
SEEN: Final = "sim_seen"
CHANGE: Final = "sim.change"
MEMBER: Final = "sim.member"


class MemoryStore:
    """Tables in memory: what `MetadataMachine` needs of a store."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[bytes, bytes]] = {}

    def get(self, table: str, key: bytes) -> bytes | None:
        return self.tables.get(table, {}).get(key)

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        rows = self.tables.get(table, {})
        for key in sorted(rows):
            if (start is None or key >= start) and (stop is None or key < stop):
                yield key, rows[key]

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self.tables.setdefault(table, {})[key] = value

    def delete(self, table: str, key: bytes) -> bool:
        return self.tables.get(table, {}).pop(key, None) is not None

    def change(self, rows: Mapping[str, dict[bytes, bytes | None]]) -> None:
        for table, changed in rows.items():
            for key, value in changed.items():
                if value is None:
                    self.delete(table, key)
                else:
                    self.put(table, key, value)

    @contextmanager
    def transaction(self) -> Iterator[Batch]:
        overlay = Overlay(self)
        yield overlay
        overlay.write(self)

    def replace_tables(self, tables, rows, *, bytes_expected) -> None:
        raise NotImplementedError("whole states are copied by the simulator itself")


class Change(msgspec.Struct, frozen=True):
    """Body of a write (``compare`` False) or a compare-and-set."""

    register: str
    value: int | None
    expected: int | None
    compare: bool


class RegistersApplier:
    """What a compare-and-set found is a row, too: the machine's outcomes do not carry it."""

    kinds: Sequence[str] = (CHANGE, MEMBER)
    tables: Sequence[str] = (REGISTERS, SEEN)

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        if kind == MEMBER:
            return
        change = msgspec.msgpack.decode(body, type=Change)
        key = change.register.encode()
        stored = tables.get(REGISTERS, key)
        seen = None if stored is None else msgspec.msgpack.decode(stored)
        if not change.compare or seen == change.expected:
            tables.put(REGISTERS, key, msgspec.msgpack.encode(change.value))
        if change.compare:
            tables.put(SEEN, index.to_bytes(8, "big"), msgspec.msgpack.encode(seen))


class MetadataRegisters(Registers):
    """`Registers` on a `MetadataMachine`."""

    __slots__ = ("_machine", "_store")

    def __init__(self) -> None:
        super().__init__()
        self._open(MemoryStore())

    def _open(self, store: MemoryStore) -> None:
        self._store = store
        self._machine = MetadataMachine(store, [EpochsApplier(), RegistersApplier()])

    def claim(self, node: str, term: int) -> bytes:
        return claim(self._store, node_id=node, name=node, term=term).body

    def value(self, register: str) -> int | None:
        stored = self._store.get(REGISTERS, register.encode())
        return None if stored is None else msgspec.msgpack.decode(stored)

    def apply(self, entry: Entry) -> tuple[Command, Outcome] | None:
        self.index, self.term = entry.index, entry.term
        if entry.kind is EntryKind.CONFIGURATION:
            assert entry.configuration is not None, entry
            self.configuration = entry.configuration
        command = decode(entry.data) if entry.data else None
        journaled = None if command is None else _journaled(command)
        in_force = entry.kind is EntryKind.CONFIGURATION
        applied = self._machine.apply_all([Applying(entry.index, entry.term, journaled, in_force)])[0]
        assert self._machine.applied == (entry.index, entry.term), (self._machine.applied, entry)
        newest, digest = newest_epoch(self._store)
        if newest != self.epoch:
            assert check_epochs(self._store) == newest
            record = read_epoch(self._store, newest)
            assert record is not None, newest
            self.epoch, self.owner = newest, record.node_id
        if command is None:
            return None
        refusal = {"": Result.DONE, "EPOCH_TAKEN": Result.KEY_EXISTS, "STALE_EPOCH": Result.STALE_EPOCH}[applied.code]
        stored = self._store.get(SEEN, applied.index.to_bytes(8, "big"))
        seen = None if stored is None else msgspec.msgpack.decode(stored)
        outcome = Outcome(refusal, applied.index, seen)
        summary = repr((self.digest, outcome, digest, self.value(command.register))).encode()
        self.digest = xxhash.xxh3_64_intdigest(summary)
        return command, outcome

    def copy(self) -> Registers:
        other = type(self)()
        self._copy_to(other)
        store = MemoryStore()
        store.tables = {table: copy.copy(rows) for table, rows in self._store.tables.items()}
        other._open(store)
        return other


def _journaled(command: Command) -> Journaled:
    request = xxhash.xxh3_128_digest(command.request) if command.request else b""
    if command.verb is Verb.FENCE:
        return Journaled(FENCE, command.claim)
    if command.verb is Verb.MEMBER:
        return Journaled(MEMBER, b"", command.epoch, request)
    change = Change(command.register, command.value, command.expected, command.verb is Verb.COMPARE)
    return Journaled(CHANGE, msgspec.msgpack.encode(change), command.epoch, request)
