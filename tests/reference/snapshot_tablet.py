"""A tablet in plain Python with the faces that snapshots use: views, rows, fill. As slow and plain as can be."""

from __future__ import annotations

import copy
import hashlib
import threading
from typing import NamedTuple

from srengine import errors
from srengine.types import Position
from tests.reference.chunk import Row, decode_rows, encode_rows


class Batch(NamedTuple):
    rows: bytes
    count: int
    last: bytes | int | None
    done: bool


def root_of(records: dict[bytes, Row]) -> bytes:
    total = sum(
        int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest()) for row in records.values()
    )
    return (total % 2**128).to_bytes(16, "little")


class View:
    def __init__(self, tablet: PlainTablet) -> None:
        self.tablet = tablet
        self.records = dict(tablet.records)
        self.position = tablet.position
        self.purge_mark = tablet.purge_mark
        self.log_floor = tablet.log_floor
        self.state = repr((tablet.lineage, tablet.sequence, self.position.root, self.position.count)).encode()
        self.calls = 0
        self.is_open = True
        tablet.views += 1

    def _use(self) -> None:
        assert self.is_open
        self.calls += 1
        if self.calls > self.tablet.view_calls_max:
            raise errors.ViewExpired("the view is too old")
        if self.tablet.on_read is not None:
            self.tablet.on_read()

    def rows_by_key(self, after: bytes | None, *, bytes_max: int, buffer: bytearray | None = None) -> Batch:
        batch = self._rows_by_key(after, bytes_max)
        if buffer is None or len(batch.rows) > len(buffer):
            return batch
        buffer[: len(batch.rows)] = batch.rows
        return batch._replace(rows=memoryview(buffer)[: len(batch.rows)])

    def _rows_by_key(self, after: bytes | None, bytes_max: int) -> Batch:
        self._use()
        left = sorted(row for key, row in self.records.items() if after is None or key > after)
        return self._batch(left, bytes_max, lambda row: row.key)

    def rows_since(self, sequence: int, *, bytes_max: int) -> Batch:
        self._use()
        if sequence < max(self.purge_mark, self.log_floor):
            raise errors.BelowPurgeMark(f"the change log starts at {max(self.purge_mark, self.log_floor)}")
        left = sorted((row for row in self.records.values() if row.sequence > sequence), key=lambda row: row.sequence)
        return self._batch(left, bytes_max, lambda row: row.sequence)

    @staticmethod
    def _batch(left, bytes_max, last_of):
        taken = []
        size = 0
        for row in left:
            size += len(encode_rows([row]))
            if taken and size > bytes_max:
                break
            taken.append(row)
        return Batch(encode_rows(taken), len(taken), last_of(taken[-1]) if taken else None, len(taken) == len(left))

    def meta_rows(self, since: int) -> bytes:
        self._use()
        return repr((since, self.purge_mark)).encode()

    def close(self) -> None:
        self.is_open = False
        self.tablet.views -= 1


class PlainTablet:
    """One replica. ``on_read`` is called at each read of a view: a test writes there, so that the scan sees changes."""

    def __init__(self, *, tablet_id: str = "t1", lineage: str = "l1", seed: bytes = b"12345678") -> None:
        self.id = tablet_id
        self.lineage = lineage
        self.seed = seed
        self.sequence = 0
        self.records: dict[bytes, Row] = {}
        self.purge_mark = 0
        self.log_floor = 0
        self.fill_mark: bytes | None = None
        self.views = 0
        self.view_calls_max = 1 << 30
        self.on_read = None
        self.roots = {0: root_of({})}
        self.fills: list[int] = []
        self.fill_threads: set[str] = set()

    @property
    def position(self) -> Position:
        return Position(self.lineage, self.sequence, root_of(self.records), len(self.records))

    def root_at(self, sequence: int) -> bytes | None:
        return self.roots.get(sequence)

    def put(self, key: bytes, value: bytes | None) -> None:
        self.sequence += 1
        self.records[key] = Row(key, value, self.sequence, 7 * self.sequence)
        self.roots[self.sequence] = root_of(self.records)

    def skip(self) -> None:
        """An operation that changes nothing takes a sequence all the same."""
        self.sequence += 1
        self.roots[self.sequence] = root_of(self.records)

    def purge(self, mark: int) -> None:
        self.sequence += 1
        self._purge(mark)
        self.roots[self.sequence] = root_of(self.records)

    def _purge(self, mark: int) -> None:
        self.purge_mark = max(self.purge_mark, mark)
        self.records = {
            key: row for key, row in self.records.items() if row.value is not None or row.sequence > self.purge_mark
        }

    def view(self) -> View:
        return View(self)

    def copy(self) -> PlainTablet:
        other = copy.copy(self)
        other.records, other.roots, other.fills, other.on_read = dict(self.records), dict(self.roots), [], None
        return other

    def _put_rows(self, rows: bytes | bytearray | memoryview) -> None:
        decoded = decode_rows(bytes(rows))
        keys = [row.key for row in decoded]
        if len(set(keys)) != len(keys):
            raise errors.FrameError("a key stands twice in one transaction")
        for row in decoded:
            old = self.records.get(row.key)
            if old is None or old.sequence < row.sequence:
                self.records[row.key] = row

    def fill(self, rows: bytes | bytearray | memoryview, mark: bytes) -> None:
        self._put_rows(rows)
        self.fill_mark = bytes(mark)
        self.fills.append(len(rows))
        self.fill_threads.add(threading.current_thread().name)

    ancestry = ()

    def adopt_seed(self, seed: bytes) -> None:
        self.seed = seed

    def mark_adopted(self) -> None:
        self.adopted = True

    def promised(self, meta: bytes, state: bytes) -> Position:
        try:
            eval(meta)
            return Position(*eval(state))
        except SyntaxError as error:
            raise errors.FrameError("no repr of ours") from error

    def finish_fill(self, meta: bytes, state: bytes, *, rows: bytes | bytearray | memoryview = b"") -> Position:
        before = dict(self.records)
        lineage, sequence, root, count = eval(state)
        _, mark = eval(meta)
        self._put_rows(rows)
        self._purge(mark)
        if (root_of(self.records), len(self.records)) != (root, count):
            self.records = before
            raise errors.SnapshotDamaged("root and count are not the promised ones")
        self.lineage, self.sequence, self.fill_mark = lineage, sequence, None
        self.roots = {sequence: root}
        return self.position


class PlainStore:
    """Stages beside real tablets, in memory."""

    def __init__(self) -> None:
        self.tablets: dict[str, PlainTablet] = {}
        self.stages: dict[str, PlainTablet] = {}

    def find_stage(self, tablet_id: str) -> PlainTablet | None:
        return self.stages.get(tablet_id)

    def stage_tablet(self, tablet_id: str, *, seed: bytes) -> PlainTablet:
        return self.stages.setdefault(tablet_id, PlainTablet(tablet_id=tablet_id, lineage="none", seed=seed))

    def drop_stage(self, tablet_id: str) -> None:
        self.stages.pop(tablet_id, None)

    def switch_tablet(self, staged: PlainTablet) -> PlainTablet:
        assert staged.fill_mark is None
        self.tablets[staged.id] = self.stages.pop(staged.id)
        return staged
