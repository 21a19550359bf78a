"""Disks that fail: errors while writing, full and read-only disks, a file cut under the memory map."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from srengine import errors, storage
from srengine.storage import fences, files
from tests.crash import children, record

OPEN = """
store = storage.Store(sys.argv[1], map_bytes=1 << 22)
tablet = store.tablet("t")
def put(n):
    return lambda: tablet.put(b"key-%d" % n, b"value-%d" % n)
put(0)()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return record.build_recorder(tmp_path_factory.mktemp("recorder"))


def tablet_path(path):
    (found,) = (path / "tablets").iterdir()
    return found


def test_a_failed_sync_fences_the_tablet(library, tmp_path):
    """F05, T15: after one EIO of fdatasync nothing more is read or acknowledged, the process lives, and the fence is
    durable: the next start finds it.
    """
    ended = children.run(
        (
            OPEN,
            """
        break_from_now(SYNC, 5)
        tell([code_of(put(1)), code_of(put(2)), code_of(lambda: tablet.get(b"key-0")),
              code_of(lambda: store.tablet("u"))])
        """,
        ),
        tmp_path / "data",
        library=library,
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["FENCED", "FENCED", "FENCED", None]
    with storage.Store(tmp_path / "data") as store:
        with pytest.raises(errors.TabletFenced):
            store.tablet("t")
        assert store.tablet("u").get(b"k") is None


def test_a_fenced_tablet_stays_fenced_until_proved(library, tmp_path):
    """F05, T15: a plain reopen of a fenced tablet is refused; after a read past the page cache that agrees, and a whole
    verify, it opens with every acknowledged write and without the one that failed.
    """
    path = tmp_path / "data"
    ended = children.run((OPEN, "break_from_now(SYNC, 5)\ntell(code_of(put(1)))\n"), path, library=library)
    assert ended.told == "FENCED"
    with storage.Store(path) as store:
        (tablet_id,) = store.tablet_ids()
        with pytest.raises(errors.TabletFenced):
            store.tablet("t")
        with pytest.raises(errors.TabletFenced):
            store.open_tablet(tablet_id)
        store.tablet("other").put(b"k", b"others are not affected")
        tablet = store.recover_tablet(tablet_id)
        assert (tablet.get(b"key-0"), tablet.get(b"key-1")) == (b"value-0", None)
        tablet.put(b"key-2", b"written again")
    with storage.Store(path) as store:
        assert store.tablet("t").get(b"key-2") == b"written again"


def test_a_failed_meta_write_fences_the_tablet(library, tmp_path):
    """F06, T15: EIO while the meta page is written fences the tablet; nothing is acknowledged after it."""
    path = tmp_path / "data"
    ended = children.run(
        (
            OPEN,
            "break_from_now(META, 5)\n",
            "tell([code_of(put(1)), code_of(put(2)), code_of(lambda: tablet.get(b'key-0'))])\n",
        ),
        path,
        library=library,
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["FENCED", "FENCED", "FENCED"]
    assert fences.read_fence(tablet_path(path)) is not None
    with storage.Store(path) as store:
        tablet = store.recover_tablet(store.tablet_ids()[0])
        assert tablet.get(b"key-0") == b"value-0"
        assert not tablet.verify().damages


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_becomes_unwritable_fences(library, tmp_path, code):
    """F16: writes refused in the middle of a run (read-only remount, lost permission) fence the tablet, with the reason
    in a clear message, and never pass for a full disk.
    """
    path = tmp_path / "data"
    ended = children.run(
        (
            OPEN,
            """
        break_from_now(WRITE, int(sys.argv[2]), count=1000)
        try:
            put(1)()
        except errors.Error as error:
            tell([error.code, error.message, code_of(put(2))])
        """,
        ),
        path,
        code,
        library=library,
    )
    assert ended.code == 0, ended.errors
    first, message, second = ended.told
    assert (first, second) == ("FENCED", "FENCED")
    assert "fenced" in message


@pytest.mark.parametrize("short", [False, True])
def test_a_full_disk_is_read_only_and_comes_back_by_itself(library, tmp_path, short):
    """F07, T15: ENOSPC is `DiskFull`, not an input/output error; reads go on; when space returns, writes do, too."""
    ended = children.run(
        (
            OPEN,
            """
        break_from_now(WRITE, 28, count=3)
        first = code_of(put(1))
        read = tablet.get(b"key-0").decode()
        break_from_now(WRITE, 28, at=0)
        tell([first, read, code_of(put(2)), tablet.get(b"key-2").decode(), tablet.get(b"key-1")])
        """,
        ),
        tmp_path / "data",
        library=library,
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["DISK_FULL", "value-0", None, "value-2", None]


@pytest.mark.requires_root
def test_a_small_file_system_that_fills_up(tmp_path):
    """F07, T15: on a 2 MB tmpfs a tablet ends in `DiskFull` and stays readable; deleting a file lets it go on."""
    with children.small_file_system(tmp_path / "small") as mount:
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(700_000))
        with storage.Store(mount / "data", map_bytes=1 << 24) as store:
            tablet = store.tablet("t")
            written = 0
            with pytest.raises(errors.DiskFull):
                while True:
                    tablet.put_many([(b"%d-%d" % (written, i), bytes(1000)) for i in range(50)])
                    written += 1
            assert written > 0
            assert tablet.get(b"0-0") == bytes(1000)
            assert tablet.get(b"%d-0" % written) is None
            with pytest.raises(errors.DiskFull):
                tablet.put_many([(b"again-%d" % i, bytes(1000)) for i in range(50)])
            ballast.unlink()
            tablet.put_many([(b"after-%d" % i, bytes(1000)) for i in range(50)])
            assert tablet.get(b"after-1") == bytes(1000)
            assert not tablet.verify().damages


def test_a_slow_disk_delays_the_acknowledgement_and_not_the_readers(library, tmp_path):
    """F17: while a sync hangs, nothing is acknowledged and readers go on; then the write is acknowledged."""
    ended = children.run(
        (
            OPEN,
            """
        import threading
        break_from_now(SYNC, 0, delay_ms=700)
        order = []
        writer = threading.Thread(target=lambda: (put(1)(), order.append("acknowledged")))
        writer.start()
        while writer.is_alive() and len(order) < 200:
            assert tablet.get(b"key-0") == b"value-0"
            order.append("read")
        writer.join()
        tell([order[:20].count("read"), order.count("acknowledged"), tablet.get(b"key-1").decode()])
        """,
        ),
        tmp_path / "data",
        library=library,
    )
    assert ended.code == 0, ended.errors
    assert ended.told == [20, 1, "value-1"]


def test_a_file_cut_under_the_map_kills_and_leaves_a_fence(tmp_path):
    """T15, F06: SIGBUS on a mapped read ends the process; the marker names the tablet, the next start opens that one
    fenced and every other as usual.
    """
    path = tmp_path / "data"
    ended = children.run(
        """
        store = storage.Store(sys.argv[1], map_bytes=1 << 24)
        store.tablet("other").put(b"k", b"v")
        tablet = store.tablet("t")
        tablet.put_many([(b"key-%05d" % i, bytes(500)) for i in range(5000)])
        tell(tablet.id)
        os.truncate(tablet.path / "data.mdb", 8192)
        sum(1 for _ in tablet.scan())
        """,
        path,
    )
    assert ended.code == -signal.SIGBUS, ended
    with storage.Store(path) as store:
        with pytest.raises(errors.TabletFenced, match="SIGBUS") as caught:
            store.tablet("t")
        assert caught.value.tablet == ended.told
        assert store.tablet("other").get(b"k") == b"v"
        # The fence is not lifted by looking: the file is short, and stays as it is.
        with pytest.raises(errors.TruncatedTablet):
            store.recover_tablet(ended.told)
        with pytest.raises(errors.TabletFenced):
            store.tablet("t")


def test_a_fence_is_kept_while_disk_and_page_cache_disagree(tmp_path, monkeypatch):
    """F05: if what the disk holds is not what the page cache shows, the fence stays and the place is named."""
    with storage.Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        tablet.put(b"k", b"v")
        fences.set_fence(tablet.path, "io-error", "by the test")
        tablet_id = tablet.id
        monkeypatch.setattr(fences, "first_difference", lambda path: 12288)
        with pytest.raises(errors.CorruptionError, match="12288"):
            store.recover_tablet(tablet_id)
        assert fences.read_fence(store.path / "tablets" / tablet_id) is not None
        monkeypatch.undo()
        assert store.recover_tablet(tablet_id).get(b"k") == b"v"
        assert fences.read_fence(store.path / "tablets" / tablet_id) is None


def test_the_page_cache_is_compared_byte_for_byte(tmp_path):
    """F05: the comparison of disk and page cache finds no difference in a synced file and names the first one else."""
    path = tmp_path / "file"
    content = bytes(range(256)) * 9000
    path.write_bytes(content)
    files.sync_file(path)
    assert fences.first_difference(path) is None
    other = tmp_path / "other"
    other.write_bytes(content[:1_500_000] + b"x" + content[1_500_001:])
    with path.open("rb") as cached, other.open("rb") as direct:
        assert fences._compare(path, cached.fileno(), direct.fileno()) == 1_500_000


def test_damage_keeps_the_fence(tmp_path):
    """F05: a fenced tablet whose records do not verify stays fenced."""
    with storage.Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        tablet.put(b"k", b"a value to be found in the file")
        tablet_id, path = tablet.id, tablet.path
    data = path / "data.mdb"
    raw = bytearray(data.read_bytes())
    at = raw.rindex(b"a value to be found")
    while at >= 0:
        raw[at] ^= 1
        at = raw.rfind(b"a value to be found")
    data.write_bytes(raw)
    fences.set_fence(path, "io-error", "by the test")
    with storage.Store(tmp_path / "data") as store:
        with pytest.raises(errors.CorruptionError):
            store.recover_tablet(tablet_id)
        with pytest.raises(errors.TabletFenced):
            store.open_tablet(tablet_id)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"SIGBUS while reading the mapped file\n", b"\xff\xfe", b"{}", b"[1]"]
)
def test_any_marker_is_a_fence(tmp_path, content):
    """T15: whatever a dying process managed to write into the marker, its presence fences."""
    tmp_path.joinpath(fences.FENCE_NAME).write_bytes(content)
    assert fences.read_fence(tmp_path) is not None
    with pytest.raises(errors.TabletFenced):
        fences.refuse_if_fenced(tmp_path, "0" * 32)


def test_the_first_fence_stands(tmp_path):
    """F05: a later fault does not overwrite the reason of the first."""
    fences.set_fence(tmp_path, "io-error", "first")
    fences.set_fence(tmp_path, "sigbus", "second")
    fence = fences.read_fence(tmp_path)
    assert (fence.reason, fence.detail) == ("io-error", "first")
    assert fences.lift_fence(tmp_path)
    assert not fences.lift_fence(tmp_path)


def test_faults_of_one_tablet_do_not_stop_another(library, tmp_path):
    """F05, F06: while one tablet is fenced, writers of another in the same store go on, from several threads."""
    ended = children.run(
        (
            OPEN,
            """
        import threading
        other = store.tablet("other")
        break_from_now(SYNC, 5)
        tell(code_of(put(1)))
        threads = [threading.Thread(target=other.put, args=(b"%d" % n, b"v")) for n in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        tell([len(list(other.scan())), code_of(put(2))])
        """,
        ),
        tmp_path / "data",
        library=library,
    )
    assert ended.lines == ["FENCED", [8, "FENCED"]], ended.errors


MEMORY = """
import resource
def with_memory(bytes_more, action):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + bytes_more, resource.RLIM_INFINITY))
    try:
        action()
    except MemoryError:
        return "MemoryError"
    except errors.Error as error:
        return error.code
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return None
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_no_memory_is_no_fault_of_the_disk(tmp_path):
    """F15: without memory for a transaction or for a larger map a write raises MemoryError and nothing happened; the
    tablet goes on when there is memory, and is not fenced.
    """
    ended = children.run(
        (
            OPEN,
            MEMORY,
            """
            small = storage.Store(sys.argv[1] + "-small", map_bytes=1 << 18).tablet("t")
            pairs = [(b"%06d" % i, b"x" * 3000) for i in range(6000)]
            told = [with_memory(4_000_000 * n, lambda: small.put_many(pairs)) for n in range(1, 4)]
            count = small.count
            small.put_many(pairs)
            tell([told, count, small.count, small.verify().as_dict()["clean"]])
            """,
        ),
        tmp_path / "data",
    )
    assert ended.code == 0, ended.errors
    assert ended.told == [["MemoryError"] * 3, 0, 6000, True]
    with storage.Store(tmp_path / "data-small") as store:
        assert store.tablet("t").count == 6000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_no_memory_for_the_metadata_store(tmp_path):
    """F15: the metadata store without address space for a larger map raises MemoryError, keeps what it had, goes on."""
    ended = children.run(
        (
            MEMORY,
            """
            store = storage.MetadataStore(sys.argv[1], map_bytes=1 << 20)
            def fill():
                with store.transaction() as t:
                    for i in range(400):
                        t.put("t", b"%d" % i, bytes(10_000))
            first = with_memory(1_000_000, fill)
            empty = list(store.scan("t"))
            fill()
            tell([first, len(empty), sum(1 for _ in store.scan("t"))])
            """,
        ),
        tmp_path / "meta",
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["MemoryError", 0, 400]


def test_no_descriptors_left(tmp_path):
    """F15: without file descriptors a store and a tablet are typed errors; with some again everything goes on."""
    ended = children.run(
        """
        import resource
        store = storage.Store(sys.argv[1])
        tablet = store.tablet("open")
        tablet.put(b"k", b"v")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd"))
        codes = []
        for limit in range(used, used + 4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            codes.append(code_of(lambda: store.tablet("another")))
            codes.append(code_of(lambda: storage.Store(sys.argv[1] + "-2")))
            tablet.put(b"k", b"%d" % limit)
            assert tablet.get(b"k") == b"%d" % limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        store.tablet("another").put(b"k", b"v")
        storage.Store(sys.argv[1] + "-2").close()
        tell([codes[0], codes[1], store.names()])
        """,
        tmp_path / "data",
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["ERROR", "ERROR", ["another", "open"]]
    assert storage.verify_directory(tmp_path / "data").clean


def test_a_fenced_tablet_is_proved_without_a_restart(library, tmp_path):
    """F05, T15: the running process closes a fenced tablet, proves it, and goes on with it; what was acknowledged is
    there, the write that failed is not.
    """
    ended = children.run(
        (
            OPEN,
            """
            break_from_now(SYNC, 5)
            first = code_of(put(1))
            again = store.recover_tablet(tablet.id)
            again.put(b"key-2", b"value-2")
            tell([first, tablet.closed, store.tablet("t") is again, sorted(key.decode() for key, _ in again.scan())])
            """,
        ),
        tmp_path / "data",
        library=library,
    )
    assert ended.code == 0, ended.errors
    assert ended.told == ["FENCED", True, True, ["key-0", "key-2"]]


@pytest.mark.parametrize("fault", ["fenced", "truncated", "foreign", "missing"])
def test_a_broken_tablet_is_replaced_by_a_copy(tmp_path, fault):
    """F05, F11: a tablet that does not open any more is seeded again: a proved copy takes its place."""
    seed, tablet_id = b"8 bytes!", "b" * 32
    with storage.Store(tmp_path / "data") as store:
        source = store.create_tablet("a" * 32, seed=seed)
        source.put_many([(b"%d" % i, b"v") for i in range(100)])
        broken = store.create_tablet(tablet_id, lineage=source.lineage, seed=seed)
        broken.put(b"old", b"v")
        data = broken.path / "data.mdb"
    match fault:
        case "fenced":
            fences.set_fence(data.parent, "io-error", "by the test")
        case "truncated":
            os.truncate(data, 8192)
        case "foreign":
            data.write_bytes(bytes(100_000))
        case "missing":
            data.unlink()
    with storage.Store(tmp_path / "data") as store:
        source = store.open_tablet("a" * 32)
        with pytest.raises(errors.Error):
            store.open_tablet(tablet_id)
        stage = store.stage_tablet(tablet_id, seed=seed)
        with source.view() as view:
            stage.fill(view.rows_by_key(None, bytes_max=1 << 20).rows, b"mark")
            stage.finish_fill(view.meta_rows(0), view.state)
        assert store.switch_tablet(stage).position == source.position
    assert storage.verify_directory(tmp_path / "data").clean
