"""The journal in etcd: entries under consecutive keys, appended by whoever holds the election, read by everybody.

An append is one transaction (`etcd_keys` has the keys)::

    if   election was last changed at <term>     nobody else leads: the key is bound to this node's lease
     and head is <n - 1>                         nothing came in between, and nothing is done twice
    then head = <n>, journal/<n> = the entry     (or n .. n+k-1 of several commands at once)
    else tell me election, head and journal/<n>

Invariants:

* entries are written under the term whose election key the transaction saw, so a leader that lost the key, however
  long it slept, changes nothing;
* asking again is safe: after the first success ``head`` differs. When the answer was lost, the refusal of the second
  time shows whether the entry under ``journal/<n>`` is ours;
* a command over `PART_BYTES` is put in pieces first, each under the same conditions, and counts when the transaction
  with its last piece raises ``head``. Pieces of a leader that stopped half-way are overwritten by the next command that
  needs them, or trimmed;
* an entry proves itself: its digest covers index, term and the whole command.

What is not here: who leads (`etcd_session`), what is applied (`etcd`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from srengine import errors, limits
from srengine.clock import Clock
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, TxnReply, prefix_end
from srengine.ha.backends.etcd_keys import (
    FORMAT,
    ClusterRecord,
    FloorRecord,
    JournalRecord,
    Keys,
    decode,
    decode_entry,
    encode,
    encode_entry,
    entry_digest,
    number,
    read_number,
)
from srengine.ha.journal import Command, decode_command

PART_BYTES: Final = limits.MIB
"""Of one transaction; etcd takes 1.5 MiB unless its administrator says otherwise."""
BATCH_ENTRIES_MAX: Final = 100
"""Commands of one transaction; etcd takes 128 operations."""
PARTS_MAX: Final = limits.JOURNAL_ENTRY_BYTES_MAX // PART_BYTES + 1
PAGE_ENTRIES_MAX: Final = 4096
PAGE_BYTES_TARGET: Final = limits.MIB
RETRY_PAUSE_S: Final = 0.05

assert PART_BYTES + 64 * limits.KIB < 3 * limits.MIB // 2, PART_BYTES
assert BATCH_ENTRIES_MAX + 8 <= 128, BATCH_ENTRIES_MAX


class EtcdEntry(NamedTuple):
    """One entry, whole. ``term``: of the leader that wrote it, 0 for the first entry of a cluster."""

    index: int  # type: ignore[assignment]  # a tuple's own index() is not missed
    term: int
    data: bytes


@dataclass(frozen=True, slots=True)
class EtcdPlace:
    """What every part of the backend is given: the way to etcd, the cluster's keys, who this node is."""

    client: EtcdClient
    keys: Keys
    node_id: str
    name: str
    clock: Clock


class BelowFloor(errors.Error):
    """The entries asked for were trimmed; the state has to be copied from another node."""

    code: ClassVar[str] = "BELOW_FLOOR"


class EtcdJournal:
    """Reads and appends. One appends at a time; see `append`."""

    def __init__(self, place: EtcdPlace) -> None:
        self._client = place.client
        self._keys = place.keys
        self._clock = place.clock

    # --- the cluster -------------------------------------------------------------------------------------------------

    async def bootstrap(self, name: str, first: bytes, *, timeout_s: float = 10.0) -> str:
        """Found the cluster ``name`` with ``first`` as entry 1, unless that was done; return the id that the name has.

        Another id than ours means that somebody else was first: nothing was changed.
        """
        keys = self._keys
        record = ClusterRecord(keys.cluster_id, name)
        entry = EtcdEntry(1, 0, first)
        reply = await self._settled(
            [ec.absent(Keys.name(name)), ec.absent(keys.cluster), ec.absent(keys.head)],
            [
                ec.put(Keys.name(name), keys.cluster_id.encode()),
                ec.put(keys.cluster, encode(record)),
                ec.put(keys.head, number(1)),
                ec.put(keys.journal(1), _encoded(entry, 0, first)),
            ],
            [ec.get(Keys.name(name))],
            deadline=self._clock.monotonic_s() + timeout_s,
        )
        if reply.succeeded:
            return keys.cluster_id
        found = reply.responses[0].range.first
        if found is None:
            raise errors.ForeignData(f"etcd holds data of cluster {keys.cluster_id} that are not named {name}")
        return found.value.decode(errors="replace")

    async def check_cluster(self, *, timeout_s: float = 10.0) -> ClusterRecord:
        """Return what etcd says of the cluster; `errors.NotFound`, `ForeignData`, `UnsupportedFeature`."""
        found = (await self._client.range(self._keys.cluster, timeout_s=timeout_s)).first
        if found is None:
            raise errors.NotFound(f"etcd knows no cluster {self._keys.cluster_id}", cluster_id=self._keys.cluster_id)
        record = decode(found.value, ClusterRecord)
        if record.format != FORMAT:
            raise errors.UnsupportedFeature(
                f"etcd holds format {record.format} of a cluster; this version knows {FORMAT}",
                format=record.format,
            )
        if record.cluster_id != self._keys.cluster_id:
            raise errors.ForeignData(
                f"the keys of cluster {self._keys.cluster_id} say that they are of {record.cluster_id}",
                expected=self._keys.cluster_id,
                found=record.cluster_id,
            )
        return record

    # --- appending ---------------------------------------------------------------------------------------------------

    async def append(
        self,
        before: int,
        term: int,
        commands: Sequence[bytes],
        *,
        compare: Iterable[ec.Compare] = (),
        success: Iterable[ec.Operation] = (),
        deadline: Callable[[], float],
    ) -> None:
        """Append ``commands`` behind ``before`` under ``term``, with further compares and operations.

        ``deadline``: moment of the monotonic clock up to which this may go on; asked anew before each attempt, because
        a lease is renewed meanwhile. Only one append of a term runs at a time.

        Raises `errors.StaleEpoch` when the election key is another one and nothing was appended, `errors.Conflict` when
        one of ``compare`` does not hold, `errors.Diverged` when somebody wrote under our term, `errors.TimedOut` when
        it is not known.
        """
        assert commands, before
        assert len(commands) <= BATCH_ENTRIES_MAX, len(commands)
        keys = self._keys
        guard = [ec.unchanged(keys.election, term), ec.holds(keys.head, number(before))]
        puts: list[ec.Operation] = []
        first = b""
        for index, command in enumerate(commands, before + 1):
            entry = EtcdEntry(index, term, command)
            parts = await self._put_parts(entry, guard, deadline) if len(command) > PART_BYTES else 0
            value = _encoded(entry, parts, command[parts * PART_BYTES :])
            first = first or value
            puts.append(ec.put(keys.journal(index), value))
        reply = await self._settled(
            [*guard, *compare],
            [ec.put(keys.head, number(before + len(commands))), *puts, *success],
            [ec.get(keys.election), ec.get(keys.head), ec.get(keys.journal(before + 1))],
            deadline=deadline,
        )
        if reply.succeeded:
            return
        found = reply.responses[2].range.first
        if found is not None and found.value == first:
            return  # an earlier attempt, whose answer was lost
        self._explain(reply, before, term)

    async def _put_parts(self, entry: EtcdEntry, guard: list[ec.Compare], deadline: Callable[[], float]) -> int:
        """Put all pieces but the last; return how many."""
        count = (len(entry.data) - 1) // PART_BYTES
        assert count <= PARTS_MAX, (count, PARTS_MAX)
        for part in range(count):
            piece = entry.data[part * PART_BYTES : (part + 1) * PART_BYTES]
            reply = await self._settled(
                guard,
                [ec.put(self._keys.part(entry.index, part), piece)],
                [ec.get(self._keys.election), ec.get(self._keys.head)],
                deadline=deadline,
            )
            if not reply.succeeded:
                self._explain(reply, entry.index - 1, entry.term)
        return count

    def _explain(self, reply: TxnReply, before: int, term: int) -> None:
        """Raise why a transaction under ``term`` was refused."""
        election, head = reply.responses[0].range.first, reply.responses[1].range.first
        if election is None or election.mod_revision != term:
            raise errors.StaleEpoch("this node does not hold the election any more", term=term)
        if head is None or head.value != number(before):
            end = "nothing" if head is None else read_number(head.value)
            raise errors.Diverged(
                f"the journal in etcd ends at {end}, not at {before}, though nobody else leads", index=before
            )
        raise errors.Conflict("a condition of the transaction does not hold", index=before + 1)

    async def _settled(
        self,
        compare: Iterable[ec.Compare],
        success: Iterable[ec.Operation],
        failure: Iterable[ec.Operation],
        *,
        deadline: float | Callable[[], float],
    ) -> TxnReply:
        """Do a transaction that may be asked again, until it is known how it ended or the time is over."""
        compare, success, failure = list(compare), list(success), list(failure)
        while True:
            left = (deadline() if callable(deadline) else deadline) - self._clock.monotonic_s()
            if left <= 0:
                raise errors.TimedOut("etcd did not answer in time; whether it acted is not known")
            try:
                return await self._client.txn(compare, success, failure, timeout_s=left)
            except (errors.TimedOut, errors.Unreachable, errors.NoQuorum):
                await asyncio.sleep(RETRY_PAUSE_S)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def head(self, *, timeout_s: float = 5.0) -> int:
        """Return the index of the last entry; linearizable."""
        found = (await self._client.range(self._keys.head, timeout_s=timeout_s)).first
        if found is None:
            raise errors.NotFound(f"etcd knows no cluster {self._keys.cluster_id}", cluster_id=self._keys.cluster_id)
        return read_number(found.value)

    async def floor(self, *, timeout_s: float = 5.0) -> FloorRecord | None:
        """Return up to where the journal was trimmed, None when it never was."""
        found = (await self._client.range(self._keys.floor, timeout_s=timeout_s)).first
        return None if found is None else decode(found.value, FloorRecord)

    async def entries(self, first: int, *, timeout_s: float = 10.0) -> AsyncGenerator[list[EtcdEntry], None]:
        """Yield the entries from ``first`` on, in pages, up to the last one at the time of asking for each page.

        Raises `BelowFloor` when ``first`` was trimmed, `errors.CorruptionError` for what is damaged or missing.
        """
        limit = 64
        while True:
            try:
                page = await self._client.range(
                    self._keys.journal(first), prefix_end(self._keys.journals), limit=limit, timeout_s=timeout_s
                )
            except (errors.FrameError, errors.QuotaExceeded):
                if limit == 1:
                    raise
                limit = max(1, limit // 8)  # large commands: the page was over a bound of ours or of the gateway
                continue
            if not page.kvs:
                return
            yield [await self.entry(kv, first + place) for place, kv in enumerate(page.kvs)]
            first += len(page.kvs)
            if not page.more:
                return
            size = sum(len(kv.value) for kv in page.kvs)
            if size < PAGE_BYTES_TARGET // 2:
                limit = min(PAGE_ENTRIES_MAX, limit * 2)
            elif size > 2 * PAGE_BYTES_TARGET:
                limit = max(1, limit // 2)

    async def commands(self, first: int, last: int, *, timeout_s: float = 10.0) -> list[tuple[int, Command]]:
        """Return the first page of commands in [first, last]; `errors.BelowPurgeMark` when they were trimmed."""
        try:
            async with contextlib.aclosing(self.entries(first, timeout_s=timeout_s)) as pages:
                async for page in pages:
                    return [(entry.index, decode_command(entry.data)) for entry in page if entry.index <= last]
        except BelowFloor as error:
            raise errors.BelowPurgeMark(error.message, index=first) from error
        raise errors.CorruptionError(f"entry {first} is missing in etcd", index=first)

    async def entry(self, kv: ec.KeyValue, expected: int, *, timeout_s: float = 10.0) -> EtcdEntry:
        """Return the entry in a key, with its parts, proved; it must be the one with index ``expected``."""
        index = self._keys.index_of(kv.key)
        if index != expected:
            floor = await self.floor(timeout_s=timeout_s)
            if floor is not None and expected <= floor.index:
                raise BelowFloor(f"entries up to {floor.index} are trimmed; {expected} is needed", index=floor.index)
            raise errors.CorruptionError(f"entry {expected} is missing in etcd; the next is {index}", index=expected)
        record = decode_entry(kv.value)
        data = record.data
        if record.parts:
            data = await self._parts(record, timeout_s) + data
        if record.index != index or record.digest != entry_digest(index, record.term, data):
            raise errors.CorruptionError(f"entry {index} in etcd does not agree with its digest", index=index)
        return EtcdEntry(index, record.term, data)

    async def _parts(self, record: JournalRecord, timeout_s: float) -> bytes:
        if not 0 < record.parts <= PARTS_MAX:
            raise errors.CorruptionError(f"entry {record.index} in etcd has {record.parts} parts", index=record.index)
        pieces = []
        for part in range(record.parts):
            found = (await self._client.range(self._keys.part(record.index, part), timeout_s=timeout_s)).first
            if found is None:
                raise errors.CorruptionError(
                    f"part {part} of entry {record.index} is missing in etcd", index=record.index
                )
            pieces.append(found.value)
        return b"".join(pieces)

    # --- trimming ----------------------------------------------------------------------------------------------------

    async def trim(self, term: int, floor: FloorRecord, copies: Sequence[ec.KeyValue], *, timeout_s: float) -> bool:
        """Remove the entries up to ``floor.index`` if this node leads and ``copies`` (keys ``state/…`` of the holders)
        are as they were read; return whether that was so.
        """
        keys = self._keys
        parts = keys.parts_of(0).removesuffix(number(0) + b"/")
        reply = await self._settled(
            [ec.unchanged(keys.election, term), *(ec.unchanged(kv.key, kv.mod_revision) for kv in copies)],
            [
                ec.put(keys.floor, encode(floor)),
                ec.delete(keys.journals, keys.journal(floor.index + 1)),
                ec.delete(parts, keys.parts_of(floor.index + 1)),
            ],
            [],
            deadline=self._clock.monotonic_s() + timeout_s,
        )
        return reply.succeeded


def _encoded(entry: EtcdEntry, parts: int, rest: bytes) -> bytes:
    return encode_entry(
        JournalRecord(entry.index, entry.term, parts, entry_digest(entry.index, entry.term, entry.data), rest)
    )
