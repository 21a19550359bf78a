"""A closed tablet is a plain LMDB 0.9 environment that others read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from srengine import storage

ROWS = [(b"key-%04d" % i, b"value-%d" % i * (i % 40)) for i in range(1500)]

READ = """
import json, lmdb, sys
environment = lmdb.open(sys.argv[1], readonly=True, max_dbs=16, lock=False)
records = environment.open_db(b"records", create=False)
changes = environment.open_db(b"changes", integerkey=True, create=False)
with environment.begin() as t:
    rows = [(key.hex(), value.hex()) for key, value in t.cursor(db=records)]
    log = [(int.from_bytes(key, "little"), value.hex()) for key, value in t.cursor(db=changes)]
print(json.dumps([rows, log]))
"""


@pytest.fixture
def closed(tmp_path):
    """The directory of a closed tablet."""
    with storage.Store(tmp_path / "data", map_bytes=1 << 22) as store:
        tablet = store.tablet("t")
        tablet.put_many(ROWS)
        tablet.delete(b"key-0000")
        return tablet.path


def test_py_lmdb_reads_a_closed_tablet(closed):
    """T17: py-lmdb, in a process of its own, reads every record (its value behind a header of 32 bytes) and the change
    log in order of its sequences.
    """
    told = subprocess.run([sys.executable, "-c", READ, str(closed)], capture_output=True, check=True)
    rows, log = json.loads(told.stdout)
    values = {bytes.fromhex(key): bytes.fromhex(stored)[32:] for key, stored in rows}
    assert values == {**dict(ROWS), b"key-0000": b""}
    sequences = [sequence for sequence, _ in log]
    assert sequences == sorted(set(sequences))
    assert {bytes.fromhex(key) for _, key in log} == {key for key, _ in ROWS}


def test_py_lmdb_leaves_it_as_it_was(closed):
    """T17: being read by others, the tablet verifies and goes on."""
    subprocess.run([sys.executable, "-c", READ, str(closed)], capture_output=True, check=True)
    root = closed.parent.parent
    assert storage.verify_directory(root).clean
    with storage.Store(root) as store:
        tablet = store.tablet("t")
        tablet.put(b"more", b"data")
        assert not tablet.verify().damages


@pytest.mark.requires_tool("mdb_stat")
def test_mdb_stat_reads_a_closed_tablet(closed):
    """T17: Debian's mdb_stat counts what is in it."""
    told = subprocess.run(["mdb_stat", "-a", "-e", str(closed)], capture_output=True, text=True, check=True)
    sections = told.stdout.split("Status of ")
    counts = {part.split("\n", 1)[0]: part for part in sections[1:]}
    assert f"Entries: {len(ROWS)}" in counts["records"]
    assert {"records", "changes", "meta"} <= set(counts)


@pytest.mark.requires_tool("mdb_dump")
def test_mdb_dump_dumps_a_closed_tablet(closed):
    """T17: Debian's mdb_dump prints every record."""
    told = subprocess.run(["mdb_dump", "-s", "records", str(closed)], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in told.stdout.splitlines() if line.startswith(" ")]
    dumped = {
        bytes.fromhex(key): bytes.fromhex(stored)[32:] for key, stored in zip(lines[::2], lines[1::2], strict=True)
    }
    assert dumped == {**dict(ROWS), b"key-0000": b""}
