"""`AsyncTable`: the data of one table, for asyncio. Every rule of reading and writing stands here once.

A key belongs to one tablet (`routing.tablet_of`), so a call falls into parts, one for each tablet, which travel at the
same time and succeed or fail for themselves::

    put_many ── group by tablet ──┬─ Write(tablet 0) ─┐
                                  ├─ Write(tablet 3) ─┼─> done, or an error that names what failed
                                  └─ Write(tablet 7) ─┘
    scan ────── a page of each tablet ── merge up to the least last key ── next pages ──> pairs in key order

Invariants:

* A write to one tablet is one entry there: all of it or nothing.
* `pop`, `setdefault` and `popitem` decide by conditions in the tablet, never by what was read before.
* A scan sees each key at most once and in order; it is no snapshot: pages are read one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from srengine import errors, limits
from srengine.client import messages, packing, routing
from srengine.client.calls import expect
from srengine.client.operations import (
    CONDITION_NONE,
    DELETE,
    PUT,
    RESULT_APPLIED,
    RESULT_CONDITION_FAILED,
    Operation,
    check_entry,
    check_key,
    check_value,
    condition_of,
    partly_failed,
)
from srengine.client.scans import Cursor, check_limit, half_open, merge
from srengine.storage import encode_operations

if TYPE_CHECKING:
    from srengine.client.asynchronous import AsyncClient


class TableRecord(NamedTuple):
    """What a table holds for a key.

    ``version``: number for `put` and `delete` with ``if_version``; grows with each write of the tablet.
    ``hybrid_clock``: when it was written, as the leader's clock gave it. ``as_of``: seconds since the Unix epoch; what
    was acknowledged before is contained in the answer. ``siblings``: values written apart from this one by isolated
    writers, for tables that keep them.
    """

    key: bytes
    value: bytes
    version: int
    hybrid_clock: int
    as_of: float
    siblings: tuple[bytes, ...] = ()


class AsyncTable:
    """One table of a cluster. Keys are 1 to 511 bytes, values 0 to 64 MiB; anything but ``bytes`` is a `TypeError`."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self._client = client
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # --- reads -------------------------------------------------------------------------------------------------------

    async def get(self, key: bytes, default: bytes | None = None, *, consistency: str = "quorum") -> bytes | None:
        """Return the value of ``key``, or ``default``.

        ``consistency``: ``quorum`` (every acknowledged write is seen), ``local`` (the node of the endpoint), ``one``
        (any replica in contact) or ``all``. `NotReady` when a replica cannot answer as current within the time-out;
        never a stale "absent".
        """
        record = await self.get_record(key, consistency=consistency)
        return default if record is None else record.value

    async def get_record(self, key: bytes, *, consistency: str = "quorum") -> TableRecord | None:
        """Return value and version of ``key``, or None. Errors as `get`."""
        found = await self._read([check_key(key)], consistency)
        return found[key]

    async def get_many(self, keys: Iterable[bytes], *, consistency: str = "quorum") -> dict[bytes, bytes]:
        """Return the values of those ``keys`` that exist. Not a snapshot over several tablets. Errors as `get`."""
        found = await self._read([check_key(key) for key in keys], consistency)
        return {key: record.value for key, record in found.items() if record is not None}

    async def contains(self, key: bytes, *, consistency: str = "quorum") -> bool:
        """Return whether ``key`` exists. Errors as `get`."""
        return await self.get_record(key, consistency=consistency) is not None

    async def scan(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        consistency: str = "quorum",
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order from ``start`` (inclusive) to ``stop`` (exclusive), within ``prefix``.

        The time-out holds for each page, not for the whole scan. Errors as `get`; `InvalidValue` for a negative limit.
        """
        async for page in self.pages(
            start=start, stop=stop, prefix=prefix, reverse=reverse, limit=limit, consistency=consistency
        ):
            for pair in page:
                yield pair

    async def pages(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        consistency: str = "quorum",
        keys_only: bool = False,
    ) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield what `scan` yields in lists, as it arrives; ``keys_only`` leaves all values empty."""
        routing.check_read_consistency(consistency)
        start, stop = half_open(start, stop, prefix)
        left = check_limit(limit)
        if left == 0 or (start is not None and stop is not None and start >= stop):
            return
        tablets = await self._client._tablets(self.name, self._client._deadline())
        cursors = [
            Cursor(
                tablet,
                messages.Scan(
                    table=self.name,
                    tablet=tablet,
                    start=start,
                    stop=stop,
                    reverse=reverse,
                    limit=left or 0,
                    bytes_max=limits.SCAN_REPLY_BYTES_MAX,
                    consistency=consistency,
                    keys_only=keys_only,
                ),
            )
            for tablet in range(tablets)
        ]
        while cursors:
            await asyncio.gather(*(self._fill(cursor) for cursor in cursors if not cursor.pairs and not cursor.done))
            page = merge(cursors, reverse=reverse)
            cursors = [cursor for cursor in cursors if cursor.pairs or not cursor.done]
            if left is not None:
                page = page[:left]
                left -= len(page)
            if page:
                yield page
            if left == 0:
                return

    async def count(self, *, consistency: str = "quorum") -> int:
        """Return the number of records by a scan over the keys. Errors as `get`."""
        return sum([len(page) async for page in self.pages(keys_only=True, consistency=consistency)])

    # --- writes ------------------------------------------------------------------------------------------------------

    async def put(
        self,
        key: bytes,
        value: bytes,
        *,
        if_absent: bool = False,
        if_version: int | None = None,
        consistency: str = "quorum",
    ) -> int:
        """Store ``value``; return its version. Durable at a majority (``quorum``) or at every replica (``all``) on
        return.

        ``if_absent``: only when there is no record; ``if_version``: only over that version; otherwise `Conflict`, whose
        ``current_version`` is the version that stands (None: no record; 0: it could not be read). An error that ends a
        write after it was sent has ``outcome`` = ``unknown``: it may still happen, at most once.
        """
        condition, version = condition_of(if_absent=if_absent, if_version=if_version)
        operation = (PUT, check_key(key), check_value(value), condition, version)
        reply = await self._write_one(operation, consistency)
        return reply.last_sequence

    async def delete(self, key: bytes, *, if_version: int | None = None, consistency: str = "quorum") -> bool:
        """Delete ``key``; return whether there was something to delete. Conditions, durability and errors as `put`."""
        condition, version = condition_of(if_absent=False, if_version=if_version)
        reply = await self._write_one((DELETE, check_key(key), b"", condition, version), consistency)
        return reply.results[0] == RESULT_APPLIED

    async def put_many(
        self, pairs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]], *, consistency: str = "quorum"
    ) -> int:
        """Store all pairs; return how many. All or nothing for each tablet, not over tablets.

        When some tablets fail, the error is that of the first one, with ``failed_tablets``, ``failed_count`` and
        ``failed_keys`` (hexadecimal, at most 100 named). `InvalidValue` before anything is sent when a pair breaks a
        rule or one tablet's part is larger than an entry may be (128 MiB, 1 000 000 operations).
        """
        items = pairs.items() if isinstance(pairs, Mapping) else pairs
        operations: list[Operation] = [
            (PUT, check_key(key), check_value(value), CONDITION_NONE, 0) for key, value in items
        ]
        await self._write_many(operations, consistency)
        return len(operations)

    async def delete_many(self, keys: Iterable[bytes], *, consistency: str = "quorum") -> int:
        """Delete all ``keys``; return how many existed. Atomicity and errors as `put_many`."""
        operations: list[Operation] = [(DELETE, check_key(key), b"", CONDITION_NONE, 0) for key in keys]
        return await self._write_many(operations, consistency)

    async def setdefault(self, key: bytes, default: bytes) -> bytes:
        """Return the value of ``key``; when there is none, store ``default`` and return it. Atomic. Errors as `put`."""
        check_value(default)
        deadline = self._client._deadline()
        while True:
            found = await self.get(key)
            if found is not None:
                return found
            try:
                await self.put(key, default, if_absent=True)
            except errors.Conflict as error:
                self._check_contended(error, deadline, key)
            else:
                return default

    async def pop(self, key: bytes) -> bytes | None:
        """Delete ``key`` and return the value that was deleted, or None. Atomic: two poppers never get one value."""
        deadline = self._client._deadline()
        while True:
            record = await self.get_record(key)
            if record is None:
                return None
            try:
                deleted = await self.delete(key, if_version=record.version)
            except errors.Conflict as error:
                self._check_contended(error, deadline, key)
            else:
                if deleted:
                    return record.value

    def _check_contended(self, error: errors.Conflict, deadline: float, key: bytes) -> None:
        """Return when the condition was lost to another writer and there is time to look again; raise otherwise."""
        if error.code != errors.Conflict.code:
            raise error
        if asyncio.get_running_loop().time() >= deadline:
            raise errors.TimedOut("other writers kept changing the key", key=key) from error

    # --- how -------------------------------------------------------------------------------------------------------

    async def _read(self, keys: Sequence[bytes], consistency: str) -> dict[bytes, TableRecord | None]:
        routing.check_read_consistency(consistency)
        deadline = self._client._deadline()
        tablets = await self._client._tablets(self.name, deadline)
        parts: dict[int, list[bytes]] = {}
        for key in dict.fromkeys(keys):
            parts.setdefault(routing.tablet_of(key, tablets), []).append(key)
        answers = await asyncio.gather(
            *(self._read_tablet(tablet, part, consistency, deadline) for tablet, part in parts.items())
        )
        found = {record_key: record for answer in answers for record_key, record in answer}
        return {key: found[key] for key in keys}

    async def _read_tablet(
        self, tablet: int, keys: list[bytes], consistency: str, deadline: float
    ) -> list[tuple[bytes, TableRecord | None]]:
        found: list[tuple[bytes, TableRecord | None]] = []
        while len(found) < len(keys):
            asked = _bounded_keys(keys, len(found))
            build = partial(messages.Read, self.name, tablet, asked, consistency, limits.READ_REPLY_BYTES_MAX)
            call = self._client._tablet_call(self.name, tablet, consistency, deadline, build)
            reply = await self._client._call(call)
            answer = expect(reply.message, messages.ReadReply)
            if not 1 <= answer.count <= len(asked):
                raise errors.FrameError(f"{answer.count} answers to {len(asked)} keys")
            records = packing.unpack_records(packing.single(reply.attachments), answer.count)
            for key, record in zip(asked, records, strict=False):
                found.append(
                    (
                        key,
                        None
                        if record.value is None
                        else TableRecord(key, record.value, record.version, record.hybrid_clock, answer.as_of),
                    )
                )
        return found

    async def _fill(self, cursor: Cursor) -> None:
        request = cursor.request
        call = self._client._tablet_call(
            self.name,
            cursor.tablet,
            request.consistency,
            self._client._deadline(),
            lambda wait_s: messages.Scan(
                table=request.table,
                tablet=request.tablet,
                start=cursor.start,
                stop=cursor.stop,
                reverse=request.reverse,
                limit=request.limit,
                bytes_max=request.bytes_max,
                consistency=request.consistency,
                keys_only=request.keys_only,
                timeout_s=wait_s,
            ),
        )
        reply = await self._client._call(call)
        answer = expect(reply.message, messages.ScanReply)
        cursor.take(packing.unpack_pairs(packing.single(reply.attachments), answer.count), done=answer.done)

    async def _write_one(self, operation: Operation, consistency: str) -> messages.WriteReply:
        routing.check_write_consistency(consistency)
        deadline = self._client._deadline()
        with _before_execution():
            tablets = await self._client._tablets(self.name, deadline)
        key = operation[1]
        reply = await self._write(routing.tablet_of(key, tablets), [operation], consistency, deadline)
        if reply.results[0] == RESULT_CONDITION_FAILED:
            raise await self._conflict(key)
        return reply

    async def _conflict(self, key: bytes) -> errors.Conflict:
        """Return the error of a lost condition with the version that stands now."""
        try:
            current = await self.get_record(key)
        except errors.Error as error:
            # The condition was lost, whatever became of the question what stands now.
            conflict = errors.Conflict("the condition does not hold", key=key, current_version=0)
            conflict.__cause__ = error
            return conflict
        if current is None:
            return errors.Conflict("the condition does not hold: there is no record", key=key, current_version=None)
        return errors.Conflict(
            f"the condition does not hold: the record's version is {current.version}",
            key=key,
            current_version=current.version,
        )

    async def _write_many(self, operations: list[Operation], consistency: str) -> int:
        """Write each tablet's part; return the number of operations that changed something."""
        routing.check_write_consistency(consistency)
        if not operations:
            return 0
        deadline = self._client._deadline()
        with _before_execution():
            tablets = await self._client._tablets(self.name, deadline)
        parts: dict[int, list[Operation]] = {}
        for operation in operations:
            parts.setdefault(routing.tablet_of(operation[1], tablets), []).append(operation)
        for tablet, part in parts.items():
            check_entry(tablet, part)
        answers = await asyncio.gather(
            *(self._write(tablet, part, consistency, deadline) for tablet, part in parts.items()),
            return_exceptions=True,
        )
        applied = 0
        failed: dict[int, errors.Error] = {}
        for tablet, answer in zip(parts, answers, strict=True):
            if isinstance(answer, errors.Error):
                failed[tablet] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                applied += answer.results.count(RESULT_APPLIED)
        if failed:
            raise partly_failed(failed, parts) from next(iter(failed.values()))
        return applied

    async def _write(
        self, tablet: int, operations: list[Operation], consistency: str, deadline: float
    ) -> messages.WriteReply:
        """Send one tablet's part until it is answered; the same request id through all retries."""
        encoded = encode_operations(operations)
        while True:
            with _before_execution():
                session = await self._client._sessions.get(self.name, deadline)
            number = session.next_number(tablet)
            build = partial(messages.Write, self.name, tablet, session.id, number, consistency)
            call = self._client._tablet_call(self.name, tablet, consistency, deadline, build, (encoded,), is_write=True)
            try:
                reply = await self._client._call(call)
            except errors.RequestExpired:
                self._client._sessions.drop(self.name, session)
                if call.may_have_happened:
                    raise
                continue
            answer = expect(reply.message, messages.WriteReply)
            if len(answer.results) != len(operations):
                raise errors.FrameError(f"{len(answer.results)} results for {len(operations)} operations")
            return answer


@contextlib.contextmanager
def _before_execution() -> Iterator[None]:
    """Say of a failing write that it was not executed: it was not even sent."""
    try:
        yield
    except errors.Error as error:
        error.details.setdefault("outcome", "not executed")
        raise


def _bounded_keys(keys: list[bytes], begin: int) -> tuple[bytes, ...]:
    """Return as many keys from ``begin`` as one message carries; at least one."""
    total = 0
    end = begin
    while end < len(keys) and end - begin < limits.READ_MESSAGE_KEYS_MAX:
        total += len(keys[end])
        if total > limits.READ_MESSAGE_KEYS_BYTES_MAX and end > begin:
            break
        end += 1
    return tuple(keys[begin:end])
