"""A tablet: records, their change log, root and count; the unit of storage and of replication.

A tablet is a deterministic state machine. Entries go in, each operation has its sequence, records change, and at the
end of every entry the **root** (the sum modulo 2^128 of the digests of all records) says what the tablet holds. A
**position** is (lineage, sequence, root, count): equal lineage and sequence mean equal root, anything else is damage.

    application    get put delete scan view          one process, no network
    log            apply([Batch, ...])               a leader, or whoever feeds the log
    replica        delta_since / apply_delta         what changed since S, proved by the root at its end
    copy           fill / finish_fill                rows of a snapshot, half applied until the last proves the root

Invariants that callers rely on:

* What a call returned is durable; what raised did not happen (except `TimedOut` above this room).
* Every read verifies the record's checks; damage is `CorruptionError` with tablet and key, never wrong data.
* A tablet with a fill mark is half applied: it serves nothing but the copy that goes on.
* The first own write to a copy mints a child lineage, so that two histories never share a name.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from srengine import errors, limits
from srengine._native import tablet as kernel
from srengine.storage.entries import (
    APPLIED,
    CONDITION_FAILED,
    KIND_OPEN_SESSION,
    KIND_PURGE,
    Batch,
    Delta,
    Outcome,
    check_rows,
    condition,
    conflict,
    decode_outcome,
)
from srengine.storage.merkle import Leaves, differing_keys
from srengine.storage.report import DAMAGES_MAX, Damage, VerifyReport
from srengine.storage.view import View, decode_meta, record_of
from srengine.types import Actual, Position, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FORMAT: Final = 1
_MAP_BYTES_MIN: Final = limits.GIB
_NO_FLOOR: Final = 2**64 - 1
_ANCESTOR = struct.Struct("<16sQ")


class SnapshotService(Protocol):
    """What `Tablet.write_snapshot` and `Tablet.apply_snapshot` need of the snapshot room, which lies above this one."""

    def write(self, tablet: Tablet, path: str | os.PathLike[str], since: Position | None) -> Position:
        """Write a file."""

    def apply(self, tablet: Tablet, path: str | os.PathLike[str]) -> Position:
        """Prove a file and apply it."""


_snapshots: list[SnapshotService] = []


def use_snapshots(service: SnapshotService) -> None:
    """Say who writes and applies snapshot files. The snapshot room calls it when it is imported."""
    _snapshots[:] = [service]


class Tablet:
    """One open tablet; thread-safe. Made by `Store`, closed with it.

    ``id`` 32 hexadecimal digits, ``name`` what the user calls it (the id, in a node), ``path`` its directory,
    ``read_only`` whether writes are refused.
    """

    def __init__(
        self, environment: kernel.Environment, path: Path, tablet_id: str, name: str, *, read_only: bool
    ) -> None:
        self.id = tablet_id
        self.name = name
        self.path = path
        self.read_only = read_only
        self._environment = environment
        self._mint_lock = threading.Lock()
        self._leaves: Leaves | None = None
        self._ancestry: list[tuple[str, int]] = []
        self._reload()

    # --- opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        tablet_id: str,
        *,
        lineage: str | None = None,
        seed: bytes | None = None,
        name: str | None = None,
        map_bytes: int | None = None,
        view_age_s_max: float = 30.0,
    ) -> Tablet:
        """Make an empty tablet in an existing empty directory and return it open.

        ``lineage`` and ``seed`` (8 bytes) are minted unless given. Raises `InvalidValue`, `DiskFull`.
        """
        lineage = secrets.token_hex(16) if lineage is None else lineage
        seed = secrets.token_bytes(8) if seed is None else seed
        if len(seed) != 8:
            raise errors.InvalidValue(f"a seed has 8 bytes, not {len(seed)}")
        meta = {
            b"format": struct.pack("<I", FORMAT),
            b"tablet": bytes.fromhex(tablet_id),
            b"seed": seed,
            b"ancestry": _ANCESTOR.pack(_lineage_bytes(lineage), 1),
        }
        environment = kernel.Environment(
            os.fsencode(path),
            map_bytes=map_bytes or _MAP_BYTES_MIN,
            view_ms_max=int(view_age_s_max * 1000),
            create=True,
            meta=meta,
        )
        return cls(environment, path, tablet_id, name or tablet_id, read_only=False)

    @classmethod
    def open(
        cls,
        path: Path,
        tablet_id: str,
        *,
        name: str | None = None,
        map_bytes: int | None = None,
        view_age_s_max: float = 30.0,
        read_only: bool = False,
    ) -> Tablet:
        """Open a tablet. The caller has looked at the file first (`pages.check_before_open`) and at its fence.

        Raises `ForeignData` (no tablet, or another one), `CorruptionError`, `UnsupportedFeature` (a newer format).
        """
        size = (path / "data.mdb").stat().st_size
        environment = kernel.Environment(
            os.fsencode(path),
            map_bytes=max(map_bytes or max(_MAP_BYTES_MIN, 4 * size), size),
            view_ms_max=int(view_age_s_max * 1000),
        )
        try:
            cls._check_identity(environment, path, tablet_id)
            return cls(environment, path, tablet_id, name or tablet_id, read_only=read_only)
        except BaseException:
            environment.close()
            raise

    @staticmethod
    def _check_identity(environment: kernel.Environment, path: Path, tablet_id: str) -> None:
        found = environment.get_meta(b"tablet")
        if found != bytes.fromhex(tablet_id):
            shown = "nothing" if found is None else found.hex()
            raise errors.ForeignData(f"{path} holds tablet {shown}, not {tablet_id}", path=str(path), tablet=tablet_id)
        if environment.get_meta(b"format") != struct.pack("<I", FORMAT):
            raise errors.UnsupportedFeature(
                f"{path} has a format that this version does not know; it knows {FORMAT}", path=str(path)
            )

    def _reload(self) -> None:
        image = self._environment.get_meta(b"ancestry")
        if image is None or not image or len(image) % _ANCESTOR.size:
            raise errors.CorruptionError(f"tablet {self.id} has no ancestry", tablet=self.id)
        self._ancestry = [(raw.hex(), since) for raw, since in _ANCESTOR.iter_unpack(image)]
        self._fill_mark = self._environment.get_meta(b"fill")
        self._adopted = self._environment.get_meta(b"adopted") is not None

    def close(self) -> None:
        """Close the tablet; its views expire. May be called twice."""
        self._environment.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._environment.closed

    def __repr__(self) -> str:
        return f"<Tablet {self.name}{' closed' if self.closed else ''}>"

    # --- where it stands ---------------------------------------------------------------------------------------------

    @property
    def lineage(self) -> str:
        """The id of the tablet's history, 32 hexadecimal digits."""
        return self._ancestry[-1][0]

    @property
    def ancestry(self) -> list[tuple[str, int]]:
        """(lineage, first sequence of it), oldest first."""
        return list(self._ancestry)

    @property
    def seed(self) -> bytes:
        """The tablet's secret: what makes its digests its own. Never logged, never in a backup."""
        seed = self._environment.get_meta(b"seed")
        assert seed is not None, "a tablet without a seed does not open"
        return seed

    @property
    def position(self) -> Position:
        """Where the tablet stands, durably."""
        sequence, root, count, *_ = self._environment.state_tuple
        return Position(self.lineage, sequence, root, count)

    @property
    def root(self) -> bytes:
        """16 bytes: the sum of the digests of all records."""
        return self._environment.state_tuple[1]

    @property
    def sequence(self) -> int:
        """The last sequence."""
        return self._environment.state_tuple[0]

    @property
    def count(self) -> int:
        """Records, tombstones included."""
        return self._environment.state_tuple[2]

    @property
    def live_count(self) -> int:
        """Records that are no tombstones."""
        return self._environment.state_tuple[3]

    def __len__(self) -> int:
        return self.live_count

    @property
    def purge_mark(self) -> int:
        """The sequence up to which tombstones were removed."""
        return self._environment.state_tuple[7]

    @property
    def log_floor(self) -> int:
        """The sequence from which the change log is complete."""
        return self._environment.state_tuple[8]

    @property
    def dead_changes(self) -> int:
        """Change entries that no record points back to, not yet dropped."""
        return self._environment.state_tuple[9]

    @property
    def hybrid_clock(self) -> int:
        """The clock of the last entry: milliseconds since 1970 times 65 536 plus a counter."""
        return self._environment.state_tuple[6]

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the open: commits, grown, expired; and map_bytes, pinned, disk_full, fenced as they are now."""
        return self._environment.counters

    @property
    def file_bytes(self) -> int:
        """Bytes of the file's pages in use, free ones inside included."""
        return self._environment.file_bytes()

    def root_at(self, sequence: int) -> bytes | None:
        """Return the root at the end of the entry that ended at ``sequence``, or None when it is not kept."""
        return self._environment.root_at(sequence)

    @property
    def boot_number(self) -> int:
        """The number of the node's start that last wrote it down here; 0 in embedded use."""
        image = self._environment.get_meta(b"boot")
        return 0 if image is None else int(struct.unpack("<Q", image)[0])

    def set_boot_number(self, number: int) -> None:
        """Write the number of this start down, durably."""
        self._environment.put_meta({b"boot": struct.pack("<Q", number)})

    # --- reading -----------------------------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        if self._fill_mark is not None:
            raise errors.NotReady(f"tablet {self.name} is half copied; let the copy go on", tablet=self.id)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None. Raises `CorruptionError`, `InvalidValue`, `TabletFenced`."""
        if self._fill_mark is not None:
            self._check_whole()
        return self._environment.get(key)

    def get_many(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """Return the values of keys from one point in time, None for absent ones."""
        self._check_whole()
        return self._environment.get_many(keys)

    def get_record(self, key: bytes, *, tombstones: bool = False) -> Record | None:
        """Return the record of ``key``, or None; with ``tombstones`` also one that says "deleted"."""
        self._check_whole()
        return record_of(key, self._environment.get_record(key), tombstones=tombstones)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def view(self, max_age_s: float | None = None) -> View:
        """Return a pinned point-in-time reader, of the store's maximum age unless ``max_age_s`` is smaller."""
        self._check_whole()
        return self._view(max_age_s)

    def _view(self, max_age_s: float | None = None) -> View:
        return View(self, self._environment.reader(None if max_age_s is None else max(0, int(max_age_s * 1000))))

    def scan(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of keys in [start, stop) with ``prefix``, in key order, from one point in time.

        The iterator pins a view: one left unfinished past the maximum age raises `ViewExpired`.
        """
        with self.view() as view:
            yield from view.scan(start=start, stop=stop, prefix=prefix, reverse=reverse, limit=limit)

    def diff(self, other: Tablet) -> list[bytes]:
        """Return the keys whose records differ between two tablets, in key order.

        With one seed, equal roots and counts answer at once, and otherwise leaves are compared and only the records of
        those that differ; with different seeds both are scanned. Records of one lineage differ when their versions or
        values do, others when their values do.
        """
        if self is other:
            return []
        with self.view() as here, other.view() as there:
            same_history = here.position.lineage == there.position.lineage
            if self.seed == other.seed:
                if here.position[2:] == there.position[2:]:
                    return []
                return differing_keys(self, other, versions=same_history)
            return list(
                _differing(
                    here.records(tombstones=same_history), there.records(tombstones=same_history), versions=same_history
                )
            )

    # --- exchange ----------------------------------------------------------------------------------------------------

    @property
    def leaves(self) -> Leaves:
        """The tablet's leaves: a cache that is built when first used. See `srengine.storage.merkle`."""
        if self._leaves is None:
            with self._mint_lock:
                if self._leaves is None:
                    self._leaves = Leaves(self._environment)
        return self._leaves

    def stands_at(self, where: bytes) -> bool:
        """Whether root, count and sequence are ``where`` (32 bytes, docs/formats-exchange.md). Raises `FrameError`."""
        return self._environment.stands_at(where)

    def repair(
        self,
        rows: bytes | memoryview,
        removed: Sequence[bytes],
        meta: bytes | memoryview,
        state: bytes | memoryview,
        *,
        replace_rows: bool,
        base: tuple[int, bytes],
        actual: Actual | None = None,
    ) -> Position:
        """Become equal to an authority in one transaction that must reach its root and count; return the new position.

        ``rows`` replace what stands under their keys, whatever its version; ``removed`` keys go without a tombstone.
        ``meta``: its ancestry, and with ``replace_rows`` its request and session rows. ``state``: its state row.
        ``base``: the sequence and root at which this tablet stood when the repair was worked out. ``actual``: what its
        records add up to, if that is not what its state row carries (damage); the sums start from there.

        Raises `Diverged` when the tablet has moved on or the root would not be reached, `FrameError`; then nothing
        changed.
        """
        self._check_whole()
        if self.read_only:
            raise errors.Denied(f"tablet {self.name} is open for reading only", tablet=self.id)
        decoded = decode_meta(meta)
        for database, name, value in decoded:
            if database == 0 and (name != b"ancestry" or not value or len(value) % _ANCESTOR.size):
                raise errors.FrameError(f"meta row {name!r} has no place in a repair")
            if database != 0 and not replace_rows:
                raise errors.FrameError("request and session rows come whole or not at all")
        self._environment.repair(rows, list(removed), decoded, replace_rows, base, bytes(state), actual)
        self._reload()
        return self.position

    # --- writing -----------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self.read_only:
            raise errors.Denied(f"tablet {self.name} is open for reading only", tablet=self.id)
        self._check_whole()
        if self._adopted:
            self._mint_child()

    def _mint_child(self) -> None:
        with self._mint_lock:
            if self._adopted:
                child = (secrets.token_hex(16), self.sequence + 1)
                self._environment.put_meta({b"ancestry": _encode_ancestry([*self._ancestry, child]), b"adopted": None})
                self._ancestry.append(child)
                self._adopted = False

    def put(self, key: bytes, value: bytes, *, if_absent: bool = False, if_version: int | None = None) -> int:
        """Write one record durably; return its version. Concurrent writers share a transaction.

        Raises `Conflict` (``current_version``) when the condition does not hold, `InvalidValue`, `DiskFull`,
        `TabletFenced`.
        """
        self._check_writable()
        result, version, current = self._environment.put(
            key, value, *condition(if_absent=if_absent, if_version=if_version)
        )
        if result == CONDITION_FAILED:
            raise conflict(key, current)
        return version

    def delete(self, key: bytes, *, if_version: int | None = None) -> bool:
        """Delete one record durably; return whether there was one. Raises as `put`."""
        self._check_writable()
        result, _, current = self._environment.delete(key, *condition(if_version=if_version))
        if result == CONDITION_FAILED:
            raise conflict(key, current)
        return result == APPLIED

    def put_many(self, pairs: Iterable[tuple[bytes, bytes]]) -> int:
        """Write pairs in one transaction, all or nothing; return the last sequence. A later pair of one key wins."""
        self._check_writable()
        return self._environment.put_many(pairs)

    def delete_many(self, keys: Iterable[bytes]) -> int:
        """Delete keys in one transaction, all or nothing; return how many records there were."""
        self._check_writable()
        return self._environment.delete_many(keys)

    def apply(self, batches: Sequence[Batch]) -> list[Outcome]:
        """Apply entries in order, in one transaction and one fsync, all or nothing.

        Raises `FrameError` (malformed operations), `DiskFull`, `TabletFenced`, `CorruptionError`; then nothing of any
        of them happened.
        """
        self._check_writable()
        raw = self._environment.apply(
            [(batch.kind, batch.operations, batch.session, batch.number, batch.argument) for batch in batches]
        )
        return [decode_outcome(*fields) for fields in raw]

    def open_session(self, session: bytes) -> Outcome:
        """Open a session (16 bytes) for request ids."""
        return self.apply([Batch(b"", session, 0, KIND_OPEN_SESSION)])[0]

    def purge(self, up_to: int) -> Outcome:
        """Remove tombstones up to a sequence that every replica has; deltas from before it are refused afterwards.

        Raises `InvalidValue` if the tablet is not there yet.
        """
        if up_to > self.sequence:
            raise errors.InvalidValue(f"the tablet stands at {self.sequence}, before {up_to}")
        return self.apply([Batch(b"", b"", 0, KIND_PURGE, up_to)])[0]

    # --- replica -----------------------------------------------------------------------------------------------------

    def delta_since(self, sequence: int, *, bytes_max: int) -> Delta | None:
        """Return all that changed after ``sequence`` in one view; None when that is more than ``bytes_max`` of rows.

        Raises `BelowPurgeMark` when the change log does not go back that far, `InvalidValue` for a sequence ahead.
        """
        self._check_whole()
        with self._view() as view:
            if sequence > view.position.sequence:
                raise errors.InvalidValue(
                    f"the tablet stands at {view.position.sequence}, before {sequence}", sequence=view.position.sequence
                )
            batch = view.rows_since(sequence, bytes_max=bytes_max)
            if not batch.done or len(batch.rows) > bytes_max:
                return None
            meta = view.meta_rows(sequence) if sequence else view.meta_rows(0)
            return Delta(sequence, self.root_at(sequence), bytes(batch.rows), meta, view.state, view.position)

    def apply_delta(self, delta: Delta) -> Position:
        """Apply a delta in one transaction and prove root and count at its end; return the new position.

        Raises `Diverged` when the tablet does not stand at the base or would not reach the root, `FrameError` for
        malformed bytes; then nothing changed.
        """
        self._check_whole()
        if self.read_only:
            raise errors.Denied(f"tablet {self.name} is open for reading only", tablet=self.id)
        sequence, root, count, *_ = kernel.decode_state(bytes(delta.state))
        if delta.position != (self.lineage, sequence, root, count):
            raise errors.Diverged(
                f"the delta ends at {delta.position.lineage}:{delta.position.sequence}, the tablet is of lineage "
                f"{self.lineage}",
                tablet=self.id,
                lineage=self.lineage,
            )
        check_rows(delta.rows, sorted_by=2)
        meta = [row for row in decode_meta(delta.meta) if row[0] != 0]
        self._environment.apply_rows(
            delta.rows,
            meta,
            True,
            (delta.base_sequence, delta.base_root),
            bytes(delta.state),
        )
        return self.position

    # --- copies ------------------------------------------------------------------------------------------------------

    @property
    def fill_mark(self) -> bytes | None:
        """What the snapshot room wrote down of a half-applied copy, or None: the tablet is whole."""
        return self._fill_mark

    def adopt_seed(self, seed: bytes) -> None:
        """Take over the seed of the tablet that this empty one becomes a copy of. Raises `Conflict` unless empty."""
        self._environment.adopt_seed(seed)

    def mark_adopted(self) -> None:
        """Write down that this copy lives outside its group: its first own write begins a child lineage."""
        self._environment.put_meta({b"adopted": b"\x01"})
        self._adopted = True

    def _fills_whole(self) -> bool:
        """Whether the copy is a full one: begun on an empty tablet, without change entries but for tombstones."""
        state = self._environment.state_tuple
        return state[8] == _NO_FLOOR or (state[0] == 0 and state[2] == 0)

    def fill(self, rows: bytes | bytearray | memoryview, mark: bytes) -> None:
        """Put rows of a copy and the mark that says how far it is, in one transaction.

        A row older than the record that stands is passed over. From the first call on the tablet is half applied.
        Raises `FrameError`, `DiskFull`, `TabletFenced`.
        """
        self._environment.apply_rows(rows, [(0, b"fill", mark)], not self._fills_whole(), None, None)
        self._fill_mark = mark

    def finish_fill(
        self, meta: bytes | memoryview, state: bytes | memoryview, *, rows: bytes | bytearray | memoryview = b""
    ) -> Position:
        """Put the last rows and the source's meta rows, purge to its mark, compare root and count, drop the mark.

        One transaction. On a mismatch `SnapshotDamaged`: nothing of the call happened, the mark stays.
        """
        decoded = decode_meta(meta)
        whole = self._fills_whole()
        if not whole:
            decoded = [row for row in decoded if row[0] != 0]
        try:
            self._environment.apply_rows(rows, [*decoded, (0, b"fill", None)], not whole, None, bytes(state))
        except errors.Diverged as error:
            raise errors.SnapshotDamaged(
                f"the copy of tablet {self.id} is not what its source proved", tablet=self.id
            ) from error
        self._reload()
        return self.position

    def promised(self, meta: bytes | memoryview, state: bytes | memoryview) -> Position:
        """Return the position that `finish_fill` would prove; nothing is written. Raises `FrameError`."""
        lineage = self.lineage
        if self._fills_whole():
            image = next(
                (value for database, name, value in decode_meta(meta) if (database, name) == (0, b"ancestry")), b""
            )
            if not image or len(image) % _ANCESTOR.size:
                raise errors.FrameError("the rows of a full copy name no lineage")
            lineage = [raw.hex() for raw, _ in _ANCESTOR.iter_unpack(image)][-1]
        sequence, root, count, *_ = kernel.decode_state(bytes(state))
        return Position(lineage, sequence, root, count)

    # --- files and checks --------------------------------------------------------------------------------------------

    def write_snapshot(self, path: str | os.PathLike[str], since: Position | None = None) -> Position:
        """Write a snapshot file: full, or a delta since a position of this lineage; return the position it ends at.

        An unfinished file of the same snapshot is gone on with. Raises `BelowPurgeMark`, `Diverged`, `DiskFull`.
        """
        self._check_whole()
        return _service().write(self, path, since)

    def apply_snapshot(self, path: str | os.PathLike[str]) -> Position:
        """Prove a snapshot file whole, then apply it; return the position reached.

        A full one needs an empty tablet, which becomes a copy with the lineage and the sequences of the source; a
        delta needs its base. A damaged file is `SnapshotDamaged` and nothing changed. After a crash in the middle the
        tablet is `NotReady` until the same file is applied again.
        """
        if self.read_only:
            raise errors.Denied(f"tablet {self.name} is open for reading only", tablet=self.id)
        return _service().apply(self, path)

    def verify(self) -> VerifyReport:
        """Check every record, the root and the counts against the records, and the change log both ways."""
        with self._view(3600.0) as view:
            records, damages = view._reader.verify(DAMAGES_MAX)
        report = VerifyReport(tablets=1, records=records, bytes=self.file_bytes)
        for what, key in damages:
            kind = "record" if what == "record" else "change" if "change" in what else what.split(":", 1)[0]
            report.add(Damage(kind, f"tablets/{self.id}/data.mdb", what, tablet=self.id, key=key))
        return report


def _service() -> SnapshotService:
    if not _snapshots:
        raise errors.Error("snapshots are not available: import srengine.snapshot first")
    return _snapshots[0]


def _lineage_bytes(lineage: str) -> bytes:
    try:
        raw = bytes.fromhex(lineage)
    except ValueError as error:
        raise errors.InvalidValue(f"lineage {lineage!r} is not 32 hexadecimal digits") from error
    if len(raw) != 16:
        raise errors.InvalidValue(f"lineage {lineage!r} is not 32 hexadecimal digits")
    return raw


def _encode_ancestry(ancestry: list[tuple[str, int]]) -> bytes:
    return b"".join(_ANCESTOR.pack(bytes.fromhex(lineage), since) for lineage, since in ancestry)


def _differing(here: Iterator[Record], there: Iterator[Record], *, versions: bool) -> Iterator[bytes]:
    """Merge two sequences of records in key order and yield the keys that differ."""
    one, other = next(here, None), next(there, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one.key < other.key):
            assert one is not None
            yield one.key
            one = next(here, None)
        elif one is None or other.key < one.key:
            yield other.key
            other = next(there, None)
        else:
            if (
                one.value != other.value
                or one.tombstone != other.tombstone
                or (versions and one.version != other.version)
            ):
                yield one.key
            one, other = next(here, None), next(there, None)
