"""Check an open tablet while it works, a bounded piece at a time, and put right what a sound row can put right.

    check_slice   the checksums of the next records in key order, and the change entry of each
    prove         root and counts, from all records in one view
    sound_rows    rows of some keys, as another copy may need them
    remove_unreadable  records that nobody wrote and nobody can read
    heal          put rows whose digests are those that stand here: damage goes, root and position stay

What an offline check (`srengine.storage.verify`) does beyond this: it counts dead change entries and walks pages that
nothing reaches any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors, limits
from srengine._native import tablet as kernel
from srengine.storage.view import TOMBSTONE, View
from srengine.types import Position

if TYPE_CHECKING:
    from srengine.storage.tablet import Tablet

_ROW_HEADER: Final = 24
_ROW_SEQUENCE: Final = 8
_PAGE_RECORDS: Final = 512
_PAGE_BYTES: Final = limits.MIB
RECORD: Final = "record"
CHANGE: Final = "change"


class Proof(NamedTuple):
    """What the records add up to at ``position``; ``reason`` says what does not fit, empty when ``whole``."""

    position: Position
    whole: bool
    reason: str


@dataclass(slots=True)
class CheckedSlice:
    """What one piece of a walk found.

    ``after``: where the next piece begins; ``size``: bytes of its rows; ``damages``: (`RECORD` or `CHANGE`, key) in key
    order.
    """

    after: bytes | None
    done: bool = False
    records: int = 0
    size: int = 0
    damages: list[tuple[str, bytes]] = field(default_factory=list)


def check_slice(tablet: Tablet, after: bytes | None, *, bytes_max: int) -> CheckedSlice:
    """Check the records behind ``after`` (None: from the first), at least one, about ``bytes_max`` of them. Blocks.

    A damaged record ends the slice. Raises `CorruptionError` without a key when a page cannot be read.
    """
    result = CheckedSlice(after)
    with tablet.view() as view:
        try:
            batch = view.rows_by_key(after, bytes_max=bytes_max)
        except errors.CorruptionError as error:
            key = damaged_key(error)
            if key is None or (after is not None and key <= after):
                raise
            _check_before(view, result, key)
            result.after = key
            result.records += 1
            result.damages.append((RECORD, key))
            return result
        for key, _, sequence, _, flags in kernel.decode_rows(batch.rows):
            _check_entry(view, result, key, sequence, tombstone=bool(flags & TOMBSTONE))
        if batch.last is not None:
            assert isinstance(batch.last, bytes), batch.last
            result.after = batch.last
        result.size, result.done = len(batch.rows), batch.done
    return result


def _check_before(view: View, result: CheckedSlice, stop: bytes) -> None:
    """Check what lies between ``result.after`` and a damaged record."""
    start, skip, done = result.after, result.after is not None, False
    while not done:
        page, done = view._reader.page(start, stop, skip, False, _PAGE_RECORDS, _PAGE_BYTES, True, True)
        for key, _, sequence, _, flags in page:
            _check_entry(view, result, key, sequence, tombstone=bool(flags & TOMBSTONE))
            start, skip = key, True


def _check_entry(view: View, result: CheckedSlice, key: bytes, sequence: int, *, tombstone: bool) -> None:
    result.records += 1
    if (sequence > view.log_floor or tombstone) and not _has_change_entry(view, sequence, key):
        result.damages.append((CHANGE, key))


def _has_change_entry(view: View, sequence: int, key: bytes) -> bool:
    try:
        rows, *_ = view._reader.rows_since(sequence - 1, 1)
    except errors.CorruptionError:
        # The row that follows is the damaged one; it has its own turn.
        return True
    found = int.from_bytes(rows[_ROW_SEQUENCE : _ROW_SEQUENCE + 8], "little")
    return found == sequence and rows[_ROW_HEADER : _ROW_HEADER + len(key)] == key


def prove(tablet: Tablet) -> Proof:
    """Add all records up in one view and compare with root and counts that the tablet carries. Blocks.

    The leaves of an exchange are built anew on the way; ``tablet.leaves.drop()`` frees them. Raises `CorruptionError`
    when a page cannot be read.
    """
    with tablet.leaves.moment(recount=True) as moment:
        position = Position(tablet.lineage, moment.sequence, moment.root, moment.count)
        actual, damaged = moment.actual, moment.damaged
    if damaged:
        return Proof(position, False, f"{len(damaged)} records cannot be read, the first is {damaged[0][:40]!r}")
    if actual.count != position.count:
        return Proof(position, False, f"{actual.count} records are there, {position.count} should be")
    if actual.root != position.root:
        return Proof(position, False, f"the records add up to {actual.root.hex()}, the root is {position.root.hex()}")
    return Proof(position, True, "")


def remove_unreadable(tablet: Tablet) -> int:
    """Take away records whose headers cannot be read while all others give the root; return how many. Blocks.

    They are surplus: nobody ever wrote them. Raises `Diverged` when the tablet moved on or the others do not give the
    root; then nothing changed.
    """
    removed = 0
    while True:
        with tablet.leaves.moment(recount=True) as moment:
            keys, actual, state = list(moment.damaged), moment.actual, moment.state
            base = (moment.sequence, moment.root)
        if not keys:
            return removed
        tablet.repair(b"", keys, b"", state, replace_rows=False, base=base, actual=actual)
        removed += len(keys)


def damaged_key(error: errors.CorruptionError) -> bytes | None:
    """Return the key of the record that is damaged, None when it is something else (a page, a row of meta)."""
    if "MDB_" in str(error.details.get("what", "")):
        # The key is what was looked for when a page could not be read.
        return None
    shown = error.details.get("key")
    return bytes.fromhex(shown) if isinstance(shown, str) and shown else None


def unreadable(error: errors.Error) -> bool:
    """Return whether an error of a read says that the file itself is damaged: a page, or the medium."""
    if isinstance(error, errors.CorruptionError):
        return damaged_key(error) is None
    # LMDB's own codes have no class of their own: it gives a transaction up after a page that it could not read.
    return isinstance(error, errors.TabletFenced) or (type(error) is errors.Error and "errno" in error.details)


def sound_rows(tablet: Tablet, keys: Sequence[bytes], *, bytes_max: int) -> tuple[bytes, int]:
    """Return (rows, how many) of those keys that stand here and are sound, in key order. Blocks.

    At least one, then no more than ``bytes_max`` of them.
    """
    parts: list[bytes] = []
    size = 0
    tree = tablet.leaves.tree
    with tablet.view() as view:
        for key in sorted(set(keys)):
            try:
                records = tree.records_between(view._reader, key, key + b"\x00", None, True)
            except errors.CorruptionError as error:
                if damaged_key(error) is None:
                    raise
                continue
            found = b"".join(record[4] for record in records if record[4] is not None)
            size += len(found)
            if parts and size > bytes_max:
                break
            if found:
                parts.append(found)
    return b"".join(parts), len(parts)


def heal(tablet: Tablet, rows: bytes, *, recount: bool = False) -> list[bytes]:
    """Put rows over records whose headers say the same and return their keys; the rest is left alone. Blocks.

    For values that rotted under a sound header, and for records without their change entry: neither root nor position
    changes, which the transaction proves. ``recount``: the change log's counts are not right either. Raises `Diverged`
    when the tablet moved on meanwhile, `FrameError` for malformed rows; then nothing changed.
    """
    with tablet.view() as view:
        position, state = view.position, view.state
        compared = tablet.leaves.tree.compare_rows(view._reader, rows)
    same = [(key, rows[start:end]) for key, equal, start, end in compared if equal]
    actual = None
    if same and recount:
        with tablet.leaves.moment(recount=True) as moment:
            actual = moment.actual
    if same:
        tablet.repair(
            b"".join(row for _, row in same),
            [],
            b"",
            state,
            replace_rows=False,
            base=(position.sequence, position.root),
            actual=actual,
        )
    return [key for key, _ in same]
