"""What a write is made of: checked keys and values, conditions, and whether a batch fits into one entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from srengine import errors, limits

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


def condition_of(*, if_absent: bool, if_version: int | None) -> tuple[int, int]:
    """Return (condition, version) of a write's arguments; `InvalidValue` or `TypeError` when they make none."""
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


def check_entry(tablet: int, operations: Sequence[Operation]) -> None:
    """Raise `InvalidValue` when one tablet's part of a batch is larger than an entry may be."""
    size = sum(len(key) + len(value) + OPERATION_OVERHEAD_BYTES for _, key, value, _, _ in operations)
    if len(operations) > limits.ENTRY_OPERATIONS_MAX or size > limits.ENTRY_BYTES_MAX:
        raise errors.InvalidValue(
            f"{len(operations)} operations of {size} bytes fall to tablet {tablet}; one entry holds "
            f"{limits.ENTRY_OPERATIONS_MAX} operations and {limits.ENTRY_BYTES_MAX} bytes: write smaller batches",
            tablet=tablet,
        )


def partly_failed(failed: Mapping[int, errors.Error], parts: Mapping[int, Sequence[Operation]]) -> errors.Error:
    """Return the first failure, of its own class, with the names of all tablets and keys that failed."""
    first = next(iter(failed.values()))
    keys = [key for tablet in failed for _, key, _, _, _ in parts[tablet]]
    facts = {
        **first.details,
        "failed_tablets": list(failed),
        "failed_count": len(keys),
        "failed_keys": [key.hex() for key in keys[: limits.FAILED_KEYS_NAMED_MAX]],
        "applied_tablets": [tablet for tablet in parts if tablet not in failed],
    }
    return type(first)(
        f"{len(failed)} of {len(parts)} tablets failed, with {len(keys)} operations: {first.message}", **facts
    )
