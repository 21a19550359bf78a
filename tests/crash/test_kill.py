"""A batch is all or nothing, wherever the process is killed."""

from __future__ import annotations

import shutil
import signal

import pytest

from srengine import storage
from tests.crash import children, record

pytestmark = pytest.mark.crash

RECORDS = 10_000
POINTS = 24

BATCH = """
store = storage.Store(sys.argv[1], map_bytes=1 << 24)
tablet = store.tablet("t")
before = events()
tell(["start", before])
operations = [(0, b"key-%06d" % i, b"new" * 40, 0, 0) for i in range(0, 20000, 2)]
tablet.apply([storage.Batch(storage.encode_operations(operations))])
tell(["acknowledged", events()])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return record.build_recorder(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A store whose tablet holds 10 000 records, half of which the batch will overwrite."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    with storage.Store(path, map_bytes=1 << 24) as store:
        store.tablet("t").put_many([(b"key-%06d" % i, b"old") for i in range(RECORDS)])
    return path


@pytest.fixture(scope="module")
def steps(prepared, library, tmp_path_factory):
    """The numbers of the write and sync calls that the batch makes."""
    path = tmp_path_factory.mktemp("counted") / "data"
    shutil.copytree(prepared, path)
    ended = children.run(BATCH, path, library=library)
    assert ended.code == 0, ended.errors
    (_, before), (_, after) = ended.lines
    assert after - before >= 3, "a batch writes pages, syncs, writes a meta page"
    return range(before + 1, after + 1)


def new_records(path):
    """Return how many records of the batch are in the tablet, which must be sound."""
    with storage.Store(path) as store:
        tablet = store.tablet("t", create=False)
        assert not tablet.verify().damages
        values = dict(tablet.scan())
        tablet.put(b"afterwards", b"writable")
    new = sum(value == b"new" * 40 for value in values.values())
    old = sum(value == b"old" for value in values.values())
    assert new + old == len(values)
    assert (new, old) in {(0, RECORDS), (RECORDS, RECORDS // 2)}, (new, old)
    return new


def test_kill_before_every_write_and_sync_of_a_batch(prepared, library, steps, tmp_path):
    """T02, F01: SIGKILL before each system call by which a batch of 10 000 records reaches the disk (a spread of them
    when there are many): after reopening all of it is there or nothing.

    There are no named failpoints inside a batch, and none are missed: between two of these calls nothing changes that
    outlives the process, so a failpoint anywhere in the batch is the same as the call behind it.
    """
    stride = max(1, len(steps) // POINTS)
    chosen = sorted({*steps[::stride], *steps[-4:], steps[0]})
    seen = []
    for number in chosen:
        path = tmp_path / "data"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(prepared, path)
        ended = children.run(BATCH, path, library=library, kill_at=number)
        assert ended.code == -signal.SIGKILL, (number, ended)
        assert [line[0] for line in ended.lines] == ["start"]
        seen.append(new_records(path))
    assert seen[0] == 0
    assert set(seen) <= {0, RECORDS}


def test_kill_after_the_acknowledgement(prepared, library, tmp_path):
    """T02, F01: once acknowledged, the batch survives SIGKILL."""
    path = tmp_path / "data"
    shutil.copytree(prepared, path)
    ended = children.run(BATCH + "os.kill(os.getpid(), 9)\n", path, library=library)
    assert ended.code == -signal.SIGKILL
    assert ended.told[0] == "acknowledged"
    assert new_records(path) == RECORDS


@pytest.mark.parametrize("code", [0, 5, 28])
def test_a_write_that_fails_in_the_middle_of_a_batch(prepared, library, steps, tmp_path, code):
    """T02, F06: a short write, EIO or a full disk in the middle of a batch leaves nothing of it."""
    source = """
    store = storage.Store(sys.argv[1], map_bytes=1 << 24)
    tablet = store.tablet("t")
    operations = [(0, b"key-%06d" % i, b"new" * 40, 0, 0) for i in range(0, 20000, 2)]
    break_from_now(WRITE, int(sys.argv[2]), at=max(1, int(sys.argv[3]) // 2))
    tell(code_of(lambda: tablet.apply([storage.Batch(storage.encode_operations(operations))])))
    """
    path = tmp_path / "data"
    shutil.copytree(prepared, path)
    ended = children.run(source, path, code, len(steps) - 2, library=library)
    assert ended.told in {"FENCED", "DISK_FULL"}, ended
    fence = next(path.glob("tablets/*/FENCED"), None)
    if fence is not None:
        fence.unlink()
    assert new_records(path) == 0
