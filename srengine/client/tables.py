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
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from srengine import errors, limits
from srengine.client import messages, packing, routing
from srengine.client.calls import expect
from srengine.storage import encode_operations

if TYPE_CHECKING:
    from srengine.client.asynchronous import AsyncClient

PUT: Final = 0
DELETE: Final = 1
CONDITION_NONE: Final = 0
CONDITION_IF_ABSENT: Final = 1
CONDITION_IF_VERSION: Final = 2
RESULT_APPLIED: Final = 0
RESULT_CONDITION_FAILED: Final = 1
RESULT_NOTHING_TO_DO: Final = 2

OPERATION_OVERHEAD_BYTES: Final = 64
"""No operation is encoded with more than this beside its key and value; used to refuse a batch before it is sent."""

Operation = tuple[int, bytes, bytes, int, int]
"""(kind, key, value, condition, version) as `srengine.storage.encode_operations` takes it."""


class TableRecord(NamedTuple):
    """What a table holds for a key.

    ``version``: number for `put` and `delete` with ``if_version``; grows with each write of the tablet.
    ``hybrid_clock``: when it was written, as the leader's clock gave it. ``as_of``: seconds since the Unix epoch; what was
    acknowledged before is contained in the answer. ``siblings``: values written apart from this one by isolated writers,
    for tables that keep them.
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

        ``consistency``: ``quorum`` (every acknowledged write is seen), ``local`` (the node of the endpoint), ``one`` (any replica
        in contact) or ``all``. `NotReady` when a replica cannot answer as current within the time-out; never a stale "absent".
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
        start, stop = _range(start, stop, prefix)
        left = _check_limit(limit)
        if left == 0 or (start is not None and stop is not None and start >= stop):
            return
        tablets = await self._client._tablets(self.name, self._client._deadline())
        cursors = [
            _Cursor(tablet, messages.Scan(
                table=self.name, tablet=tablet, start=start, stop=stop, reverse=reverse, limit=left or 0,
                bytes_max=limits.SCAN_REPLY_BYTES_MAX, consistency=consistency, keys_only=keys_only,
            ))
            for tablet in range(tablets)
        ]
        while cursors:
            await asyncio.gather(*(self._fill(cursor) for cursor in cursors if not cursor.pairs and not cursor.done))
            page = _merge(cursors, reverse=reverse)
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
        """Store ``value``; return its version. Durable at a majority (``quorum``) or at every replica (``all``) on return.

        ``if_absent``: only when there is no record; ``if_version``: only over that version; otherwise `Conflict`, whose
        ``current_version`` is the version that stands (None: no record). An error that ends a write after it was sent has
        ``outcome`` = ``unknown``: it may still happen, at most once.
        """
        condition, version = _condition(if_absent=if_absent, if_version=if_version)
        operation = (PUT, check_key(key), check_value(value), condition, version)
        reply = await self._write_one(operation, consistency)
        return reply.last_sequence

    async def delete(self, key: bytes, *, if_version: int | None = None, consistency: str = "quorum") -> bool:
        """Delete ``key``; return whether there was something to delete. Conditions, durability and errors as `put`."""
        condition, version = _condition(if_absent=False, if_version=if_version)
        reply = await self._write_one((DELETE, check_key(key), b"", condition, version), consistency)
        return reply.results[0] == RESULT_APPLIED

    async def put_many(
        self, pairs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]], *, consistency: str = "quorum"
    ) -> int:
        """Store all pairs; return how many. All or nothing for each tablet, not over tablets.

        When some tablets fail, the error is that of the first one, with ``failed_tablets``, ``failed_count`` and
        ``failed_keys`` (hexadecimal, at most 100 named). `InvalidValue` before anything is sent when a pair breaks a rule or
        one tablet's part is larger than an entry may be (128 MiB, 1 000 000 operations).
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
            call = self._client._tablet_call(
                self.name, tablet, consistency, deadline,
                lambda wait_s, asked=asked: messages.Read(
                    self.name, tablet, asked, consistency, limits.READ_REPLY_BYTES_MAX, wait_s
                ),
            )
            reply = await self._client._call(call)
            answer = expect(reply.message, messages.ReadReply)
            if not 1 <= answer.count <= len(asked):
                raise errors.FrameError(f"{answer.count} answers to {len(asked)} keys")
            records = packing.unpack_records(packing.single(reply.attachments), answer.count)
            for key, record in zip(asked, records, strict=False):
                found.append((key, None if record.value is None else TableRecord(
                    key, record.value, record.version, record.hybrid_clock, answer.as_of
                )))
        return found

    async def _fill(self, cursor: _Cursor) -> None:
        request = cursor.request
        call = self._client._tablet_call(
            self.name, cursor.tablet, request.consistency, self._client._deadline(),
            lambda wait_s: messages.Scan(
                table=request.table, tablet=request.tablet, start=cursor.start, stop=cursor.stop,
                reverse=request.reverse, limit=request.limit, bytes_max=request.bytes_max,
                consistency=request.consistency, keys_only=request.keys_only, timeout_s=wait_s,
            ),
        )
        reply = await self._client._call(call)
        answer = expect(reply.message, messages.ScanReply)
        cursor.take(packing.unpack_pairs(packing.single(reply.attachments), answer.count), done=answer.done)

    async def _write_one(self, operation: Operation, consistency: str) -> messages.WriteReply:
        routing.check_write_consistency(consistency)
        deadline = self._client._deadline()
        tablets = await self._client._tablets(self.name, deadline)
        key = operation[1]
        reply = await self._write(routing.tablet_of(key, tablets), [operation], consistency, deadline)
        if reply.results[0] == RESULT_CONDITION_FAILED:
            raise await self._conflict(key)
        return reply

    async def _conflict(self, key: bytes) -> errors.Conflict:
        """Return the error of a lost condition with the version that stands now."""
        current = await self.get_record(key)
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
        tablets = await self._client._tablets(self.name, deadline)
        parts: dict[int, list[Operation]] = {}
        for operation in operations:
            parts.setdefault(routing.tablet_of(operation[1], tablets), []).append(operation)
        for tablet, part in parts.items():
            _check_entry(tablet, part)
        answers = await asyncio.gather(
            *(self._write(tablet, part, consistency, deadline) for tablet, part in parts.items()),
            return_exceptions=True,
        )
        applied = 0
        failed: list[tuple[int, BaseException]] = []
        for tablet, answer in zip(parts, answers, strict=True):
            if isinstance(answer, BaseException):
                failed.append((tablet, answer))
            else:
                applied += answer.results.count(RESULT_APPLIED)
        if failed:
            raise _partly_failed(failed, parts)
        return applied

    async def _write(
        self, tablet: int, operations: list[Operation], consistency: str, deadline: float
    ) -> messages.WriteReply:
        """Send one tablet's part until it is answered; the same request id through all retries."""
        encoded = encode_operations(operations)
        while True:
            session = await self._client._sessions.get(self.name, deadline)
            number = session.next_number(tablet)
            call = self._client._tablet_call(
                self.name, tablet, consistency, deadline,
                lambda wait_s, session=session, number=number: messages.Write(
                    self.name, tablet, session.id, number, consistency, wait_s
                ),
                (encoded,),
                is_write=True,
            )
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


@dataclass(slots=True)
class _Cursor:
    """Where a scan stands in one tablet."""

    tablet: int
    request: messages.Scan
    pairs: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Read, but not yet handed out; in the order of the scan."""
    done: bool = False
    """Nothing is left behind ``pairs``."""
    start: bytes | None = None
    stop: bytes | None = None

    def __post_init__(self) -> None:
        self.start, self.stop = self.request.start, self.request.stop

    def take(self, pairs: list[tuple[bytes, bytes]], *, done: bool) -> None:
        """Add a page and move behind its last key; `FrameError` when it is not in order or outside what was asked."""
        keys = [key for key, _ in pairs]
        low, high = (keys[-1], keys[0]) if self.request.reverse and keys else (keys[0], keys[-1]) if keys else (b"", b"")
        in_order = all(a > b for a, b in zip(keys, keys[1:])) if self.request.reverse else all(
            a < b for a, b in zip(keys, keys[1:])
        )
        outside = bool(keys) and (
            (self.start is not None and low < self.start) or (self.stop is not None and high >= self.stop)
        )
        if not in_order or outside or (not keys and not done):
            raise errors.FrameError("a page of a scan is empty, out of order, or outside what was asked", tablet=self.tablet)
        self.pairs = pairs
        self.done = done
        if keys and self.request.reverse:
            self.stop = keys[-1]
        elif keys:
            self.start = keys[-1] + b"\0"


_KEY_OF_PAIR: Final = itemgetter(0)


def _merge(cursors: list[_Cursor], *, reverse: bool) -> list[tuple[bytes, bytes]]:
    """Take from all cursors what is certainly next: everything up to the nearest end of a page that has a successor."""
    ends = [cursor.pairs[-1][0] for cursor in cursors if not cursor.done]
    end = None if not ends else max(ends) if reverse else min(ends)
    page: list[tuple[bytes, bytes]] = []
    for cursor in cursors:
        if end is None:
            page += cursor.pairs
            cursor.pairs = []
            continue
        count = sum(1 for key, _ in cursor.pairs if (key >= end if reverse else key <= end))
        page += cursor.pairs[:count]
        cursor.pairs = cursor.pairs[count:]
    page.sort(key=_KEY_OF_PAIR, reverse=reverse)
    return page


def check_key(key: bytes) -> bytes:
    """Return ``key`` if it can be one: `TypeError` unless bytes, `InvalidValue` unless 1 to 511 of them."""
    if type(key) is not bytes:
        raise TypeError(f"a key is bytes, not {type(key).__name__}")
    if not limits.KEY_BYTES_MIN <= len(key) <= limits.KEY_BYTES_MAX:
        raise errors.InvalidValue(
            f"a key of {len(key)} bytes; it has {limits.KEY_BYTES_MIN} to {limits.KEY_BYTES_MAX}", key_bytes=len(key)
        )
    return key


def check_value(value: bytes) -> bytes:
    """Return ``value`` if it can be one: `TypeError` unless bytes, `InvalidValue` above 64 MiB."""
    if type(value) is not bytes:
        raise TypeError(f"a value is bytes, not {type(value).__name__}")
    if len(value) > limits.VALUE_BYTES_MAX:
        raise errors.InvalidValue(
            f"a value of {len(value)} bytes; at most {limits.VALUE_BYTES_MAX} are stored", value_bytes=len(value)
        )
    return value


def _condition(*, if_absent: bool, if_version: int | None) -> tuple[int, int]:
    if if_absent and if_version is not None:
        raise errors.InvalidValue("if_absent and if_version exclude each other")
    if if_absent:
        return CONDITION_IF_ABSENT, 0
    if if_version is None:
        return CONDITION_NONE, 0
    if type(if_version) is not int:
        raise TypeError(f"if_version is a whole number, not {type(if_version).__name__}")
    if not 0 < if_version < 2**64:
        raise errors.InvalidValue(f"if_version is {if_version}; versions are positive")
    return CONDITION_IF_VERSION, if_version


def _range(start: bytes | None, stop: bytes | None, prefix: bytes | None) -> tuple[bytes | None, bytes | None]:
    """Return the half-open range that fulfils all three."""
    for bound in (start, stop, prefix):
        if bound is not None and type(bound) is not bytes:
            raise TypeError(f"start, stop and prefix are bytes, not {type(bound).__name__}")
    if prefix:
        end = prefix.rstrip(b"\xff")
        after = end[:-1] + bytes([end[-1] + 1]) if end else None
        start = prefix if start is None else max(start, prefix)
        if after is not None:
            stop = after if stop is None else min(stop, after)
    return start or None, stop


def _check_limit(limit: int | None) -> int | None:
    if limit is not None and (type(limit) is not int or limit < 0):
        raise errors.InvalidValue(f"limit is {limit!r}; it is a whole number from 0, or None")
    return limit


def _bounded_keys(keys: list[bytes], begin: int) -> tuple[bytes, ...]:
    """Return as many keys from ``begin`` as one message carries; at least one."""
    total = 0
    end = begin
    while end < len(keys) and end - begin < limits.READ_KEYS_MAX:
        total += len(keys[end])
        if total > limits.READ_KEYS_BYTES_MAX and end > begin:
            break
        end += 1
    return tuple(keys[begin:end])


def _check_entry(tablet: int, operations: list[Operation]) -> None:
    size = sum(len(key) + len(value) + OPERATION_OVERHEAD_BYTES for _, key, value, _, _ in operations)
    if len(operations) > limits.ENTRY_OPERATIONS_MAX or size > limits.ENTRY_BYTES_MAX:
        raise errors.InvalidValue(
            f"{len(operations)} operations of {size} bytes fall to tablet {tablet}; one entry holds "
            f"{limits.ENTRY_OPERATIONS_MAX} operations and {limits.ENTRY_BYTES_MAX} bytes: write smaller batches",
            tablet=tablet,
        )


def _partly_failed(
    failed: list[tuple[int, BaseException]], parts: dict[int, list[Operation]]
) -> BaseException:
    """Return the first failure with the names of all that failed; anything but a typed error goes out as it is."""
    for _, error in failed:
        if not isinstance(error, errors.Error):
            return error
    first: Any = failed[0][1]
    keys = [key for tablet, _ in failed for _, key, _, _, _ in parts[tablet]]
    facts = dict(first.details)
    facts["failed_tablets"] = [tablet for tablet, _ in failed]
    facts["failed_count"] = len(keys)
    facts["failed_keys"] = [key.hex() for key in keys[: limits.FAILED_KEYS_NAMED_MAX]]
    facts["applied_tablets"] = [tablet for tablet in parts if tablet not in facts["failed_tablets"]]
    message = f"{len(failed)} of {len(parts)} tablets failed, with {len(keys)} operations: {first.message}"
    error = type(first)(message, **facts)
    error.__cause__ = first
    return error
