"""Snapshot files: written, resumed after any crash, read, applied."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from srengine import errors, failpoints
from srengine.snapshot import apply_snapshot, partial_path, verify_snapshot, write_snapshot
from tests.reference.snapshot_tablet import PlainTablet
from tests.snapshot.shipping import change, made_tablet

ROOT = Path(__file__).resolve().parents[2]


def test_a_full_file_and_a_delta_bring_an_empty_tablet_to_the_source(tmp_path):
    """T10: full, then delta: position, records and root are the source's each time."""
    source, target = made_tablet(), PlainTablet(lineage="fresh")
    full = write_snapshot(source, tmp_path / "full", chunk_bytes=900)
    assert full == source.position == verify_snapshot(tmp_path / "full").position
    assert apply_snapshot(target, tmp_path / "full") == full
    change(source, random.Random(2), 70)
    delta = write_snapshot(source, tmp_path / "delta", since=full, chunk_bytes=900)
    assert apply_snapshot(target, tmp_path / "delta") == delta
    assert target.records == source.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "full"]
    assert (tmp_path / "full").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_file_cut_anywhere_is_gone_on_with(kind, tmp_path):
    """T10: whatever prefix of a partial file is there, a writer goes on behind the last whole chunk, also elsewhere."""
    source = made_tablet(count=120)
    base = source.copy()
    change(source, random.Random(3), 40)
    since = base.position if kind == "delta" else None
    path = tmp_path / "snap"
    write_snapshot(source, path, since, chunk_bytes=700)
    whole = path.read_bytes()
    path.unlink()
    for cut in [*range(0, len(whole), 97), len(whole)]:
        other = source.copy()
        change(other, random.Random(cut), cut % 3)
        partial_path(path).write_bytes(whole[:cut])
        position = write_snapshot(other, path, since, chunk_bytes=700)
        assert position == other.position
        target = base.copy() if kind == "delta" else PlainTablet(lineage="fresh")
        assert apply_snapshot(target, path) == other.position
        assert target.records == other.records
        assert not partial_path(path).exists()


def test_a_resumed_file_keeps_the_chunks_it_had(tmp_path):
    """T10: what was written is not written again."""
    source = made_tablet()
    path = tmp_path / "snap"
    write_snapshot(source, path, chunk_bytes=700)
    whole = path.read_bytes()
    partial_path(path).write_bytes(whole[: len(whole) // 2])
    write_snapshot(source, path, chunk_bytes=700)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("other", ["tablet", "seed", "base", "compression", "behind"])
def test_a_partial_file_of_something_else_is_begun_again(other, tmp_path):
    source = made_tablet()
    path = tmp_path / "snap"
    write_snapshot(source, path, chunk_bytes=700)
    left = path.read_bytes()[:2000]
    partial_path(path).write_bytes(left)
    since, compression = None, "zstd"
    if other == "tablet":
        source.id = "t2"
    elif other == "seed":
        source.seed = b"87654321"
    elif other == "base":
        since = source.position
        change(source, random.Random(1), 5)
    elif other == "compression":
        compression = "none"
    else:
        source = made_tablet(2, count=100)
    assert write_snapshot(source, path, since, compression=compression, chunk_bytes=700) == source.position
    assert verify_snapshot(path).manifest.tablet == source.id
    assert path.read_bytes()[:2000] != left


def test_a_resumed_delta_below_the_purge_mark_says_so(tmp_path):
    """T10: a delta that cannot be gone on with is never silently a full snapshot."""
    source = made_tablet()
    since = source.position
    change(source, random.Random(1), 100)
    path = tmp_path / "snap"
    write_snapshot(source, path, since, chunk_bytes=700)
    partial_path(path).write_bytes(path.read_bytes()[:1500])
    source.purge(source.sequence)
    with pytest.raises(errors.BelowPurgeMark):
        write_snapshot(source, path, since, chunk_bytes=700)


WRITER = textwrap.dedent(
    """
    import sys
    from srengine.snapshot import write_snapshot
    from tests.snapshot.shipping import made_tablet
    write_snapshot(made_tablet(), sys.argv[1], chunk_bytes=700)
    """
)


def run_killed(code: str, point: str, *arguments: object) -> None:
    """Run ``code`` in a process that dies at the failpoint."""
    died = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"SRENGINE_FAILPOINTS": point, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
        capture_output=True,
        timeout=120,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()


@pytest.mark.parametrize(
    "point",
    [
        "snapshot.manifest.written=kill",
        "snapshot.chunk.written=kill@1",
        "snapshot.chunk.written=kill@9",
        "snapshot.trailer.written=kill",
        "snapshot.synced=kill",
        "snapshot.renamed=kill",
    ],
)
def test_a_killed_writer_leaves_the_old_file_and_is_gone_on_with(point, tmp_path):
    """T10, F02: kill -9 of the writer at each step; the previous snapshot stays valid, the next call finishes."""
    path = tmp_path / "snap"
    old = made_tablet(8)
    write_snapshot(old, path)
    run_killed(WRITER, point, path)
    source = made_tablet()
    found = verify_snapshot(path).position
    assert found == (source.position if "renamed" in point else old.position)
    assert partial_path(path).exists() == ("renamed" not in point)
    other = source.copy()
    change(other, random.Random(4), 20)
    assert write_snapshot(other, path, chunk_bytes=700) == other.position
    target = PlainTablet(lineage="fresh")
    apply_snapshot(target, path)
    assert target.records == other.records
    assert [path.name for path in tmp_path.iterdir()] == ["snap"]


def test_an_application_cut_in_the_middle_is_gone_on_with(tmp_path, monkeypatch):
    """F02: a failure between two transactions leaves a marked tablet; the same call finishes it."""
    monkeypatch.setattr("srengine.snapshot.sink.FILL_BYTES", 3000)
    source, target = made_tablet(count=1000), PlainTablet(lineage="fresh")
    write_snapshot(source, tmp_path / "snap", chunk_bytes=700)
    with failpoints.armed("snapshot.fill.after=error@3"), pytest.raises(errors.Error, match="failpoint"):
        apply_snapshot(target, tmp_path / "snap")
    assert target.fill_mark is not None
    filled = len(target.fills)
    with failpoints.armed("snapshot.finish.before=error"), pytest.raises(errors.Error, match="failpoint"):
        apply_snapshot(target, tmp_path / "snap")
    assert apply_snapshot(target, tmp_path / "snap") == source.position
    assert target.records == source.records
    assert filled >= 3


def test_two_writers_of_one_file_are_one_too_many(tmp_path):
    source = made_tablet()
    path = tmp_path / "snap"
    inner: list[errors.Error] = []

    def second():
        source.on_read = None
        with pytest.raises(errors.AlreadyOpen) as caught:
            write_snapshot(source.copy(), path)
        inner.append(caught.value)

    source.on_read = second
    # The first read happens in the constructor's thread or the reader's; either way inside the first writer.
    write_snapshot(source, path)
    assert len(inner) == 1
    assert verify_snapshot(path).position == source.position


def test_names_that_are_no_plain_files_are_refused(tmp_path):
    """F40: no following of links, no directories, no pipes, no missing places."""
    source = made_tablet(count=5)
    write_snapshot(source, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(errors.InvalidValue):
            verify_snapshot(tmp_path / name)
    with pytest.raises(errors.InvalidValue):
        write_snapshot(source, tmp_path / "folder")
    with pytest.raises(errors.NotFound):
        verify_snapshot(tmp_path / "absent")
    with pytest.raises(errors.NotFound):
        write_snapshot(source, tmp_path / "absent" / "snap")
    partial_path(tmp_path / "new").symlink_to(tmp_path / "real")
    before = (tmp_path / "real").read_bytes()
    with pytest.raises(errors.InvalidValue):
        write_snapshot(source, tmp_path / "new")
    assert (tmp_path / "real").read_bytes() == before


def test_a_full_disk_is_named_and_what_was_written_counts(tmp_path):
    """T15: ENOSPC while a snapshot is written is DiskFull; the partial file is gone on with."""
    source = made_tablet()
    path = tmp_path / "snap"
    with failpoints.armed("snapshot.chunk.written=full@4"), pytest.raises(errors.DiskFull):
        write_snapshot(source, path, chunk_bytes=700)
    left = partial_path(path).read_bytes()
    write_snapshot(source, path, chunk_bytes=700)
    assert path.read_bytes().startswith(left)
