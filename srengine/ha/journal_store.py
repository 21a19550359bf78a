"""The journal's entries on this node's disk, in two tables of the metadata store.

======================  ======================  =========================================================
table                   key                     value
======================  ======================  =========================================================
``journal``             index, 8 bytes, big     the entry, msgpack
                        endian
``journal_state``       ``last``                index and digest of the last entry; same transaction
``journal_state``       ``applied``             index up to which the state is applied (see metadata.py)
======================  ======================  =========================================================

The whole journal is kept: it grows with changes of catalog and members only. Trimming comes with consensus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from srengine import errors, limits
from srengine.ha.journal import DIGEST_BYTES, Entry, check_chain
from srengine.ha.metadata import STATE_TABLE, Store
from srengine.types import Position

ENTRY_TABLE: Final = "journal"
_LAST: Final = b"last"


class JournalStore:
    """Append and read entries. ``lineage`` (the cluster id) is part of every position."""

    def __init__(self, store: Store, lineage: str) -> None:
        self._store = store
        self._decoder = msgspec.msgpack.Decoder(Entry)
        self._encoder = msgspec.msgpack.Encoder()
        self._position = Position(lineage, 0, bytes(DIGEST_BYTES), 0)
        stored = store.get(STATE_TABLE, _LAST)
        if stored is not None:
            index = int.from_bytes(stored[:8], "big")
            self._position = Position(lineage, index, stored[8:], index)

    @property
    def position(self) -> Position:
        """(cluster id, last index, chain digest, last index)."""
        return self._position

    def root_at(self, index: int) -> bytes | None:
        """Return the chain digest after ``index``, None above the last."""
        if index == 0:
            return bytes(DIGEST_BYTES)
        entry = self.entry(index)
        return None if entry is None else entry.digest

    def entry(self, index: int) -> Entry | None:
        """Return one entry."""
        stored = self._store.get(ENTRY_TABLE, index.to_bytes(8, "big"))
        return None if stored is None else self._decode(stored)

    def entries_after(self, index: int, *, bytes_max: int = limits.JOURNAL_PULL_BYTES_MAX) -> list[Entry]:
        """Return the entries behind ``index``, at least one if there is one, then up to ``bytes_max``."""
        found: list[Entry] = []
        size = 0
        for entry in self._scan(index + 1):
            size += len(entry.body) + 64
            if found and size > bytes_max:
                break
            found.append(entry)
        return found

    def append(self, entries: Sequence[Entry]) -> Position:
        """Append entries that follow the last one, durably, all or nothing; `Diverged` if they do not follow."""
        position = check_chain(self._position, entries)
        with self._store.transaction() as transaction:
            for entry in entries:
                transaction.put(ENTRY_TABLE, entry.index.to_bytes(8, "big"), self._encoder.encode(entry))
            transaction.put(STATE_TABLE, _LAST, position.sequence.to_bytes(8, "big") + position.root)
        self._position = position
        return position

    def _scan(self, first: int) -> Iterator[Entry]:
        for _, stored in self._store.scan(ENTRY_TABLE, first.to_bytes(8, "big")):
            yield self._decode(stored)

    def _decode(self, stored: bytes) -> Entry:
        try:
            return self._decoder.decode(stored)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise errors.CorruptionError(f"a journal entry cannot be read: {error}") from error
