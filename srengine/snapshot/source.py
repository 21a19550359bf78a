"""Read a tablet into the items of a snapshot: the sender's driver.

The machine (transfer_machine.SendMachine) says what to read next; here views are opened, rows read, compressed and
sealed, the scan and, for a file, compression in threads of their own. A view serves a few chunks and is given back, so
neither a slow receiver nor a large tablet pins one; one that expired is replaced by the next, which loses nothing.
"""

from __future__ import annotations

import collections
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors, limits
from srengine.snapshot import format as words
from srengine.snapshot import items
from srengine.snapshot.compression import Compressor, Patience
from srengine.snapshot.format import Ancestor, Manifest, Mark, StoredPosition, Trailer
from srengine.snapshot.overlap import overlapped
from srengine.snapshot.transfer_machine import (
    BatchRead,
    ChunkPlan,
    Close,
    ReadKeys,
    ReadSequences,
    SendMachine,
    advance,
    first_mark,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from srengine.snapshot.items import Sealed
    from srengine.storage import RowBatch, Tablet, View
    from srengine.types import Position

VIEW_CHUNKS_MAX: Final = 16
"""Chunks read from one view before the next is opened."""
WRITER: Final = "srengine 1"


class _Closing(NamedTuple):
    """What the last view says at the end."""

    position: Position
    meta: bytes
    state: bytes


class _Read(NamedTuple):
    """One batch on its way to become a chunk; ``plan`` None: nothing to send; ``closing``: it was the last."""

    plan: ChunkPlan | None
    rows: bytes | memoryview
    closing: _Closing | None
    buffer: bytearray | None
    """Holds the rows if they fit; read into again once the chunk was used."""


class _Made(NamedTuple):
    sealed: Sealed | None
    closing: _Closing | None
    buffer: bytearray | None


def seed_id(seed: bytes) -> bytes:
    """Return a name for ``seed`` that tells equal seeds apart from others without telling the seed."""
    return hashlib.blake2b(seed, digest_size=8, person=b"srengine-seed").digest()


class SnapshotSource:
    """One snapshot of ``tablet``, as an iterator of items (bytes): manifest, chunks, trailer.

    Iterate once, from one thread. ``since``: a delta behind that position (`Diverged` when it is not of this history,
    `BelowPurgeMark` when the log does not reach back so far). ``resume``: a receiver's mark; if this tablet can go on
    from it, ``resumed`` is true and the items are the manifest again and then the chunks behind the mark, else a new
    full snapshot follows and ``reason`` says why. ``compression``: "zstd", "none", or, for who iterates, "auto": zstd
    while the taker is much slower than chunks are made (see `compression.Patience`).

    Fields: ``manifest``; ``resumed``; ``reason`` (empty when all went as asked); ``position`` (None until the trailer
    was produced); ``mark`` (what was produced so far).
    """

    def __init__(
        self,
        tablet: Tablet,
        *,
        since: Position | None = None,
        resume: bytes | Mark | None = None,
        compression: str = "zstd",
        node: bytes = words.NO_SOURCE,
        chunk_bytes: int = limits.CHUNK_BYTES_TARGET,
        share_seed: bool = True,
    ) -> None:
        if compression not in {"none", "zstd", "auto"}:
            raise errors.InvalidValue(f"compression {compression!r} is not none, zstd or auto")
        if not 1 <= chunk_bytes <= limits.CHUNK_BYTES_TARGET:
            raise errors.InvalidValue(f"a chunk of {chunk_bytes} bytes is not within 1 to {limits.CHUNK_BYTES_TARGET}")
        self._tablet = tablet
        self._node = node
        self.resumed = False
        self.reason = ""
        self.position: Position | None = None
        mark: Mark | None = None
        if resume is not None:
            mark = self._resume(words.decode_mark(resume) if not isinstance(resume, Mark) else resume, share_seed)
        if mark is not None:
            self.manifest = mark.manifest
        else:
            encoding = "none" if compression == "none" else "zstd"
            self.manifest = self._new_manifest(since, encoding, chunk_bytes, share_seed)
        self._first = items.seal_manifest(self.manifest, node)
        self.mark = mark or first_mark(self.manifest, self._first.head.digest)
        self._patience = Patience() if compression == "auto" else None
        self._compressor = Compressor(active=self.manifest.compression == "zstd", patience=self._patience)
        self._spare: collections.deque[bytearray] = collections.deque()
        """Buffers to read into. Taken by one thread, given back by another; the budget bounds how many there are."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the items as single pieces, ready to ship."""
        made = self.sealed()
        try:
            for item in made:
                joined = [item.joined()]
                del item
                made_at = time.perf_counter()
                yield joined.pop()
                if self._patience is not None:
                    self._patience.taken(time.perf_counter() - made_at)
        finally:
            made.close()

    def sealed(self, *, ahead: bool = False) -> Generator[Sealed, None, None]:
        """Yield the items with head and stored bytes apart, for a file; each is good until the next is asked for.

        What is to be compressed is read ahead in a thread of its own. What is not costs less to make than to hand on
        between threads, so it is made in turn. ``ahead``: the caller waits for something himself; everything is made in
        threads of their own meanwhile.
        """
        yield self._first
        compressed = self.manifest.compression != "none"
        if compressed or ahead:
            worker = compressed and ahead
            stages = overlapped(self._read(), self._seal, bytes_of=lambda read: len(read.rows), worker=worker)
        else:
            stages = self._in_turn()
        try:
            for sealed, closing, buffer in stages:
                if sealed is not None:
                    self.mark = advance(self.mark, sealed.head)
                    box = [sealed]
                    del sealed
                    yield box.pop()
                if buffer is not None:
                    self._spare.append(buffer)
                if closing is not None:
                    yield self._trailer(closing)
                    self.position = closing.position
        finally:
            stages.close()

    def _in_turn(self) -> Generator[_Made, None, None]:
        read = self._read()
        try:
            for each in read:
                box = [each]
                del each
                yield self._seal(box.pop())
        finally:
            read.close()

    # --- beginning -------------------------------------------------------------------------------------------------

    def _resume(self, mark: Mark, share_seed: bool) -> Mark | None:  # noqa: FBT001  (a private pass-through)
        """Return the mark to go on from, or None with ``reason`` set."""
        here, manifest = self._tablet.position, mark.manifest
        if manifest.lineage != here.lineage or manifest.seed_id != seed_id(self._tablet.seed):
            self.reason = "the mark is of another lineage"
        elif share_seed and manifest.seed != self._tablet.seed:
            self.reason = "the mark does not hold the seed"
        elif here.sequence < mark.view_sequence:
            self.reason = f"this replica is at {here.sequence}, the copy has seen {mark.view_sequence}"
        else:
            try:
                self._check_floor(mark.sequence)
            except errors.BelowPurgeMark as error:
                self.reason = error.message
        if self.reason:
            return None
        self.resumed = True
        # NB: the seed in a manifest that leaves is ours or none, never what the asker wrote.
        if manifest.seed is not None and manifest.seed != self._tablet.seed:
            self.resumed, self.reason = False, "the mark holds another seed"
            return None
        return mark

    def _check_floor(self, sequence: int) -> None:
        view = self._tablet.view()
        try:
            view.rows_since(sequence, bytes_max=1)
        finally:
            view.close()

    def _new_manifest(
        self,
        since: Position | None,
        compression: str,
        chunk_bytes: int,
        share_seed: bool,  # noqa: FBT001  (a private pass-through)
    ) -> Manifest:
        here = self._tablet.position
        if since is not None:
            self._check_base(since, here)
        return Manifest(
            format=words.FORMAT,
            snapshot=secrets.token_bytes(16),
            tablet=self._tablet.id,
            kind="full" if since is None else "delta",
            lineage=here.lineage,
            ancestry=tuple(Ancestor(lineage=lineage, sequence=sequence) for lineage, sequence in self._tablet.ancestry),
            seed=self._tablet.seed if share_seed else None,
            seed_id=seed_id(self._tablet.seed),
            base=None if since is None else StoredPosition.of(since),
            scan_base=here.sequence if since is None else since.sequence,
            compression=compression,
            chunk_bytes=chunk_bytes,
            features=("zstd",) if compression == "zstd" else (),
            writer=WRITER,
        )

    def _check_base(self, since: Position, here: Position) -> None:
        if since.lineage != here.lineage or since.sequence > here.sequence:
            raise errors.Diverged(
                f"a delta since {since.lineage}:{since.sequence} cannot be made: the tablet is at "
                f"{here.lineage}:{here.sequence}",
                base=since.sequence,
                sequence=here.sequence,
            )
        root = self._tablet.root_at(since.sequence)
        if root is not None and bytes(root) != bytes(since.root):
            raise errors.Diverged(
                f"at sequence {since.sequence} this tablet had another root", base=since.sequence, root=bytes(root)
            )
        self._check_floor(since.sequence)

    # --- reading, in the first thread ------------------------------------------------------------------------------

    def _read(self) -> Generator[_Read, None, None]:
        machine = SendMachine(self.mark)
        view: View | None = None
        used = 0
        wanted = machine.drain().apply
        try:
            while not isinstance(wanted, Close):
                assert wanted is not None, "the machine asks for a batch until it closes"
                if view is None or used >= VIEW_CHUNKS_MAX:
                    if view is not None:
                        view.close()
                    view, used = self._tablet.view(), 0
                buffer = self._spare.pop() if self._spare else bytearray(self.manifest.chunk_bytes)
                try:
                    batch, closing = self._batch(view, wanted, buffer)
                except errors.ViewExpired:
                    used = VIEW_CHUNKS_MAX
                    continue
                used += 1
                rows = batch.rows
                machine.step(BatchRead(batch.count, len(rows), batch.last, batch.done, view.position.sequence))
                effects = machine.drain()
                wanted = effects.apply
                box = [_Read(effects.send, rows, closing, buffer)]
                del batch, rows, buffer
                yield box.pop()
        finally:
            if view is not None:
                view.close()

    def _batch(
        self, view: View, wanted: ReadKeys | ReadSequences, buffer: bytearray
    ) -> tuple[RowBatch, _Closing | None]:
        bytes_max = self.manifest.chunk_bytes
        if isinstance(wanted, ReadKeys):
            return view.rows_by_key(wanted.after, bytes_max=bytes_max, buffer=buffer), None
        if view.position.lineage != self.manifest.lineage:
            raise errors.Diverged(
                f"the tablet began lineage {view.position.lineage} while a snapshot of {self.manifest.lineage} was made"
            )
        batch = view.rows_since(wanted.after, bytes_max=bytes_max)
        if not batch.done:
            return batch, None
        # All three from the view that ends the snapshot: together they are its position.
        since = self.manifest.scan_base if self.manifest.base is not None else 0
        return batch, _Closing(view.position, view.meta_rows(since), view.state)

    # --- sealing, in the second ------------------------------------------------------------------------------------

    def _seal(self, read: _Read) -> _Made:
        if read.plan is None:
            return _Made(None, read.closing, read.buffer)
        sealed = items.seal_chunk(
            read.plan, read.rows, compressor=self._compressor, snapshot=self.manifest.snapshot, source=self._node
        )
        return _Made(sealed, read.closing, read.buffer)

    def _trailer(self, closing: _Closing) -> Sealed:
        mark = self.mark
        trailer = Trailer(
            target=StoredPosition.of(closing.position),
            chunks=mark.chunks,
            rows=mark.rows,
            raw_bytes=mark.raw_bytes,
            digest=mark.digest,
            meta=closing.meta,
            state=closing.state,
        )
        return items.seal_trailer(trailer, mark.chunks + 1, self.manifest.snapshot, self._node)
