"""The words of a snapshot as values: heads, manifest, trailer, mark; and their bytes.

A snapshot is a run of items: one manifest, chunks, one trailer. Each item is a head and stored bytes. The head carries
kind, ordinal, sizes and the snapshot's random id under one digest, so that an item out of place or of another snapshot
is named as that, not only as "damaged". Byte tables and test vectors: docs/formats-snapshot.md.

Manifest, trailer and mark are msgpack maps: unknown fields are skipped, a required feature that this version does not
know is refused with its name. They are decoded only after their size was checked, and whatever the bytes are, the
answer is a value or an error of ours.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec

from srengine import errors, limits
from srengine._native import chunk
from srengine.types import Position

FORMAT: Final = 1
HEAD_BYTES: Final = chunk.HEAD_BYTES
FEATURES_KNOWN: Final = frozenset({"zstd"})
"""What a manifest may require of its reader."""
NO_DIGEST: Final = bytes(16)
NO_SOURCE: Final = bytes(16)
"""The node id of a source that is no node."""


BROKEN_MARK: Final = b"broken"
"""In place of a mark: what was filled could not be proved, so nobody goes on with it."""


class Kind(enum.IntEnum):
    """What an item is."""

    MANIFEST = 1
    CHUNK = 2
    TRAILER = 3


class Encoding(enum.IntEnum):
    """How an item's bytes are stored."""

    PLAIN = 0
    ZSTD = 1


FLAG_BY_KEY: Final = 1
"""The chunk's rows are in key order (the scan of a full snapshot); otherwise in sequence order."""
FLAG_KEYS_END: Final = 2
"""No key behind this chunk exists in its view: the scan is complete."""


class Head(NamedTuple):
    """The head of an item. Ranges are open at the start and closed at the end: (after, last]."""

    kind: int
    encoding: int
    flags: int
    ordinal: int
    """Place in the snapshot: 0 is the manifest, chunks count from 1."""
    raw_bytes: int
    """Size of the rows (or of the msgpack map) before compression."""
    stored_bytes: int
    row_count: int
    after_key: bytes
    """Chunks by key: the last key of the chunk before, empty for the first."""
    last_key: bytes
    view_sequence: int
    """Sequence of the view that the rows were read from."""
    after_sequence: int
    """Chunks by sequence: end of the range before. 0 in chunks by key."""
    last_sequence: int
    snapshot: bytes
    source: bytes
    """Node id of the view's replica, 16 bytes; zeros: no node."""
    digest: bytes

    @property
    def by_key(self) -> bool:
        """Return whether the rows are in key order."""
        return bool(self.flags & FLAG_BY_KEY)

    @property
    def ends_keys(self) -> bool:
        """Return whether the scan by key ends here."""
        return bool(self.flags & FLAG_KEYS_END)


def read_head(data: bytes | bytearray | memoryview) -> Head:
    """Decode the head in front of ``data``, its digest unchecked; raises `SnapshotDamaged`, `UnsupportedFeature`."""
    return Head._make(chunk.read_head(data))


Unsigned = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=limits.NAME_BYTES_MAX)]
Digest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class StoredPosition(msgspec.Struct, frozen=True, kw_only=True):
    """A `Position` as msgpack."""

    lineage: Name
    sequence: Unsigned
    root: Digest
    count: Unsigned

    @classmethod
    def of(cls, position: Position) -> StoredPosition:
        """Return ``position`` in its stored form."""
        return cls(
            lineage=position.lineage, sequence=position.sequence, root=bytes(position.root), count=position.count
        )

    def value(self) -> Position:
        """Return it as the rest of the project knows it."""
        return Position(self.lineage, self.sequence, self.root, self.count)


class Ancestor(msgspec.Struct, frozen=True, kw_only=True):
    """One life of the tablet's history: ``lineage`` holds from ``sequence`` on."""

    lineage: Name
    sequence: Unsigned


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is, said before the first row."""

    format: Unsigned
    snapshot: Digest
    """Random, the same in the head of every item."""
    tablet: Name
    kind: Annotated[str, msgspec.Meta(pattern="^(full|delta)$")]
    lineage: Name
    ancestry: Annotated[tuple[Ancestor, ...], msgspec.Meta(max_length=4096)] = ()
    """Earlier lineages, the oldest first; empty: none before ``lineage``."""
    seed: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)] | None = None
    """The tablet's secret seed; None when only its id travels (backups, jobs)."""
    seed_id: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """Tells equal seeds without telling the seed."""
    schema: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    """Digest of the schema; empty: none."""
    base: StoredPosition | None = None
    """A delta's base; None in a full snapshot."""
    scan_base: Unsigned = 0
    """Full: the sequence where the scan began; what changed since follows by sequence. Delta: the base's sequence."""
    compression: Annotated[str, msgspec.Meta(pattern="^(none|zstd)$")] = "none"
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=limits.CHUNK_BYTES_TARGET)] = limits.CHUNK_BYTES_TARGET
    """Rows of one chunk unless it is a single larger one."""
    features: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=64)] = ()
    """What a reader must know."""
    writer: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Name and version of the program, for people."""


class Trailer(msgspec.Struct, frozen=True, kw_only=True):
    """What must have arrived, said after the last row."""

    target: StoredPosition
    """Where the receiver stands when all is applied: the position of the last chunk's view."""
    chunks: Unsigned
    rows: Unsigned
    raw_bytes: Unsigned
    digest: Digest
    """The digests of all items before, folded in order."""
    meta: bytes = b""
    """Meta rows of the view, in the tablet's own encoding."""
    state: bytes = b""
    """The view's state row, in the tablet's own encoding."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """How far a receiver (or a file) is: all that a source needs to go on. Durable beside the rows it speaks of."""

    manifest: Manifest
    keys_done: bool
    """The scan by key is complete (always true for a delta)."""
    key: Annotated[bytes, msgspec.Meta(max_length=limits.KEY_BYTES_MAX)]
    """The last key received by the scan."""
    sequence: Unsigned
    """By sequence, everything up to here was received."""
    view_sequence: Unsigned
    """Highest sequence of a view used: a source behind it cannot go on."""
    chunks: Unsigned
    rows: Unsigned
    raw_bytes: Unsigned
    digest: Digest


_manifest_encoder = msgspec.msgpack.Encoder()
_manifest_decoder = msgspec.msgpack.Decoder(Manifest)
_trailer_decoder = msgspec.msgpack.Decoder(Trailer)
_mark_decoder = msgspec.msgpack.Decoder(Mark)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's bytes."""
    return _manifest_encoder.encode(manifest)


def decode_manifest(data: bytes | memoryview) -> Manifest:
    """Return the manifest; raises `SnapshotDamaged`, or `UnsupportedFeature` for what this version cannot read."""
    manifest = _decode(_manifest_decoder, data, "manifest", limits.MANIFEST_BYTES_MAX)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check the rules between a manifest's fields; raises as `decode_manifest` does."""
    if manifest.format != FORMAT:
        raise errors.UnsupportedFeature(
            f"the snapshot has format {manifest.format}, this version reads {FORMAT}",
            found=manifest.format,
            known=FORMAT,
        )
    unknown = sorted(set(manifest.features) - FEATURES_KNOWN)
    if unknown:
        raise errors.UnsupportedFeature(
            f"the snapshot requires {', '.join(unknown)}, which this version does not have", features=unknown
        )
    if (manifest.kind == "delta") != (manifest.base is not None):
        raise errors.SnapshotDamaged("the manifest is wrong: exactly a delta has a base", kind=manifest.kind)
    if manifest.base is not None and manifest.base.sequence != manifest.scan_base:
        raise errors.SnapshotDamaged(
            "the manifest is wrong: a delta starts at its base",
            base=manifest.base.sequence,
            scan_base=manifest.scan_base,
        )
    if manifest.compression == "zstd" and "zstd" not in manifest.features:
        raise errors.SnapshotDamaged("the manifest is wrong: compressed, but zstd is not a required feature")


def encode_trailer(trailer: Trailer) -> bytes:
    """Return the trailer's bytes."""
    return _manifest_encoder.encode(trailer)


def decode_trailer(data: bytes | memoryview) -> Trailer:
    """Return the trailer; raises `SnapshotDamaged`."""
    return _decode(_trailer_decoder, data, "trailer", limits.TRAILER_BYTES_MAX)


def encode_mark(mark: Mark) -> bytes:
    """Return the mark's bytes: what `Tablet.fill` keeps and what a receiver sends to ask for the rest."""
    return _manifest_encoder.encode(mark)


def decode_mark(data: bytes | memoryview) -> Mark:
    """Return the mark; raises `SnapshotDamaged` (it may come from a peer)."""
    mark = _decode(_mark_decoder, data, "mark", limits.MANIFEST_BYTES_MAX)
    check_manifest(mark.manifest)
    return mark


_T = TypeVar("_T")


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes | memoryview, what: str, bytes_max: int) -> _T:
    if len(data) > bytes_max:
        raise errors.SnapshotDamaged(f"a snapshot's {what} is larger than {bytes_max} bytes", bytes=len(data))
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise errors.SnapshotDamaged(f"a snapshot's {what} cannot be read: {error}") from error
