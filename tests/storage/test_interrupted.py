"""Whatever ends a process or a call in the middle, the tablet opens, and nothing stays locked."""

from __future__ import annotations

import signal
import threading

import pytest

import srengine
from srengine import errors, storage
from tests.crash import children

ROWS = [(b"%06d" % i, b"v" * 100) for i in range(5000)]


@pytest.fixture
def path(tmp_path):
    with storage.Store(tmp_path / "data", map_bytes=1 << 24) as store:
        store.tablet("t").put_many(ROWS)
    return tmp_path / "data"


def check(path, count=5000):
    """The tablet opens, verifies, holds a whole number of batches, and can be written."""
    with storage.Store(path) as store:
        tablet = store.tablet("t", create=False)
        assert not tablet.verify().damages
        rows = dict(tablet.scan())
        tablet.put(b"afterwards", b"writable")
    assert len(rows) % count == 0
    return rows


@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "sys.exit(0)",
        "raise KeyboardInterrupt",
        "os.abort()",
        "os.kill(os.getpid(), 9)",
        "os.kill(os.getpid(), 15)",
    ],
)
@pytest.mark.parametrize(
    "inside",
    [
        "it = tablet.scan(); next(it)",
        "view = tablet.view(); view.get(b'000001')",
        "tablet.put_many(rows(2))",
        "thread = threading.Thread(target=tablet.put_many, args=(rows(2),), daemon=True); thread.start()",
        "stage = store.stage_tablet('0' * 32, seed=b'12345678')",
    ],
)
def test_a_process_that_ends_in_the_middle(path, inside, end):
    """F53: KeyboardInterrupt, os._exit, interpreter shutdown and signals, with views open, threads writing, stages
    begun: the next process opens the tablet, whole.
    """
    ended = children.run(
        (
            """
            import threading
            def rows(n):
                return [(b"%d-%06d" % (n, i), b"v" * 100) for i in range(5000)]
            store = storage.Store(sys.argv[1], map_bytes=1 << 24)
            tablet = store.tablet("t")
            """,
            f"{inside}\n{end}\n",
        ),
        path,
    )
    assert ended.code in {0, 1, -signal.SIGINT, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGTERM}, ended.errors
    assert set(dict(ROWS)) <= set(check(path))


def test_an_exception_in_the_callers_iterator_writes_nothing(path):
    """F53: an exception, Ctrl-C included, in what feeds put_many leaves nothing of it, and the tablet is not locked."""
    with storage.Store(path) as store:
        tablet = store.tablet("t")
        before = tablet.position
        for kind in (RuntimeError, KeyboardInterrupt, GeneratorExit):

            def pairs(kind=kind):
                yield b"half", b"a batch"
                raise kind

            with pytest.raises(kind):
                tablet.put_many(pairs())
        with pytest.raises(TypeError):
            tablet.put_many([(b"half", b"a batch"), (b"k", "text")])
        with pytest.raises(errors.InvalidValue):
            tablet.put_many([(b"half", b"a batch"), (b"", b"v")])
        assert tablet.position == before
        assert tablet.get(b"half") is None
        tablet.put(b"k", b"v")


def test_an_iterator_that_uses_the_tablet(path):
    """F53: what feeds put_many may itself read and write the tablet: no deadlock."""
    with storage.Store(path) as store:
        tablet = store.tablet("t")

        def pairs():
            for i in range(10):
                tablet.put(b"inner-%d" % i, b"v")
                assert tablet.get(b"inner-%d" % i) == b"v"
                yield b"outer-%d" % i, b"v"

        tablet.put_many(pairs())
        assert len(list(tablet.scan(prefix=b"outer-"))) == len(list(tablet.scan(prefix=b"inner-"))) == 10


def test_an_abandoned_scan_pins_nothing_for_ever(path):
    """F53: scans that are left in the middle, and views never closed, do not keep the store from closing."""
    store = storage.Store(path)
    tablet = store.tablet("t")
    kept = []
    for _ in range(50):
        iterator = tablet.scan()
        next(iterator)
        kept.append(iterator)
        kept.append(tablet.view())
    tablet.put(b"k", b"v")
    store.close()
    with pytest.raises(errors.Error):
        list(kept[0])
    check(path, 1)


def test_ctrl_c_while_threads_write(path):
    """F53: SIGINT to a process whose threads write: it ends, every acknowledged batch is whole."""
    ended = children.run(
        """
        import signal, threading
        store = storage.Store(sys.argv[1], map_bytes=1 << 24)
        tablet = store.tablet("t")
        done, lock = [], threading.Lock()
        def write(n):
            for k in range(10_000):
                tablet.put_many([(b"%d-%d-%d" % (n, k, i), b"v") for i in range(50)])
                with lock:
                    done.append((n, k))
                    if len(done) == 40:
                        os.kill(os.getpid(), signal.SIGINT)
        threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(4)]
        try:
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        except KeyboardInterrupt:
            with lock:
                tell(done)
            raise
        """,
        path,
    )
    assert ended.code == -signal.SIGINT, ended
    rows = check(path, 1)
    for n, k in ended.told:
        assert all(b"%d-%d-%d" % (n, k, i) in rows for i in range(50))
    batches = {}
    for key in rows:
        if key.count(b"-") == 2:
            batches.setdefault(key.rsplit(b"-", 1)[0], []).append(key)
    assert {len(keys) for keys in batches.values()} == {50}


def test_closing_while_others_use_it(path):
    """F53: threads that read and write while the store is closed get `Closed` (or an expired view), never a crash."""
    store = storage.Store(path)
    tablet = store.tablet("t")
    unexpected = []
    started = threading.Barrier(5)

    def use(n):
        started.wait()
        try:
            for i in range(100_000):
                tablet.put(b"%d-%d" % (n, i), b"v")
                tablet.get(b"000001")
                with tablet.view() as view:
                    view.get(b"000002")
        except (errors.Closed, errors.ViewExpired):
            return
        except BaseException as error:
            unexpected.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    store.close()
    for thread in threads:
        thread.join()
    assert not unexpected
    check(path, 1)


def test_what_was_being_made_beside_is_removed(tmp_path):
    """F01: a process that was killed while it made a file or a directory under a temporary name opens again."""
    tmp_path.chmod(0o700)
    with srengine.open(tmp_path / "data"):
        pass
    (tmp_path / "data" / ".new-identity.json-1").write_bytes(b"half")
    (tmp_path / "data" / ".new-meta-1" / "deeper").mkdir(parents=True)
    (tmp_path / "data" / ".new-meta-1" / "data.mdb").write_bytes(b"half")
    with srengine.open(tmp_path / "data") as store:
        assert store.names() == []
    assert not list((tmp_path / "data").glob(".new-*"))
