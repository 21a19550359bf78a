"""Snapshots made to cost memory: refused, and the process stays small."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard

from srengine import errors, limits
from srengine.snapshot import SnapshotSource, write_snapshot
from srengine.snapshot import format as words
from srengine.snapshot.compression import Compressor, Decompressor
from tests.reference import chunk as oracle
from tests.snapshot.shipping import made_tablet

ROOT = Path(__file__).resolve().parents[2]
MIB = limits.MIB
CAP_BYTES = limits.CHUNK_BYTES_MAX
"""The largest chunk is what a reader must be ready to hold."""


def zeros(size: int, **parameters: object) -> bytes:
    """Return a zstd frame of ``size`` zero bytes, made as a stream (no size in the frame unless asked for)."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False, **parameters).compressobj()
    block = bytes(MIB)
    parts = [compressor.compress(block) for _ in range(size // MIB)]
    return b"".join([*parts, compressor.compress(bytes(size % MIB)), compressor.flush()])


def with_window(frame: bytes, exponent: int) -> bytes:
    """Return a frame that asks for a window of 2^(10 + exponent) bytes."""
    descriptor = frame[4]
    assert not descriptor & 0x20, "a frame with a window"
    return frame[:5] + bytes([exponent << 3]) + frame[6:]


def chunk_of(frame: bytes, raw_bytes: int) -> bytes:
    """Return a well-sealed chunk whose stored bytes are ``frame``."""
    fields = (2, 1, 3, 1, raw_bytes, 1, b"", b"k", 1, 0, 0, b"s" * 16, bytes(16))
    return oracle.seal(*fields, frame) + frame


def manifest() -> bytes:
    """Return a manifest that these chunks fit."""
    body = words.encode_manifest(
        words.Manifest(
            format=1,
            snapshot=b"s" * 16,
            tablet="t1",
            kind="full",
            lineage="l1",
            seed=b"12345678",
            compression="zstd",
            features=("zstd",),
        )
    )
    return oracle.seal(1, 0, 0, 0, len(body), 0, b"", b"", 0, 0, 0, b"s" * 16, bytes(16), body) + body


def attacks() -> dict[str, bytes]:
    """Return file contents, each made to cost memory."""
    bomb = zeros(1024 * MIB)
    small = zeros(1000)
    sized = zstandard.ZstdCompressor(level=1).compress(bytes(1000))
    forged = bytearray(oracle.seal(2, 0, 0, 1, 0, 0, b"", b"", 1, 0, 0, b"s" * 16, bytes(16), b""))
    forged[16:24] = (2**32 - 1).to_bytes(4, "little") * 2
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    return {
        "bomb-declared-small": manifest() + chunk_of(bomb, len(bomb) + 1),
        "bomb-declared-largest": manifest() + chunk_of(bomb, limits.CHUNK_BYTES_MAX),
        "forged-sizes": manifest() + bytes(forged),
        "forged-manifest": forged[:5] + b"\x01" + forged[6:],
        "forged-trailer": manifest() + forged[:5] + b"\x03" + forged[6:],
        "window-2-gib": manifest() + chunk_of(with_window(small, 21), 1000),
        "window-128-mib": manifest() + chunk_of(_wide(wide), 64 * MIB),
        "longer": manifest() + chunk_of(small, 999),
        "shorter": manifest() + chunk_of(small, 1001),
        "another-size": manifest() + chunk_of(sized, 1001),
        "frame-behind": manifest() + chunk_of(small + small, 2000),
        "garbage-behind": manifest() + chunk_of(small + b"x", 1000),
        "skippable-behind": manifest() + chunk_of(small + b"\x50\x2a\x4d\x18\x00\x00\x00\x00", 1000),
        "cut": manifest() + chunk_of(small[:-1], 1000),
        "no-frame": manifest() + chunk_of(b"x" * 40, 1000),
        "rows-of-zeros": manifest() + chunk_of(zeros(64 * MIB), 64 * MIB),
    }


def _wide(parameters: zstandard.ZstdCompressionParameters) -> bytes:
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    block = bytes(MIB)
    return b"".join([*(compressor.compress(block) for _ in range(64)), compressor.flush()])


READER = textwrap.dedent(
    """
    import sys
    from srengine import errors
    from srengine.snapshot import verify_snapshot

    def peak_kib():
        # NB: not ru_maxrss: across an exec it keeps the peak of the process that started this one.
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1])

    # An honest file first, so that libraries and threads are in the baseline.
    verify_snapshot(sys.argv[1])
    before = peak_kib()
    try:
        verify_snapshot(sys.argv[2])
    except errors.SnapshotDamaged as error:
        print(error)
    else:
        sys.exit("accepted")
    print(peak_kib() - before)
    """
)


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    """Return the attacks, made once."""
    return attacks()


@pytest.mark.parametrize(
    "name",
    [
        "bomb-declared-small",
        "bomb-declared-largest",
        "forged-sizes",
        "forged-manifest",
        "forged-trailer",
        "window-2-gib",
        "window-128-mib",
        "longer",
        "shorter",
        "another-size",
        "frame-behind",
        "garbage-behind",
        "skippable-behind",
        "cut",
        "no-frame",
        "rows-of-zeros",
    ],
)
def test_a_hostile_snapshot_is_refused_and_costs_bounded_memory(name, hostile, tmp_path):
    """T13, F39: refused by name; peak memory stays below the largest chunk + 16 MiB."""
    write_snapshot(made_tablet(), tmp_path / "honest")
    (tmp_path / "hostile").write_bytes(hostile[name])
    read = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "honest"), str(tmp_path / "hostile")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert read.returncode == 0, read.stdout + read.stderr
    message, grown_kib = read.stdout.splitlines()
    assert "snapshot refused" in message
    assert int(grown_kib) * 1024 < CAP_BYTES + 16 * MIB, (message, grown_kib)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000, 1 << 20, (3 << 20) + 1])
@pytest.mark.parametrize("kind", ["zeros", "random"])
def test_what_is_compressed_is_decompressed(size, kind):
    rows = bytes(size) if kind == "zeros" else os.urandom(size)
    encoding, stored = Compressor(active=True).encode(rows)
    assert len(stored) <= len(rows)
    assert Decompressor().decode(encoding, stored, size) == rows


def test_compression_gives_up_on_what_does_not_shrink_and_tries_again():
    """Chunks that do not shrink are stored as they are, and mostly without a try; a change of the data is noticed."""
    compressor = Compressor(active=True)
    hard, easy = os.urandom(5000), bytes(5000)
    assert all(compressor.encode(hard) == (0, hard) for _ in range(40))
    tried = [compressor.encode(easy)[0] for _ in range(20)]
    assert 0 < tried.index(1) <= 16
    assert all(tried[tried.index(1) :])


def test_a_declared_size_is_checked_before_anything_else():
    with pytest.raises(errors.SnapshotDamaged, match="not the declared one"):
        Decompressor().decode(0, b"abc", 4)


def test_the_writer_never_makes_what_the_reader_refuses():
    """The largest value compresses into a frame whose window the reader takes."""
    rows = bytes(limits.VALUE_BYTES_MAX + 100)
    encoding, stored = Compressor(active=True).encode(rows)
    assert encoding == 1
    assert Decompressor().decode(encoding, stored, len(rows)) == rows
    del rows
    assert len(list(SnapshotSource(made_tablet()))) >= 3
