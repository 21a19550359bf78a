"""Entries: what goes into a tablet's log, what came of it, and what a replica gets in their place.

A batch is one entry: operations as bytes, applied whole. A delta is the run of changes after a position, proved by the
root at its end. The bytes are those of docs/formats.md.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors
from srengine._native.tablet import check_operations, check_rows
from srengine._native.tablet import encode_operations as _encode
from srengine.types import Position

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Batch",
    "Delta",
    "Operation",
    "Outcome",
    "check_operations",
    "check_rows",
    "encode_deletes",
    "encode_operations",
    "encode_puts",
]

PUT: Final = 0
DELETE: Final = 1
CONDITION_NONE: Final = 0
IF_ABSENT: Final = 1
IF_VERSION: Final = 2
IF_PRESENT: Final = 3
APPLIED: Final = 0
CONDITION_FAILED: Final = 1
NOTHING_TO_DO: Final = 2
KIND_BATCH: Final = 1
KIND_OPEN_SESSION: Final = 2
KIND_PURGE: Final = 3
_DUPLICATE: Final = 1
_REFUSED: Final = 2
_ANSWER = struct.Struct("<16sQQBI")

Operation = tuple[int, bytes, bytes | None, int, int]
"""(kind PUT or DELETE, key, value, condition, expected version)"""


def encode_operations(operations: Iterable[Operation]) -> bytes:
    """Encode operations for `Batch`. Raises `InvalidValue`, `TypeError` for keys and values out of bounds."""
    return _encode(operations)


def encode_puts(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encode unconditional puts."""
    return _encode([(PUT, key, value, CONDITION_NONE, 0) for key, value in pairs])


def encode_deletes(keys: Iterable[bytes]) -> bytes:
    """Encode unconditional deletes."""
    return _encode([(DELETE, key, None, CONDITION_NONE, 0) for key in keys])


class Batch(NamedTuple):
    """One entry: operations as bytes, applied whole; its request id, if it has one.

    ``session`` is 16 bytes and ``number`` rises from 1 in it; a repeated (session, number) gets the kept answer and
    changes nothing. ``kind`` KIND_OPEN_SESSION opens the session; KIND_PURGE removes tombstones up to ``argument``.
    """

    operations: bytes
    session: bytes = b""
    number: int = 0
    kind: int = KIND_BATCH
    argument: int = 0


class Outcome(NamedTuple):
    """What came of a batch.

    ``results``: one byte an operation (APPLIED, CONDITION_FAILED, NOTHING_TO_DO). Operation i has the version
    ``first_sequence`` + i. ``entry_end`` is the sequence at the entry's end and ``root`` the root there; an answer may
    be given once that sequence is safe. A ``duplicate`` was not executed again: results and sequences are those of the
    first time. A ``refused`` one is older than the kept window, or its session unknown: not executed.
    """

    first_sequence: int
    last_sequence: int
    entry_end: int
    root: bytes
    results: bytes
    duplicate: bool = False
    refused: bool = False


class Delta(NamedTuple):
    """All that changed after a position, ending at a position of the source; bytes ready for the wire.

    ``rows``: records in sequence order; ``meta``: request and session rows; ``state``: the source's state row, whose
    root and count the receiver must reach. ``base_root`` is None when the source no longer has it in its ring.
    """

    base_sequence: int
    base_root: bytes | None
    rows: bytes
    meta: bytes
    state: bytes
    position: Position


def condition(*, if_absent: bool = False, if_version: int | None = None) -> tuple[int, int]:
    """Return (condition, expected version) of a conditional operation. Raises `InvalidValue`."""
    if if_absent and if_version is not None:
        raise errors.InvalidValue("if_absent and if_version exclude each other")
    if if_absent:
        return IF_ABSENT, 0
    if if_version is not None:
        if not isinstance(if_version, int) or not 0 <= if_version < 2**64:
            raise errors.InvalidValue(f"if_version is {if_version!r}, which is no version")
        return IF_VERSION, if_version
    return CONDITION_NONE, 0


def conflict(key: bytes, current: int) -> errors.Conflict:
    """Return the error of a condition that did not hold; ``current`` is the version that stood, 0 for none."""
    state = f"has version {current}" if current else "is absent"
    return errors.Conflict(
        f"the condition does not hold: key {key!r} {state}", key=key, current_version=current or None
    )


def decode_outcome(decision: int, first: int, last: int, root: bytes, answer: bytes) -> Outcome:
    """Return what the kernel says of one entry; a duplicate's kept answer is unpacked."""
    if decision == _REFUSED:
        return Outcome(first, last, last, root, b"", refused=True)
    if decision == _DUPLICATE:
        _, _, kept_last, raw, count = _ANSWER.unpack_from(answer)
        results = answer[_ANSWER.size :]
        if not raw:
            results = results * count
        return Outcome(kept_last - max(count, 1) + 1, kept_last, last, root, results, duplicate=True)
    return Outcome(first, last, last, root, answer)
