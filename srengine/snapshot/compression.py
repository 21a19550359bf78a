"""zstd at level 1 for chunks, and a reader that a hostile chunk cannot make greedy.

Writing gives up by itself: a chunk that shrinks by less than a sixteenth is stored as it is, and after a few of those
only every so many chunks are tried. Reading never trusts what the compressed bytes say of themselves: the frame is
walked first (exactly one frame, nothing behind it, a bounded window, no other size than the head's), then decompressed
as a stream into a buffer of the declared length + 1, so that one byte too many is noticed and none more is produced.
``max_output_size`` of the binding is no cap: it is only a hint for frames without a size.
"""

from __future__ import annotations

import time
from typing import Final

import zstandard

from srengine import errors, limits
from srengine._native import chunk
from srengine.snapshot.format import Encoding

LEVEL: Final = 1
WINDOW_LOG: Final = 17
"""A window that stays in a processor's second cache, of 128 KiB: a tenth faster than level 1's own of 512, and chunks
are larger by three in a thousand.
"""
_PAUSE_CHUNKS_MAX: Final = 16
_PROBE_CHUNKS: Final = 4
"""Plain chunks whose waits are averaged: they are taken several at a time."""
_WAIT_LEAST: Final = 3.0
"""What a plain chunk must be waited for, in times that one takes to compress."""
_RUN_CHUNKS: Final = 32
_RUN_CHUNKS_MAX: Final = 1024


class Patience:
    """Whether to compress pays, for chunks that somebody takes one after the other; for one thread.

    A taker that keeps up, link and receiver together, gains nothing from smaller chunks: they only come later. So a few
    chunks are handed over as they are; if they were waited for much longer than it takes to compress one, a run of
    chunks is compressed, and then a few are tried plain again. Runs become longer while that goes on.
    """

    def __init__(self) -> None:
        self._left = 1
        """Chunks of this run that are still to be compressed: the first one, to learn what it takes."""
        self._run = _RUN_CHUNKS
        self._cost_s = 0.0
        """What the last one took."""
        self._waits: list[float] = []
        """For the plain chunks since the last run."""

    def wanted(self) -> bool:
        """Return whether the next chunk is to be compressed."""
        if not self._left:
            return False
        self._left -= 1
        self._waits = []
        return True

    def took(self, seconds: float) -> None:
        """Hear what it took to compress a chunk."""
        self._cost_s = seconds

    def taken(self, waited_s: float) -> None:
        """Hear how long it was until the taker asked for the next chunk."""
        if self._left:
            return
        self._waits.append(waited_s)
        if len(self._waits) <= _PROBE_CHUNKS:  # the first wait is that for the last chunk of the run
            return
        if sum(self._waits[1:]) >= _WAIT_LEAST * self._cost_s * _PROBE_CHUNKS:
            self._left = self._run
            self._run = min(2 * self._run, _RUN_CHUNKS_MAX)
        else:
            self._run = _RUN_CHUNKS
        self._waits = self._waits[-1:]


class Compressor:
    """Compresses chunks of one snapshot; for one thread."""

    def __init__(self, *, active: bool, patience: Patience | None = None) -> None:
        """``patience``: asked before each chunk, if there is one."""
        parameters = zstandard.ZstdCompressionParameters(compression_level=LEVEL, window_log=WINDOW_LOG)
        self._zstd = zstandard.ZstdCompressor(compression_params=parameters) if active else None
        self._patience = patience
        self._pause = 0
        """Chunks that are still stored without a try."""
        self._pause_next = 1
        """How many are skipped after the next failure: doubles up to a bound, back to 1 after a success."""

    def encode(self, rows: bytes | memoryview) -> tuple[Encoding, bytes | memoryview]:
        """Return the encoding and the bytes to store. Releases the GIL while it compresses."""
        if self._zstd is None or len(rows) < 64:
            return Encoding.PLAIN, rows
        if self._pause:
            self._pause -= 1
            return Encoding.PLAIN, rows
        patience = self._patience
        if patience is None:
            packed = self._zstd.compress(rows)
        elif patience.wanted():
            start = time.perf_counter()
            packed = self._zstd.compress(rows)
            patience.took(time.perf_counter() - start)
        else:
            return Encoding.PLAIN, rows
        if len(packed) > len(rows) - len(rows) // 16:
            self._pause = self._pause_next
            self._pause_next = min(self._pause_next * 2, _PAUSE_CHUNKS_MAX)
            return Encoding.PLAIN, rows
        self._pause_next = 1
        return Encoding.ZSTD, packed


class Decompressor:
    """Decompresses chunks of one snapshot within fixed bounds; for one thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=limits.ZSTD_WINDOW_BYTES_MAX)

    def decode(
        self, encoding: int, stored: bytes | memoryview, raw_bytes: int, room: memoryview | None = None
    ) -> memoryview:
        """Return the rows behind ``stored``; raises `SnapshotDamaged` unless they are exactly ``raw_bytes`` long.

        ``room``: ``raw_bytes`` + 1 bytes to decompress into. Without it as much is allocated, which the caller checked
        against its limit; zstd's bounded window comes on top.
        """
        if encoding == Encoding.PLAIN:
            if len(stored) != raw_bytes:
                raise errors.SnapshotDamaged("a chunk's size is not the declared one", bytes=len(stored))
            return memoryview(stored)
        frame_bytes, window_bytes, content_bytes = chunk.zstd_frame(stored)
        if frame_bytes != len(stored):
            raise errors.SnapshotDamaged(
                "bytes follow a chunk's zstd frame", frame_bytes=frame_bytes, stored_bytes=len(stored)
            )
        if window_bytes > limits.ZSTD_WINDOW_BYTES_MAX:
            raise errors.SnapshotDamaged(
                f"a chunk asks for a window of {window_bytes} bytes, {limits.ZSTD_WINDOW_BYTES_MAX} are allowed",
                window_bytes=window_bytes,
            )
        if content_bytes not in {-1, raw_bytes}:
            raise errors.SnapshotDamaged(
                "a chunk's zstd frame declares another size than its head", frame=content_bytes, head=raw_bytes
            )
        return self._read(stored, raw_bytes, memoryview(bytearray(raw_bytes + 1)) if room is None else room)

    def _read(self, stored: bytes | memoryview, raw_bytes: int, out: memoryview) -> memoryview:
        assert len(out) == raw_bytes + 1, (len(out), raw_bytes)
        filled = 0
        try:
            with self._zstd.stream_reader(stored, read_across_frames=False) as reader:
                while filled < len(out):
                    count = reader.readinto(out[filled:])
                    if not count:
                        break
                    filled += count
        except zstandard.ZstdError as error:
            raise errors.SnapshotDamaged(f"a chunk cannot be decompressed: {error}") from error
        if filled != raw_bytes:
            longer = filled > raw_bytes
            raise errors.SnapshotDamaged(
                f"a chunk decompresses to {'more than ' if longer else ''}{min(filled, raw_bytes)} bytes, "
                f"its head declares {raw_bytes}"
            )
        return out[:raw_bytes]
