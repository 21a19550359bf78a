"""A tablet's leaves, and what one side of an exchange computes with them.

    Leaves      the tree of one tablet: built when first needed, adjusted while it is warm, dropped at will
    Moment      the tablet at one moment, leaves and pinned reader in step: sketches, estimator, rows to ship

The exchange itself (who says what when) is a machine in `srengine.sync`; everything here is one side's arithmetic and
its reads. The byte layouts stand in docs/formats-exchange.md.

**From sums to records.** Peeling a sketch over leaves gives, for each leaf that differs, the difference d of its values
and the difference w of its weighted sums, ours minus theirs. Then, cheapest first:

1. w is a multiple of d and the quotient a key id: one record differs, and this is its id.
2. A boundary key that one side lacks makes two leaves differ, by everything between it and the next boundary. The sums
   of the two together give its id, as in 1. A leaf whose id is not here begins with a key that is not here anyway.
3. Two records differ, each of them either here or missing here with one that is: every pair of ours is tried; the
   quotients that do not come out whole rule out the others.
4. What remains (two leaves in a hundred, at 1000 differences in a million records) is shipped whole as a range of keys
   when that is little, else its digests are listed, which locates the records, and they are fetched one round later.

A wrong guess has a chance of about 2^-40 and is no danger: an exchange ends by a transaction that must reach the root.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors, limits
from srengine._native import merkle
from srengine._native import tablet as kernel
from srengine.storage.view import TOMBSTONE, encode_meta
from srengine.types import Actual, Found, Item, KeyRange, Listed, Located, Repair

if TYPE_CHECKING:
    from srengine.storage.tablet import Tablet

MASK: Final = (1 << 128) - 1
VALUE_LIMIT: Final = 1 << 40
_PAIR_RECORDS_MAX: Final = 512
"""Records of a leaf up to which pairs are tried: 130 000 of them, about a millisecond."""
_PAIR_LEAVES_MAX: Final = 512
_JOIN_TRIES_MAX: Final = 1_000_000
_THREADS_RECORDS_MIN: Final = 100_000
"""Records from which a walk of all is worth a second thread."""


class Leaves:
    """The leaves of one tablet. Thread-safe: one moment at a time, a second waits.

    ``boundary_bits`` and ``id_bits`` other than the defaults are for tests.
    """

    def __init__(self, environment: kernel.Environment, *, boundary_bits: int = 5, id_bits: int = 47) -> None:
        self._environment = environment
        self._lock = threading.RLock()
        self.tree = merkle.Tree(environment, boundary_bits=boundary_bits, id_bits=id_bits)
        self.id_limit = 1 << id_bits
        self.id_bits = id_bits
        self.builds = 0
        """How often all records were walked."""
        self.scan: tuple[int, merkle.Records] | None = None
        """Where all records are at a transaction, while an exchange compares record by record."""
        self.prepared: tuple[int, merkle.Sketch] | None = None
        """A table over all records at a transaction, made before it was asked for."""

    @contextmanager
    def moment(self, *, recount: bool = False, threads: int = 1) -> Iterator[Moment]:
        """Bring the leaves up to date and pin the view that they describe.

        ``recount``: walk all records, although the leaves are warm: what the sums then say was read from the records
        now, not carried forward. ``threads``: 2 walks from both ends. Raises `CorruptionError`, `ViewExpired`.
        """
        with self._lock:
            reader = self._align(recount=recount, threads=threads)
            if self.scan is not None and self.scan[0] != self.tree.txn:
                self.scan = None
            if self.prepared is not None and self.prepared[0] != self.tree.txn:
                self.prepared = None
            try:
                yield Moment(self, reader, self._environment)
            finally:
                reader.close()

    def drop(self) -> None:
        """Forget the leaves; the next moment builds them again."""
        with self._lock:
            self.scan = self.prepared = None
            self.tree.drop()

    def _align(self, *, recount: bool, threads: int) -> kernel.Reader:
        if self.tree.warm and not recount:
            reader = self._environment.reader()
            try:
                if self.tree.advance(reader):
                    return reader
            except BaseException:
                reader.close()
                raise
            reader.close()
        self.tree.start_tracking()
        self.builds += 1
        reader = self._environment.reader()
        try:
            other = self._environment.reader() if threads > 1 else None
            try:
                if not self.tree.build(reader, other):
                    self.tree.build(reader)
            finally:
                if other is not None:
                    other.close()
        except BaseException:
            reader.close()
            raise
        return reader


class Moment:
    """A tablet at one moment; made by `Leaves.moment`, used inside its ``with`` alone."""

    def __init__(self, leaves: Leaves, reader: kernel.Reader, environment: kernel.Environment) -> None:
        self._leaves = leaves
        self._tree = leaves.tree
        self._reader = reader
        self._environment = environment
        self._rows_digest: bytes | None = None
        self.sequence, self.root, self.count, *_ = reader.state_tuple

    @property
    def state(self) -> bytes:
        """The state row."""
        return self._reader.state_image

    @property
    def leaf_count(self) -> int:
        """How many leaves there are."""
        return self._tree.leaf_count

    @property
    def damaged(self) -> list[bytes]:
        """Keys of records whose header cannot be read, as of the last walk of all records."""
        return self._tree.damaged

    @property
    def estimator(self) -> bytes:
        """The estimator's buckets."""
        return self._tree.estimator

    @property
    def rows_digest(self) -> bytes:
        """16 bytes: the root without its records, recomputed from requests, sessions and purge mark."""
        if self._rows_digest is None:
            self._rows_digest = self._tree.rows_digest(self._reader)
        return self._rows_digest

    @property
    def actual(self) -> Actual:
        """What the records add up to. Counts but ``count`` are those of the last walk of all records."""
        total = int.from_bytes(self._tree.sum, "little") + int.from_bytes(self.rows_digest, "little")
        return Actual(
            (total & MASK).to_bytes(16, "little"), self._tree.count, self._tree.live_count, self._tree.entries
        )

    @property
    def dump(self) -> bytes:
        """14 bytes a leaf: its id and the first 8 bytes of its sum."""
        return self._tree.digests()

    def sketch(self, *, by_leaf: bool, ways: int, width: int, seed: int) -> merkle.Sketch:
        """Return a table of all leaves or all records."""
        table = merkle.Sketch(width, seed, by_leaf=by_leaf, ways=ways)
        if by_leaf:
            table.add_leaves(self._tree)
            return table
        ready, self._leaves.prepared = self._leaves.prepared, None
        if ready is not None and (ready[1].ways, ready[1].width, ready[1].seed) == (ways, width, seed):
            return ready[1]
        self._walk(table)
        return table

    def prepare(self, *, ways: int, width: int, seed: int) -> None:
        """Make a table over records before it is asked for. One is kept, for as long as the tablet stands still."""
        self._leaves.prepared = (self._tree.txn, self.sketch(by_leaf=False, ways=ways, width=width, seed=seed))

    def fill(self, table: merkle.Sketch) -> None:
        """Add all leaves to a table that other tablets' leaves stand in, too."""
        table.add_leaves(self._tree)

    def own_leaves(self, items: list[Item]) -> set[int]:
        """Return the ids of those items that are leaves here."""
        return set(self._tree.find_leaves([item[0] for item in items]))

    def peel(self, sketches: list[merkle.Sketch]) -> list[Item] | None:
        """Read what differs from tables of differences; None: too small."""
        return merkle.peel(sketches, self._leaves.id_bits)

    def _records(self) -> merkle.Records:
        """Return where all records are: by the walk that filled a table, or by one for this."""
        if self._leaves.scan is None:
            self._walk(None)
        assert self._leaves.scan is not None
        return self._leaves.scan[1]

    def _walk(self, table: merkle.Sketch | None) -> None:
        """Walk all records; fill ``table`` on the way."""
        other = self._environment.reader() if self._tree.count >= _THREADS_RECORDS_MIN else None
        try:
            records = merkle.Records(self._tree, self._reader, limits.EXCHANGE_RECORDS_MAX, other, table)
        finally:
            if other is not None:
                other.close()
        self._leaves.scan = (self._tree.txn, records)

    # --- from sums to records ----------------------------------------------------------------------------------------

    def _single(self, value: int, weighted: int) -> int | None:
        """Return the key id of the one record that makes this difference, or None: there are several."""
        if value == 0 or weighted % value:
            return None
        quotient = weighted // value
        return quotient if 0 <= quotient < self._leaves.id_limit and abs(value) < VALUE_LIMIT else None

    def resolve(self, items: list[Item]) -> Located:
        """Locate the records behind differing leaves (see the top of the module)."""
        ordinals = self._tree.find_leaves([item[0] for item in items])
        known: dict[int, tuple[int, int]] = {}
        unknown: list[Item] = []
        for item, value, weighted in items:
            if item in ordinals:
                known[ordinals[item]] = (value, weighted)
            else:
                unknown.append((item, value, weighted))
        ids = {ordinal: item for item, ordinal in ordinals.items()}
        located: dict[int, tuple[int, int]] = {}
        several: dict[int, tuple[int, int]] = {}
        for ordinal, (value, weighted) in known.items():
            single = self._single(value, weighted)
            if single is None:
                several[ordinal] = (value, weighted)
            else:
                located[ordinal] = (ids[ordinal], single)
        pairs = self._join_missing_boundaries(unknown, known, several, located)
        pairs += self._join_own_boundaries(ids, known, several, located)
        pairs += self._pairs(ids, several)
        pairs += located.values()
        return Located(sorted(set(pairs)), [], self._ranges(sorted(several)))

    def _join_missing_boundaries(
        self,
        unknown: list[Item],
        known: dict[int, tuple[int, int]],
        several: dict[int, tuple[int, int]],
        located: dict[int, tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Explain boundaries of theirs that are not ours: each is a record only they have, whatever else differs there.

        Together with the leaf of ours that they cut mostly nothing else remains; then that leaf is explained, too.
        """
        found = [(item, item) for item, _, _ in unknown]
        for item, value, weighted in unknown:
            if weighted == item * value:
                continue  # nothing lies between it and the next boundary
            for candidates in (several, located):
                if len(unknown) * len(candidates) > _JOIN_TRIES_MAX:
                    continue
                for ordinal in candidates:
                    own_value, own_weighted = known[ordinal]
                    if own_weighted + weighted == item * (own_value + value) and own_value + value:
                        del candidates[ordinal]
                        break
                else:
                    continue
                break
        return found

    def _join_own_boundaries(
        self,
        ids: dict[int, int],
        known: dict[int, tuple[int, int]],
        several: dict[int, tuple[int, int]],
        located: dict[int, tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Boundaries of ours that they lack: the leaf and the one before it together differ by that record alone."""
        found = []
        for ordinal in sorted(several):
            if ordinal not in several or ordinal - 1 not in known:
                continue
            value = known[ordinal][0] + known[ordinal - 1][0]
            weighted = known[ordinal][1] + known[ordinal - 1][1]
            if value and weighted == ids[ordinal] * value:
                found.append((ids[ordinal], ids[ordinal]))
                del several[ordinal]
                several.pop(ordinal - 1, None)
                located.pop(ordinal - 1, None)
        return found

    def _pairs(self, ids: dict[int, int], several: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
        """Leaves with two differing records, as far as ours tell which."""
        found: list[tuple[int, int]] = []
        if len(several) > _PAIR_LEAVES_MAX:
            return found
        for ordinal in sorted(several):
            value, weighted = several[ordinal]
            two = self._tree.two_records(self._reader, ordinal, value, weighted, _PAIR_RECORDS_MAX)
            if two is not None:
                found += [(ids[ordinal], two[0]), (ids[ordinal], two[1])]
                del several[ordinal]
        return found

    def _ranges(self, ordinals: list[int]) -> list[KeyRange]:
        result: list[KeyRange] = []
        for ordinal in ordinals:
            start, stop = self._tree.leaf_key(ordinal), self._tree.leaf_key(ordinal + 1)
            assert start is not None, ordinal
            if result and result[-1][1] == start:
                result[-1] = (result[-1][0], stop)
            else:
                result.append((start, stop))
        return result

    def differing_leaves(self, dump: bytes | memoryview) -> Located:
        """Return our ranges that another side's dump of leaf digests does not show, and the boundaries only it has.

        Raises `FrameError`.
        """
        if len(dump) % 14:
            raise errors.FrameError(f"a dump of leaf digests has 14 bytes a leaf, not {len(dump)} in all")
        mine, theirs = _dumped(self.dump), dict(_dumped(bytes(dump)))
        ordinals = [i for i, (item, part) in enumerate(mine) if theirs.get(item) != part]
        here = {item for item, _ in mine}
        return Located(sorted((item, item) for item in theirs if item not in here), [], self._ranges(ordinals))

    # --- rows of others ----------------------------------------------------------------------------------------------

    @staticmethod
    def sequence_of(state: bytes) -> int:
        """Return the sequence of a state row. Raises `FrameError`."""
        return kernel.decode_state(state)[0]

    @staticmethod
    def merge_rows(older: bytes, newer: bytes) -> bytes:
        """Return rows of both, in key order; of a key in both the newer one. Raises `FrameError` for malformed rows."""
        kernel.check_rows(older)
        kernel.check_rows(newer)
        parts = {key: older[start:end] for key, start, end in _row_bounds(older)}
        parts.update((key, newer[start:end]) for key, start, end in _row_bounds(newer))
        return b"".join(parts[key] for key in sorted(parts))

    # --- rows --------------------------------------------------------------------------------------------------------

    def _find(self, pairs: list[tuple[int, int]], ids: list[int], *, with_rows: bool) -> Iterator[_Found]:
        """Yield the records that we have of ``pairs`` and ``ids``."""
        if pairs:
            leaves = {
                ordinal: leaf for leaf, ordinal in self._tree.find_leaves(list({leaf for leaf, _ in pairs})).items()
            }
            wanted = set(pairs)
            for ordinal, item, key, row in self._tree.records_of(
                self._reader, sorted(leaves), list({item for _, item in pairs}), with_rows
            ):
                if (leaves[ordinal], item) in wanted:
                    yield _Found(leaves[ordinal], item, key, row)
        if ids:
            ordinals = self._tree.leaves_at(self._records().find(ids))
            for _, item, key, row in self._tree.records_of(self._reader, ordinals, ids, with_rows):
                yield _Found(0, item, key, row)

    def rows_of(self, located: Located, since: int | None, *, bytes_max: int) -> Found:
        """Return what is here of the located records, ranges whole, and what changed after ``since`` (None: nothing).

        Of ``located.listed`` the records with those digests. Raises `QuotaExceeded` for more than ``bytes_max``,
        `BelowPurgeMark` when the change log does not answer.
        """
        parts: dict[bytes, bytes] = {}
        seen_pairs, seen_ids = set(), set()
        size = 0
        for found in self._find(located.pairs, located.ids, with_rows=True):
            seen_pairs.add((found.leaf, found.item))
            seen_ids.add(found.item)
            assert found.row is not None, found
            parts[found.key] = found.row
            size += len(found.row)
            if size > bytes_max:
                raise _too_large(bytes_max)
        for start, stop, digests in [*located.listed, *((start, stop, None) for start, stop in located.ranges)]:
            wanted = None if digests is None else set(digests)
            for record in self._tree.records_between(
                self._reader,
                start,
                stop,
                None,
                True,
                bytes_max - size,
            ):
                if wanted is not None and record[3][:6] not in wanted:
                    continue
                assert record[4] is not None, record
                parts[record[2]] = record[4]
                size += len(record[4])
        if since is not None and since < self.sequence:
            parts.update(self._changed_since(since, bytes_max - size))
        return Found(
            b"".join(parts[key] for key in sorted(parts)),
            [pair for pair in located.pairs if pair not in seen_pairs],
            [item for item in located.ids if item not in seen_ids],
        )

    def list_ranges(self, located: Located) -> Located:
        """Return the same with ranges listed instead of shipped whole, unless they are small.

        Raises `QuotaExceeded` for more records than a list may have.
        """
        listed: list[Listed] = []
        size = 0
        for start, stop in located.ranges:
            records = self._tree.records_between(
                self._reader,
                start,
                stop,
                None,
                False,
                limits.EXCHANGE_BYTES_MAX - size,
            )
            size += sum(record[5] for record in records)
            listed.append(Listed(start, stop, [record[3][:6] for record in records]))
        if size <= limits.EXCHANGE_WHOLE_BYTES_MAX:
            return located
        return located._replace(ranges=[], listed=tuple(listed))

    def compare_listed(self, listed: tuple[Listed, ...]) -> tuple[list[bytes], tuple[Listed, ...]]:
        """Return (our keys that are not in the lists, the lists of what is not here).

        Raises `QuotaExceeded` when the ranges hold more than a message could.
        """
        extra: list[bytes] = []
        wanted: list[Listed] = []
        room = limits.EXCHANGE_BYTES_MAX
        for start, stop, digests in listed:
            records = self._tree.records_between(self._reader, start, stop, None, False, room)
            room -= sum(record[5] for record in records)
            here = {record[3][:6]: record[2] for record in records}
            there = set(digests)
            extra += [key for digest, key in here.items() if digest not in there]
            missing = [digest for digest in digests if digest not in here]
            if missing:
                wanted.append(Listed(start, stop, missing))
        return extra, tuple(wanted)

    def _changed_since(self, since: int, bytes_max: int) -> Iterator[tuple[bytes, bytes]]:
        state = self._reader.state_tuple
        floor = max(state[7], state[8])
        if since < floor:
            raise errors.BelowPurgeMark(f"the change log answers from {floor} on, not from {since}", floor=floor)
        rows, _, _, done = self._reader.rows_since(since, max(bytes_max, 1))
        if not done or len(rows) > bytes_max:
            raise _too_large(bytes_max)
        for key, begin, end in _row_bounds(rows):
            yield key, rows[begin:end]

    def contents(self, start: bytes, stop: bytes | None, *, versions: bool) -> dict[bytes, bytes]:
        """Return the records of a range: {key: digest}, or without ``versions`` {key: value} of the live ones."""
        records = self._tree.records_between(self._reader, start, stop, None, not versions)
        if versions:
            return {record[2]: record[3] for record in records}
        rows = kernel.decode_rows(b"".join(record[4] for record in records if record[4] is not None))
        return {key: value for key, value, _, _, flags in rows if not flags & TOMBSTONE}

    def meta(self, *, with_rows: bool) -> bytes:
        """Return the ancestry, and ``with_rows`` all request and session rows, encoded."""
        stored = self._reader.meta()
        rows = [(0, b"ancestry", kernel.check_row(b"ancestry", stored[b"ancestry"]))]
        return encode_meta(rows + (self._reader.meta_rows(0) if with_rows else []))

    def settle(self, rows: bytes | memoryview, absent: Located, extra: list[bytes]) -> Repair:
        """Work out the repair.

        ``rows`` of the authority; ``absent``: what it does not have, and ranges that ``rows`` cover; ``extra``: keys
        here that its lists do not name.

        Raises `FrameError` for malformed rows.
        """
        compared = self._tree.compare_rows(self._reader, rows)
        sent = {key for key, _, _, _ in compared}
        removed = {found.key for found in self._find(absent.pairs, absent.ids, with_rows=False)}
        removed.update(extra)
        room = limits.EXCHANGE_BYTES_MAX
        for start, stop in absent.ranges:
            records = self._tree.records_between(self._reader, start, stop, None, False, room)
            room -= sum(record[5] for record in records)
            removed.update(record[2] for record in records)
        for key in self.damaged:
            if any(start <= key and (stop is None or key < stop) for start, stop in absent.ranges):
                removed.add(key)
        removed -= sent
        view = memoryview(rows)
        kept = b"".join(view[start:end] for _, same, start, end in compared if not same)
        report = sorted({key for key, same, _, _ in compared if not same} | removed)
        return Repair(kept, sorted(removed), report, len(rows) - len(kept))


class _Found(NamedTuple):
    leaf: int
    item: int
    key: bytes
    row: bytes | None


def _too_large(bytes_max: int) -> errors.QuotaExceeded:
    return errors.QuotaExceeded(f"more than {bytes_max} bytes of records differ", limit=bytes_max)


def _row_bounds(rows: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (key, start, end) of rows that the kernel wrote."""
    at = 0
    while at < len(rows):
        versions, key_bytes = rows[at + 1], int.from_bytes(rows[at + 2 : at + 4], "little")
        end = at + 24 + key_bytes + 16 * versions + int.from_bytes(rows[at + 4 : at + 8], "little")
        yield rows[at + 24 : at + 24 + key_bytes], at, end
        at = end


def _dumped(dump: bytes) -> list[tuple[int, bytes]]:
    return [(int.from_bytes(dump[at : at + 6], "little"), dump[at + 6 : at + 14]) for at in range(0, len(dump), 14)]


def differing_keys(here: Tablet, there: Tablet, *, versions: bool) -> list[bytes]:
    """Return the keys whose records differ between two tablets of one seed, in key order: leaves first, then records.

    ``versions``: any difference counts, tombstones included; else only that of live values.
    """
    # NB: always in the same order, or two threads that compare two tablets both ways wait for each other for ever.
    first, second = (here, there) if id(here) < id(there) else (there, here)
    with first.leaves.moment() as one, second.leaves.moment() as two:
        mine, theirs = (one, two) if first is here else (two, one)
        result: list[bytes] = []
        for start, stop in merkle.differing_ranges(here.leaves.tree, there.leaves.tree):
            left, right = mine.contents(start, stop, versions=versions), theirs.contents(start, stop, versions=versions)
            result += sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
        return result
