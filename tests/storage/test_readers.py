"""Readers that stay too long, readers that died, maps that others resized."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from srengine import errors, storage
from tests.crash import children


def test_a_long_reader_is_ended_and_the_file_stops_growing(tmp_path):
    """F19: a view that is held under write load is ended at its maximum age, counted, and the file is bounded."""
    with storage.Store(tmp_path / "data", map_bytes=1 << 24, view_age_s_max=0.2) as store:
        tablet = store.tablet("t")
        tablet.put_many([(b"%04d" % i, bytes(400)) for i in range(500)])
        view = tablet.view()
        assert view.get(b"0001") == bytes(400)

        def overwrite():
            tablet.put_many([(b"%04d" % i, bytes(400)) for i in range(500)])

        # Writers alone end it: nobody asks the view meanwhile.
        while not tablet.counters["expired"]:
            overwrite()
        for _ in range(5):
            overwrite()
        bound = tablet.file_bytes
        for _ in range(30):
            overwrite()
        assert tablet.file_bytes <= bound * 1.2
        with pytest.raises(errors.ViewExpired):
            view.get(b"0001")
        view.close()
        assert tablet.counters["pinned"] == 0


def test_slots_of_dead_readers_are_reclaimed(tmp_path):
    """F20: processes that are killed with views open, again and again, leave no slot behind that matters: the store
    opens, opens views, and its file does not grow for their sake.
    """
    path = tmp_path / "data"
    with storage.Store(path, map_bytes=1 << 24) as store:
        store.tablet("t").put_many([(b"%04d" % i, bytes(400)) for i in range(500)])
    source = """
    store = storage.Store(sys.argv[1])
    tablet = store.tablet("t")
    views = [tablet.view() for _ in range(40)]
    os.kill(os.getpid(), 9)
    """
    for _ in range(8):
        assert children.run(source, path).code == -signal.SIGKILL
    with storage.Store(path, map_bytes=1 << 24) as store:
        tablet = store.tablet("t")
        views = [tablet.view() for _ in range(100)]
        for view in views:
            view.close()
        for _ in range(5):
            tablet.put_many([(b"%04d" % i, bytes(400)) for i in range(500)])
        bound = tablet.file_bytes
        for _ in range(20):
            tablet.put_many([(b"%04d" % i, bytes(400)) for i in range(500)])
        assert tablet.file_bytes <= bound * 1.2
        assert not tablet.verify().damages


def test_a_map_that_others_made_larger_is_adopted(tmp_path):
    """F09: a closed tablet whose map another program made larger opens, with what that program knows nothing about
    untouched.
    """
    path = tmp_path / "data"
    with storage.Store(path, map_bytes=1 << 20) as store:
        tablet = store.tablet("t")
        tablet.put(b"k", b"v")
        directory = tablet.path
    source = (
        "import lmdb, sys; e = lmdb.open(sys.argv[1], map_size=1 << 30, max_dbs=16)\n"
        "d = e.open_db(b'of-another')\n"
        "with e.begin(write=True) as t: t.put(b'x', bytes(3_000_000), db=d)\n"
    )
    subprocess.run([sys.executable, "-c", source, str(directory)], check=True)
    with storage.Store(path, map_bytes=1 << 20) as store:
        tablet = store.tablet("t")
        assert tablet.get(b"k") == b"v"
        tablet.put_many([(b"%05d" % i, bytes(1000)) for i in range(3000)])
        assert not tablet.verify().damages


def test_a_deleted_lmdb_lock_file_is_made_again(tmp_path):
    """F09: a closed tablet without lock.mdb, or with garbage in it, opens."""
    path = tmp_path / "data"
    with storage.Store(path) as store:
        tablet = store.tablet("t")
        tablet.put(b"k", b"v")
        lock = tablet.path / "lock.mdb"
    lock.unlink()
    with storage.Store(path) as store:
        assert store.tablet("t").get(b"k") == b"v"
    lock.write_bytes(b"garbage" * 1000)
    with storage.Store(path) as store:
        assert store.tablet("t").get(b"k") == b"v"
        store.tablet("t").put(b"k", b"w")
