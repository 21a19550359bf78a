"""One item in, one item out: seal rows into a chunk, open a chunk into proved rows.

Opening proves all that an item can prove alone: sizes within limits, the digest over head and stored bytes, one zstd
frame of exactly the declared size, well-formed rows in order and within the head's ranges. What holds between items is
the machine's (transfer_machine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from srengine import errors
from srengine._native import chunk
from srengine.snapshot import format as words
from srengine.snapshot.format import HEAD_BYTES, Encoding, Head, Kind, Manifest, Trailer
from srengine.snapshot.transfer_machine import ChunkRead, ManifestRead, Message, TrailerRead

if TYPE_CHECKING:
    from collections.abc import Callable

    from srengine.snapshot.compression import Compressor, Decompressor
    from srengine.snapshot.transfer_machine import ChunkPlan


class Sealed(NamedTuple):
    """An item ready to leave: ``head_bytes`` then ``stored``; kept apart so that a file needs no copy of the rows."""

    head: Head
    head_bytes: bytes
    stored: bytes | memoryview

    def joined(self) -> bytes:
        """Return the item as one piece."""
        return chunk.join(self.head_bytes, self.stored)

    @property
    def size(self) -> int:
        """Return the item's size in bytes."""
        return len(self.head_bytes) + len(self.stored)


class Opened(NamedTuple):
    """An item that is right in itself: what the machine wants to know, and the rows of a chunk."""

    message: Message
    rows: memoryview


def seal_manifest(manifest: Manifest, source: bytes) -> Sealed:
    """Return the manifest's item."""
    return _seal_words(Kind.MANIFEST, 0, 0, words.encode_manifest(manifest), manifest.snapshot, source)


def seal_trailer(trailer: Trailer, ordinal: int, snapshot: bytes, source: bytes) -> Sealed:
    """Return the trailer's item."""
    body = words.encode_trailer(trailer)
    return _seal_words(Kind.TRAILER, ordinal, trailer.target.sequence, body, snapshot, source)


def _seal_words(kind: Kind, ordinal: int, view_sequence: int, body: bytes, snapshot: bytes, source: bytes) -> Sealed:
    head = chunk.seal(
        kind, Encoding.PLAIN, 0, ordinal, len(body), 0, b"", b"", view_sequence, 0, 0, snapshot, source, body
    )
    return Sealed(words.read_head(head), head, body)


def seal_chunk(
    plan: ChunkPlan, rows: bytes | memoryview, *, compressor: Compressor, snapshot: bytes, source: bytes
) -> Sealed:
    """Return the chunk that ``plan`` describes; compresses and hashes without the GIL."""
    encoding, stored = compressor.encode(rows)
    head = chunk.seal(
        Kind.CHUNK,
        encoding,
        plan.flags,
        plan.ordinal,
        plan.raw_bytes,
        plan.row_count,
        plan.after_key,
        plan.last_key,
        plan.view_sequence,
        plan.after_sequence,
        plan.last_sequence,
        snapshot,
        source,
        stored,
    )
    return Sealed(words.read_head(head), head, stored)


def split(item: bytes | bytearray | memoryview) -> tuple[memoryview, memoryview]:
    """Return (head, stored) of one whole item; raises `SnapshotDamaged` when its length is not the declared one."""
    data = memoryview(item)
    head_bytes, stored_bytes, _ = chunk.measure(data[:HEAD_BYTES])
    if len(data) != head_bytes + stored_bytes:
        raise errors.SnapshotDamaged(
            f"an item of a snapshot has {len(data)} bytes where its head declares {head_bytes + stored_bytes}",
            bytes=len(data),
        )
    return data[:head_bytes], data[head_bytes:]


Room: TypeAlias = "Callable[[Head], memoryview | None]"
"""Where to put the rows of a compressed chunk: ``head.raw_bytes`` + 1 bytes that nobody else uses until the rows are
used, or None: the decompressor has to see for itself."""


def open_item(
    head_data: bytes | memoryview,
    stored: bytes | memoryview,
    decompressor: Decompressor,
    room: Room | None = None,
) -> Opened:
    """Prove one item alone; raises `SnapshotDamaged` or `UnsupportedFeature`, each naming the item."""
    head = words.read_head(head_data)
    if not chunk.verify(head_data, stored):
        raise errors.SnapshotDamaged(
            f"snapshot refused: item {head.ordinal} does not match its digest", item=head.ordinal
        )
    try:
        return _open(head, stored, decompressor, room)
    except errors.SnapshotDamaged as error:
        raise errors.SnapshotDamaged(
            f"snapshot refused: {error.message} (item {head.ordinal})", **(error.details | {"item": head.ordinal})
        ) from error


def _open(head: Head, stored: bytes | memoryview, decompressor: Decompressor, room: Room | None) -> Opened:
    if head.kind == Kind.MANIFEST:
        return Opened(ManifestRead(head, words.decode_manifest(stored)), memoryview(b""))
    if head.kind == Kind.TRAILER:
        return Opened(TrailerRead(head, words.decode_trailer(stored)), memoryview(b""))
    place = room(head) if room is not None and head.encoding != Encoding.PLAIN else None
    rows = decompressor.decode(head.encoding, stored, head.raw_bytes, place)
    count, last_key, last_sequence = chunk.check_rows(
        rows,
        by_key=head.by_key,
        after_key=head.after_key,
        after_sequence=head.after_sequence,
        sequence_max=head.view_sequence,
    )
    if count != head.row_count:
        raise errors.SnapshotDamaged(f"a chunk has {count} rows, its head says {head.row_count}")
    if head.by_key and count and last_key != head.last_key:
        raise errors.SnapshotDamaged("a chunk's last key is not the one in its head")
    if not head.by_key and last_sequence > head.last_sequence:
        raise errors.SnapshotDamaged("a chunk has a row behind its range of sequences")
    return Opened(ChunkRead(head), rows)
