"""Change a stopped node's records behind the engine's back: on its disk, with LMDB alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

PAGE = 4096


def data_file(data: Path, tablet_id: str) -> Path:
    """Return the file of a tablet."""
    return data / "tablets" / tablet_id / "data.mdb"


@contextmanager
def raw(data: Path, tablet_id: str) -> Iterator[tuple[Any, Any, Any]]:
    """Open a tablet's file in plain LMDB: (transaction, records, changes); committed at the end."""
    file = data_file(data, tablet_id)
    environment = lmdb.open(str(file.parent), max_dbs=16, create=False, map_size=2 * file.stat().st_size + (1 << 24))
    try:
        records, changes = environment.open_db(b"records", create=False), environment.open_db(b"changes", create=False)
        with environment.begin(write=True) as transaction:
            yield transaction, records, changes
    finally:
        environment.close()


def remove(data: Path, tablet_id: str, keys: list[bytes]) -> None:
    """Take records away; root and counts stay as they are."""
    with raw(data, tablet_id) as (transaction, records, _):
        for key in keys:
            assert transaction.delete(key, db=records), key


def add(data: Path, tablet_id: str, pairs: dict[bytes, bytes]) -> None:
    """Put copies of ``pairs``' values (keys of records that are there) under new keys."""
    with raw(data, tablet_id) as (transaction, records, _):
        for key, like in pairs.items():
            stored = transaction.get(like, db=records)
            assert stored is not None, like
            # The header's check covers the key, so this one cannot be read: as rot would leave it.
            assert transaction.put(key, bytes(stored), db=records), key


def flip_value(data: Path, tablet_id: str, keys: list[bytes]) -> None:
    """Flip a bit in the last byte of records' values; their headers stay sound."""
    with raw(data, tablet_id) as (transaction, records, _):
        for key in keys:
            stored = bytearray(transaction.get(key, db=records))
            stored[-1] ^= 0x10
            transaction.put(key, bytes(stored), db=records)


def flip_header(data: Path, tablet_id: str, keys: list[bytes]) -> None:
    """Flip a bit in records' sequence numbers: the header's check fails."""
    with raw(data, tablet_id) as (transaction, records, _):
        for key in keys:
            stored = bytearray(transaction.get(key, db=records))
            stored[5] ^= 0x01
            transaction.put(key, bytes(stored), db=records)


def lose_change(data: Path, tablet_id: str, sequence: int) -> None:
    """Take an entry of the change log away."""
    with raw(data, tablet_id) as (transaction, _, changes):
        cursor = transaction.cursor(changes)
        assert cursor.set_key(sequence.to_bytes(8, "little")), sequence
        cursor.delete()


def break_pages(data: Path, tablet_id: str, text: bytes) -> None:
    """Spoil the heads of all pages that hold ``text``, stale ones too: LMDB cannot read them any more."""
    file = data_file(data, tablet_id)
    content = bytearray(file.read_bytes())
    at = content.find(text)
    assert at >= 0, text
    while at >= 0:
        page = at - at % PAGE
        content[page + 8 : page + 16] = b"\xff" * 8
        at = content.find(text, page + PAGE)
    file.write_bytes(content)
