"""The logged store: what may not be written, who may not write, and disks that are full or fail."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from srengine import errors
from srengine.storage import fences, logged, metadata, wal
from srengine.storage.logged import recover_logged
from srengine.storage.metadata import MetadataStore
from tests.storage.logged.stores import (
    Disk,
    begun_and_finished,
    both,
    calls,
    change,
    changing,
    check_fenced_for_good,
    crashed,
    damage_place,
    damage_wal,
    fenced,
    fill,
    is_done,
    log_on,
    opened,
    wait_done,
    waiting,
)

# --- what LMDB would refuse ------------------------------------------------------------------------------------------


def fill_tables(store, names, *, begins=False):
    wanted = [(name, b"k", b"v") for name in names]
    if begins and store.begin(wanted):
        store.finish()
    else:
        with store.transaction() as transaction:
            change(transaction, wanted)


@pytest.mark.parametrize("many", [1, 2, 7, 62, 63, 100])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("settled", [0, 60])
def test_too_many_tables_are_refused_before_the_log_has_them(path, tmp_path, many, begins, settled):
    """F01, H02: what is acknowledged can be settled and opened again, always: a table beyond the last one is
    `InvalidValue` before anything is written, however many come in one transaction, and nothing of that is there.
    """
    wanted = [f"settled-{number}" for number in range(settled)]
    with opened(path) as store:
        if settled:
            fill_tables(store, wanted)
            store.settle()
        refused = False
        while not refused:
            names = [f"t-{len(wanted) + number}" for number in range(many)]
            try:
                fill_tables(store, names, begins=begins)
                wanted += names
            except errors.InvalidValue:
                refused = True
        assert len(wanted) <= metadata.TABLES_MAX
        assert store.tables() == sorted(wanted)
        with opened(crashed(store, tmp_path / "copy")) as copy:
            assert copy.tables() == sorted(wanted)
        if wanted:
            fill_tables(store, wanted)
        store.settle()
    with opened(path) as store:
        assert store.tables() == sorted(wanted)


@pytest.mark.parametrize("many", [1, 3, 10, 19, 20])
def test_no_more_rows_are_pending_than_one_transaction_takes(path, tmp_path, monkeypatch, many):
    """F01, H02: rows that LMDB would not take at once are never in the log together: they are settled before, and a
    transaction that is too large alone is `InvalidValue` and leaves nothing.
    """
    monkeypatch.setattr(metadata, "TRANSACTION_ROWS_MAX", 21)
    monkeypatch.setattr(logged, "_PENDING_ROWS_MAX", 10)
    with opened(path) as store:
        for number in range(0, 60, many):
            fill(store, "t", {b"%03d" % (number + place): b"v" for place in range(many)})
            assert waiting(store) <= 10
            with opened(crashed(store, tmp_path / str(number))) as copy:
                assert list(copy.scan("t")) == list(store.scan("t"))
        rows = list(store.scan("t"))
        assert len(rows) >= 60
        content = (path / wal.WAL_NAME).read_bytes()
        for _ in range(2):
            with pytest.raises(errors.InvalidValue):
                fill(store, "large", {b"%03d" % place: b"v" for place in range(22)})
        assert (path / wal.WAL_NAME).read_bytes() == content
        assert (store.tables(), list(store.scan("t"))) == (["t"], rows)
        with begun_and_finished(store, {b"next": b"v"}):
            pass
        store.settle()
    with opened(path) as store:
        assert list(store.scan("t")) == sorted([*rows, (b"next", b"v")])


# --- who may not -----------------------------------------------------------------------------------------------------


def test_what_is_closed_refuses(store):
    """T14: nothing is answered and nothing is written after `close`, which may be called again."""
    both(store)
    store.close()
    store.close()
    for call in calls(store):
        with pytest.raises(errors.Closed):
            call()


def test_a_store_that_cannot_settle_is_closed_all_the_same(store, tmp_path, monkeypatch):
    """F07, T14: when a full disk does not let a closing store settle, the log has the rows; the store shows none."""

    def full():
        raise errors.DiskFull("full")

    both(store)
    with monkeypatch.context() as patching:
        patching.setattr(store._store, "transaction", full)
        store.close()
    assert waiting(store) == 1
    for call in calls(store):
        with pytest.raises(errors.Closed):
            call()
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert [key for key, _ in copy.scan("t")] == [b"pending", b"settled"]


def test_a_store_that_is_closed_inside_a_transaction(store):
    """T14: the transaction is `Closed`, not a fault of the disk."""
    with pytest.raises(errors.Closed), store.transaction() as transaction:
        transaction.put("t", b"k", b"v")
        store.close()
    assert fences.read_fence(store.path) is None
    with opened(store.path) as again:
        assert again.tables() == []


def in_child(calls_):
    """Make calls in a forked child; return the codes of their errors."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # one that hangs dies of it, and has told nothing
        try:
            told = []
            for call in calls_:
                try:
                    call()
                    told.append("none")
                except errors.Error as error:
                    told.append(error.code)
            os.write(writer, " ".join(told).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 1000).decode()
    os.close(reader)
    os.waitpid(child, 0)
    return told.split()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_unharmed(store):
    """F18, T14: after a fork the child gets `ForkedEnvironment` from every call, for a pending row, too, and its
    `close` settles nothing; the parent goes on.
    """
    both(store)
    assert in_child([*calls(store), store.close]) == ["FORKED"] * 7 + ["none"]
    fill(store, "t", {b"k": b"again"})
    assert [key for key, _ in store.scan("t")] == [b"k", b"pending", b"settled"]
    assert waiting(store) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_was_forked_inside_a_transaction_writes_nothing(store):
    """F18: the end of a transaction that began before the fork is refused in the child: the log is the parent's."""
    with contextlib.ExitStack() as stack:
        transaction = stack.enter_context(store.transaction())
        transaction.put("t", b"k", b"v")
        before = (store.path / wal.WAL_NAME).read_bytes()
        assert in_child([stack.close]) == ["FORKED"]
        assert (store.path / wal.WAL_NAME).read_bytes() == before
    assert store.get("t", b"k") == b"v"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("has_answered", [False, True])
def test_a_child_that_was_forked_before_the_finish_touches_nothing(store, has_answered):
    """F18: between `begin` and `finish` the child waits for nobody and takes nothing: every call is refused, `close`
    does nothing; the parent finishes, and the byte that tells it is still there.
    """
    both(store)
    disk = Disk(store)
    assert store.begin(changing("t", {b"k": b"of the parent"}))
    if has_answered:
        disk.answer()
        wait_done(store)
    begins = (lambda: store.begin(changing("t", {b"k": b"of the child"})), store.settle, store.finish, store.close)
    assert in_child([*calls(store)[:6], *begins[2:]]) == ["FORKED"] * 7 + ["none"]
    if not has_answered:
        disk.answer()
        wait_done(store)
    assert is_done(store)
    store.finish()
    assert store.get("t", b"k") == b"of the parent"
    assert in_child(begins[:1]) == ["FORKED"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_closes_while_a_thread_of_the_parent_writes(store):
    """F18: whoever held the lock in the parent does not exist in the child, and nobody waits for him there."""
    inside, over = threading.Event(), threading.Event()

    def write():
        with store.transaction() as transaction:
            transaction.put("t", b"k", b"v")
            inside.set()
            over.wait()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        inside.wait()
        assert in_child([store.close, store.close]) == ["none", "none"]
    finally:
        over.set()
        writer.join()
    assert store.get("t", b"k") == b"v"


def test_a_full_disk_is_tried_again(store, tmp_path):
    """F07: ENOSPC of the log is `DiskFull`: nothing of the transaction is there, reading goes on, and the same again,
    or something else, succeeds when there is space; nothing is fenced.
    """
    fill(store, "t", {b"k": b"old"})
    with log_on(store, "/dev/full", os.O_RDWR):
        for _ in range(2):
            with pytest.raises(errors.DiskFull):
                fill(store, "t", {b"k": b"new", b"other": bytes(2000)})
            assert list(store.scan("t")) == [(b"k", b"old")]
    fill(store, "t", {b"k": b"newer"})
    assert list(store.scan("t")) == [(b"k", b"newer")]
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert list(copy.scan("t")) == [(b"k", b"newer")]


def test_a_settle_that_meets_a_full_disk_is_tried_again(store, tmp_path, monkeypatch):
    """F07: when LMDB's side of a settle meets a full disk nothing has happened: everything is pending still, the log
    goes on where it was, whatever crash follows, and the next settle takes all of it.
    """
    inner = store._store.transaction

    @contextlib.contextmanager
    def full():
        with inner() as transaction:
            yield transaction
            raise errors.DiskFull("full")

    both(store)
    place = store._log.place
    with monkeypatch.context() as patching:
        patching.setattr(store._store, "transaction", full)
        for settling in (store.settle, lambda: fill(store, "t", {b"large": bytes(1 << 20)})):
            with pytest.raises(errors.DiskFull):
                settling()
    assert (waiting(store), store._log.place) == (1, place)
    fill(store, "t", {b"then": b"v"})
    wanted = [b"pending", b"settled", b"then"]
    assert [key for key, _ in store.scan("t")] == wanted
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert [key for key, _ in copy.scan("t")] == wanted
    store.settle()
    assert waiting(store) == 0
    with opened(crashed(store, tmp_path / "settled")) as copy:
        assert [key for key, _ in copy.scan("t")] == wanted


def test_a_log_that_cannot_be_written_fences(store):
    """F05: any other error of the log fences the store, durably: it answers and writes nothing any more, does not open,
    and has what was committed once it was proved.
    """
    fenced(store)
    for call in calls(store):
        with pytest.raises(errors.TabletFenced):
            call()
    check_fenced_for_good(store)
    recover_logged(store.path)
    assert fences.read_fence(store.path) is None
    recover_logged(store.path)
    with opened(store.path) as again:
        assert [key for key, _ in again.scan("t")] == [b"pending", b"settled"]


def damage_value(path):
    with MetadataStore(path) as inner:
        inner._environment.change([(inner._tables["t"], b"settled", b"damaged bytes")])


@pytest.mark.parametrize(
    "damage", [damage_wal, damage_value, damage_place, lambda path: (path / wal.WAL_NAME).unlink()]
)
def test_what_does_not_prove_whole_stays_fenced(store, damage):
    """F05: a fence is lifted only when both files are whole, the log as well as every value."""
    fenced(store)
    store.close()
    fences.lift_fence(store.path)
    damage(store.path)
    fences.set_fence(store.path, "io-error", "a fault")
    with pytest.raises(errors.CorruptionError):
        recover_logged(store.path)
    assert fences.read_fence(store.path) is not None


def test_a_store_without_a_log_is_proved_without_one(path):
    """F05: one that was fenced by a version that knew no log can be proved by this one."""
    with MetadataStore(path) as inner, inner.transaction() as transaction:
        transaction.put("t", b"k", b"v")
    fences.set_fence(path, "io-error", "a fault")
    recover_logged(path)
    assert fences.read_fence(path) is None
    with opened(path) as store:
        assert store.get("t", b"k") == b"v"
