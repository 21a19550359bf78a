"""The rows of a metadata store as bytes, and a store that nobody has open: read, proved, its fence lifted.

A value is stored with a checksum of its table, key and bytes behind it (docs/formats-directory.md), so a sound value in
the wrong place is damage, too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash

from srengine import errors, limits
from srengine.storage import fences, pages

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECK_BYTES: Final = 8
_JOINED_BYTES_MAX: Final = 4 * limits.KIB
"""To copy a value of that size is cheaper than to hash in two steps."""


class Row(NamedTuple):
    """One row as `MetadataStore.survey` finds it.

    ``sound``: the value passed its check. Else ``value`` is everything that is stored, the check included.
    """

    key: bytes
    value: bytes
    sound: bool


def checked_key(key: bytes) -> bytes:
    """Return a key as bytes; `InvalidValue` for one that no row can have."""
    if not limits.KEY_BYTES_MIN <= len(key) <= limits.KEY_BYTES_MAX:
        raise errors.InvalidValue(
            f"a key of {len(key)} bytes is not within {limits.KEY_BYTES_MIN} to {limits.KEY_BYTES_MAX}"
        )
    return bytes(key)


def value_of(stored: bytes) -> bytes:
    """Return the value of what `is_sealed`."""
    return stored[:-CHECK_BYTES]


def is_sealed(table: str, key: bytes, stored: bytes) -> bool:
    """Return whether a stored value ends in the checksum of its table, key and bytes."""
    return len(stored) >= CHECK_BYTES and stored[-CHECK_BYTES:] == _check(table, key, stored[:-CHECK_BYTES])


def damaged(path: Path, table: str, key: bytes) -> errors.CorruptionError:
    """Return what is wrong with a value of the store ``path`` that is not sealed."""
    return errors.CorruptionError(
        f"the value of {key[:64]!r} in table {table} of {path} is damaged",
        file=str(path / pages.DATA_NAME),
        table=table,
        key=key,
    )


def read_row(table: str, key: bytes, stored: bytes) -> Row:
    """Return a row of `table` from its stored bytes, sound or not."""
    if is_sealed(table, key, stored):
        return Row(key, value_of(stored), sound=True)
    return Row(key, stored, sound=False)


def _check(table: str, key: bytes, value: bytes) -> bytes:
    name = table.encode()
    place = b"%b%b%b%b" % (len(name).to_bytes(2, "little"), name, len(key).to_bytes(2, "little"), key)
    if len(value) <= _JOINED_BYTES_MAX:
        return xxhash.xxh3_64_digest(place + value)
    digest = xxhash.xxh3_64(place)
    digest.update(value)
    return digest.digest()


def recover_metadata(path: str | os.PathLike[str]) -> None:
    """Lift the fence of a closed metadata store if the file, read past the page cache, proves whole.

    Raises as `fences.prove`, and `CorruptionError` naming a damaged value; the fence then stays. Without a fence
    nothing happens.
    """
    directory = Path(path)
    if fences.read_fence(directory) is not None:
        fences.prove(directory, lambda: check_values(directory / pages.DATA_NAME))


def read_offline(path: str | os.PathLike[str], table: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a table of a store that nobody has open, in key order, without LMDB: for checks.

    Values whose checksum is wrong are left out (`storage.verify` names them). An unknown table is an empty one. Raises
    `NotFound` and `CorruptionError`.
    """
    with pages.PageFile(Path(path) / pages.DATA_NAME) as file:
        if table not in file.tables():
            return
        for key, stored in file.items(table):
            if is_sealed(table, key, stored):
                yield key, value_of(stored)


def check_values(path: Path) -> None:
    """Raise `CorruptionError` naming the first value of a file whose checksum is wrong."""
    with pages.PageFile(path) as file:
        for table in sorted(file.tables()):
            for key, stored in file.items(table):
                if not is_sealed(table, key, stored):
                    raise damaged(path.parent, table, key)
