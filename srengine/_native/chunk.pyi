"""The byte work of snapshots: heads, digests, bounded readers of rows and of zstd frames. See
docs/formats-snapshot.md.
"""

from typing import Final, TypeAlias

from typing_extensions import Buffer

HEAD_BYTES: Final[int]
"""Size of the fixed part of an item's head."""

_HeadFields: TypeAlias = tuple[int, int, int, int, int, int, int, bytes, bytes, int, int, int, bytes, bytes, bytes]
"""kind, encoding, flags, ordinal, raw_bytes, stored_bytes, row_count, after_key, last_key, view_sequence,
after_sequence, last_sequence, snapshot, source, digest."""

def choose_vectors(*, wide: bool) -> bool:
    """Compute digests with the widest vectors of this processor (as at import), or with portable code; the digests are
    the same. Return whether wide ones are in use: this build and this processor have to know them. For tests.
    """

def seal(
    kind: int,
    encoding: int,
    flags: int,
    ordinal: int,
    raw_bytes: int,
    row_count: int,
    after_key: bytes,
    last_key: bytes,
    view_sequence: int,
    after_sequence: int,
    last_sequence: int,
    snapshot: bytes,
    source: bytes,
    stored: Buffer,
) -> bytes:
    """Return the head of an item, its digest over head and ``stored`` included. ``ValueError`` for a field out of
    range.
    """

def join(head: bytes, stored: Buffer) -> bytes:
    """Return ``head`` and ``stored`` as one item, copied without the GIL."""

def measure(fixed: Buffer) -> tuple[int, int, int]:
    """Return (head bytes, stored bytes, raw bytes) that the fixed part of a head declares, each checked against its
    limit.

    Raises `SnapshotDamaged` for anything that is no head of ours, `UnsupportedFeature` for a format of the future.
    """

def read_head(head: Buffer) -> _HeadFields:
    """Decode a whole head (fixed part and keys); the digest is not checked. Raises as `measure` does."""

def verify(head: Buffer, stored: Buffer) -> bool:
    """Return whether the digest in ``head`` is that of ``head`` and ``stored``."""

def fold(running: bytes, digest: bytes) -> bytes:
    """Return the running digest of a snapshot after one more item: XXH3-128 of both, 16 bytes each."""

def check_rows(
    rows: Buffer, *, by_key: bool, after_key: bytes, after_sequence: int, sequence_max: int
) -> tuple[int, bytes, int]:
    """Read ``rows`` to the end; return (count, last key, last sequence), of no rows (0, b"", 0).

    By key: keys rise strictly and lie behind ``after_key``. By sequence: sequences rise strictly and lie behind
    ``after_sequence``. No sequence is 0 or above ``sequence_max``. Raises `SnapshotDamaged` naming the row's offset.
    """

def zstd_frame(data: Buffer) -> tuple[int, int, int]:
    """Return (bytes of the first zstd frame, its window in bytes, its declared content size or -1).

    Raises `SnapshotDamaged` when ``data`` does not start with a whole frame. Nothing is decompressed.
    """
