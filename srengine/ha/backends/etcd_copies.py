"""Copies of the agreed state, so that the journal in etcd need not be kept for ever.

Every node writes its state to a file from time to time, durably, and then says so in etcd: index and digest
(``state/<node id>``). The leader trims the journal only up to what two nodes hold copies of, and at least ``kept``
entries behind its end::

    copies     n1 at 9 000      n2 at 12 000      n3 at 11 500         head 21 700, kept 10 000
    floor      min(21 700 - 10 000, second newest copy 11 500) = 11 500

A node that needs an entry at or below the floor fetches a copy from the node that holds it, compares it with the digest
that etcd has, and goes on with the entries behind it. The newest copy of a node replaces its older one, so a copy that
somebody is just fetching may be replaced: the file that is open is sent to its end.

A lone node never trims: one disk is no place for the only copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors
from srengine.ha import state
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_journal import EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import CopyRecord, FloorRecord, encode
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_session import TRANSIENT
from srengine.ha.messages import FetchState
from srengine.ha.metadata import MetadataMachine
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.ha.backends import Wire

_logger = logging.getLogger(__name__)

COPIES_NEEDED: Final = 2
FETCH_S: Final = 60.0
TRIM_S: Final = 10.0
_FAILURES: Final = (
    *TRANSIENT,
    errors.SnapshotDamaged,
    errors.NotFound,
    errors.NotReady,
    errors.FrameError,
    errors.Closed,
    errors.Conflict,
)


class EtcdCopies:
    """Makes, offers, fetches copies; trims. ``kept``: entries that stay in etcd behind the end."""

    def __init__(
        self,
        place: EtcdPlace,
        journal: EtcdJournal,
        mirror: EtcdMirror,
        *,
        machine: MetadataMachine,
        wire: Wire,
        directory: Path,
        kept: int,
    ) -> None:
        assert kept >= 1, kept
        self._client = place.client
        self._keys = place.keys
        self._journal = journal
        self._mirror = mirror
        self._machine = machine
        self._wire = wire
        self._directory = directory
        self._node_id = place.node_id
        self._name = place.name
        self._kept = kept
        self._copied = 0
        """Index of the own copy; 0 while there is none of this run."""
        self._making = asyncio.Lock()
        self.trims = 0

    def open(self) -> None:
        """Remove what an earlier run left half done; offer copies."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._directory.glob("*.part"):
            left.unlink()
        self._wire.serve_stream(FetchState, self._serve)

    def _path(self, index: int) -> Path:
        return self._directory / f"state-{index}"

    # --- making ------------------------------------------------------------------------------------------------------

    async def maybe_make(self, applied: int) -> bool:
        """Make a new copy when the journal has grown by half of what is kept since the last one."""
        floor = self._mirror.floor
        since = max(self._copied, 0 if floor is None else floor.index)
        if applied - since < max(1, self._kept // 2):
            return False
        await self.make()
        return True

    async def make(self) -> CopyRecord:
        """Write the state to a file and say so in etcd."""
        async with self._making:
            record = await asyncio.to_thread(self._write)
            await self._client.txn([], [ec.put(self._keys.state(self._node_id), encode(record))])
            self._copied = record.index
            await asyncio.to_thread(self._sweep)
            return record

    def _write(self) -> CopyRecord:
        part = self._directory / "state.part"
        part.unlink(missing_ok=True)
        described = self._machine.export(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(self._path(described.index))
        self._sync_directory()
        return CopyRecord(self._node_id, self._name, described.index, described.digest)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove older copies."""
        keep = self._path(self._copied)
        for path in self._directory.glob("state-*"):
            if path != keep:
                path.unlink()

    # --- trimming ----------------------------------------------------------------------------------------------------

    async def maybe_trim(self, term: int) -> bool:
        """As leader of ``term``: trim when that removes half of what is kept at least."""
        floor = self._floor_to_be()
        before = 0 if self._mirror.floor is None else self._mirror.floor.index
        if floor is None or floor.index - before < max(1, self._kept // 2):
            return False
        copies = [kv for record, kv in self._mirror.copies() if record.node_id in floor.holders]
        if not await self._journal.trim(term, floor, copies, timeout_s=TRIM_S):
            return False
        self.trims += 1
        _logger.info("the journal in etcd was trimmed to %d", floor.index, extra={"event": "trimmed"})
        return True

    def _floor_to_be(self) -> FloorRecord | None:
        copies = sorted(
            (record for record, _ in self._mirror.copies()), key=lambda record: (-record.index, record.node_id)
        )
        if len(copies) < COPIES_NEEDED:
            return None
        index = min(self._mirror.head - self._kept, copies[COPIES_NEEDED - 1].index)
        holders = [record for record in copies if record.index >= index]
        best = holders[-1]
        return FloorRecord(index, best.index, best.digest, tuple(record.node_id for record in holders))

    # --- offering and fetching ---------------------------------------------------------------------------------------

    async def _serve(self, asker: NodeId, message: msgspec.Struct) -> AsyncGenerator[bytes, None]:
        assert isinstance(message, FetchState), message
        path = self._path(message.index)
        if not path.is_file():
            raise errors.NotFound(f"{self._name} holds no copy of the state at {message.index}", index=message.index)
        _logger.info("%s fetches the state at %d", asker, message.index, extra={"event": "state_sent"})
        with contextlib.closing(state.read_file(path)) as items:
            while (item := await asyncio.to_thread(next, items, None)) is not None:
                yield item

    async def fetch(self) -> int:
        """Replace the own state by a copy that is not below the floor; return its index. Nothing may be applied
        meanwhile.

        Raises `errors.NotReady` when nobody gives one.
        """
        floor = await self._journal.floor()
        lowest = 0 if floor is None else floor.index
        reasons = []
        for record, _ in sorted(self._mirror.copies(), key=lambda found: -found[0].index):
            if record.index < lowest or record.node_id == self._node_id:
                continue
            try:
                await self._fetch_from(record)
            except _FAILURES as error:
                reasons.append(f"{record.name}: {error.message}")
                _logger.warning("no copy of the state from %s: %s", record.name, error)
            else:
                return record.index
        raise errors.NotReady(
            f"the journal in etcd begins behind {lowest} and no node gives a copy of the state"
            f" ({'; '.join(reasons) or 'none is offered'})",
            index=lowest,
        )

    async def _fetch_from(self, record: CopyRecord) -> None:
        part = self._directory / "fetched.part"
        part.unlink(missing_ok=True)
        try:
            items = self._wire.stream(NodeId(record.node_id), FetchState(record.index), timeout_s=FETCH_S)
            async with contextlib.aclosing(items):
                with part.open("xb") as file:
                    async for item in items:
                        if len(item) > state.ITEM_BYTES_MAX:
                            raise errors.SnapshotDamaged(f"an item of {len(item)} bytes is too large")
                        await asyncio.to_thread(state._write, file, bytes(item))
            found = await asyncio.to_thread(self._digest_of, part)
            if found != record.digest:
                raise errors.SnapshotDamaged(
                    f"the state that {record.name} sent for {record.index} is not the one that etcd knows",
                    expected=record.digest,
                    found=found,
                )
            await asyncio.to_thread(self._machine.install, part, index=record.index)
        finally:
            part.unlink(missing_ok=True)

    def _digest_of(self, path: Path) -> bytes:
        """Return the digest of a whole state in a file, proved."""
        with contextlib.closing(state.read_file(path)) as items:
            header = state.read_header(items, self._machine._tables)
            digest = state.Digest(header.index)
            for row in state.read_rows(header, items):
                digest.add(*row)
            return digest.value()
