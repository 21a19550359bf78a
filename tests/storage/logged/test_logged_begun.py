"""The logged store: a transaction that is begun and finished, with a disk between that takes its time."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest

from srengine import errors
from srengine.storage import fences, logged, wal
from srengine.storage.logged import recover_logged
from srengine.storage.metadata_rows import read_offline
from tests.storage.logged.stores import (
    SMALL,
    Disk,
    begun_and_finished,
    both,
    calls,
    changing,
    check_fenced_for_good,
    crashed,
    fill,
    fill_log,
    is_done,
    log_on,
    opened,
    transactions,
    wait_done,
    waiting,
)

# --- writing without waiting -----------------------------------------------------------------------------------------


def test_what_was_begun_shows_when_it_is_finished(store, tmp_path):
    """F17, T02: between `begin` and `finish` every reader sees what was before, though it may be durable; the
    descriptor can be read from the end of it to `finish`, neither earlier nor later.
    """
    both(store)
    for number in range(3):
        before = {key: store.get("t", key) for key in (b"pending", b"settled", b"new")}
        rows = list(store.scan("t"))
        disk = Disk(store)
        assert not is_done(store)
        assert store.begin(changing("t", {b"pending": b"%d" % number, b"settled": None, b"new": b"%d" % number}))
        for answered in (False, True):
            if answered:
                disk.answer()
                wait_done(store)
            assert is_done(store) == answered
            assert {key: store.get("t", key) for key in before} == before
            assert list(store.scan("t")) == [(row.key, row.value) for row in store.survey("t")] == rows
        store.finish()
        assert not is_done(store)
        assert list(store.scan("t")) == [(b"new", b"%d" % number), (b"pending", b"%d" % number)]
    assert store.begin(changing("other", {b"k": b"v"}))
    assert store.tables() == ["t"]
    store.finish()
    assert store.tables() == ["other", "t"]


def test_what_was_begun_is_one_write_of_the_log(store, tmp_path):
    """A transaction that is begun goes to the log as any other: LMDB is not written, and a crash leaves it."""
    before = transactions(store)
    for number in range(5):
        assert store.begin(changing("t", {b"%d" % number: b"v"}))
        store.finish()
    assert (transactions(store), waiting(store)) == (before, 5)
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert len(list(copy.scan("t"))) == 5


@pytest.fixture
def in_thread():
    """Return a function that enters a context in a thread of its own, where it stays open until the end."""
    with contextlib.ExitStack() as stack:

        def enter(context):
            inside, over = threading.Event(), threading.Event()

            def work():
                with context:
                    inside.set()
                    over.wait()

            thread = threading.Thread(target=work)
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
            inside.wait()

        yield enter


@pytest.mark.parametrize(
    ("prepare", "rows"),
    [
        (lambda store: None, {b"large": bytes(1 << 20)}),
        (fill_log, {b"k": bytes(100)}),
        (lambda store: fill(store, "rows", {b"%d" % number: b"v" for number in range(48)}), {b"1": b"v", b"2": b"v"}),
        (lambda store: fill(store, "rows", {b"k": b"v"}), {b"%02d" % number: b"v" for number in range(49)}),
    ],
    ids=["large", "full", "pending-rows", "rows"],
)
def test_what_has_to_wait_is_not_begun(tmp_path, monkeypatch, prepare, rows):
    """A transaction that belongs into LMDB at once is not begun: `begin` returns False, nothing has happened, and the
    same as a transaction that waits succeeds.
    """
    monkeypatch.setattr(logged, "_PENDING_ROWS_MAX", 49)
    with opened(tmp_path / "store", wal.CAPACITY if b"large" in rows else 4 * SMALL) as store:
        prepare(store)
        before = (store.path / wal.WAL_NAME).read_bytes(), waiting(store), transactions(store)
        assert not store.begin(changing("t", rows))
        assert not is_done(store)
        assert ((store.path / wal.WAL_NAME).read_bytes(), waiting(store), transactions(store)) == before
        assert list(store.scan("t")) == []
        with store.transaction() as transaction:
            transaction.change(changing("t", rows))
        assert (transactions(store), waiting(store)) == (before[2] + 1, 0)
        assert dict(store.scan("t")) == rows
        with begun_and_finished(store, {b"next": b"v"}):
            pass
        assert store.get("t", b"next") == b"v"


def test_nothing_is_begun_beside_another_transaction(store, in_thread):
    """T02: neither while another thread is inside a transaction, nor inside one's own, nor while something was begun:
    `begin` returns False at once and changes nothing, and what came first is not disturbed.
    """

    def refused():
        assert not store.begin(changing("t", {b"refused": b"v"}))

    with store.transaction() as transaction:
        transaction.put("t", b"own", b"v")
        refused()
        transaction.put("t", b"own too", b"v")
    assert len(list(store.scan("t"))) == 2
    with begun_and_finished(store, {b"begun": b"v"}):
        refused()
        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
        refused()
    assert len(list(store.scan("t"))) == 3
    in_thread(store.transaction())
    refused()


def test_nothing_is_begun_beside_what_another_thread_began(store, in_thread):
    """T02: what one thread began is that thread's to finish; another one's `begin` returns False meanwhile."""
    in_thread(begun_and_finished(store, {b"k": b"v"}))
    assert not store.begin(changing("t", {b"k": b"other"}))


def test_what_comes_between_begin_and_finish_is_refused(store, tmp_path):
    """T02: a transaction, or `settle`, of the same thread between `begin` and `finish` is `InvalidValue` and changes
    nothing; what was begun is there afterwards, and so is what comes then.
    """
    both(store)
    place = store._log.place
    with begun_and_finished(store, {b"begun": b"v"}):
        for wrong in (store.settle, lambda: fill(store, "t", {b"k": b"v"})):
            with pytest.raises(errors.InvalidValue):
                wrong()
        assert store._log.place == place
    fill(store, "t", {b"then": b"v"})
    store.settle()
    assert [key for key, _ in read_offline(crashed(store, tmp_path / "copy"), "t")] == [
        b"begun",
        b"pending",
        b"settled",
        b"then",
    ]


def test_a_settle_inside_a_transaction_is_refused(store, tmp_path):
    """T02: it would begin the log again under the transaction: `InvalidValue`, and the transaction goes on."""
    both(store)
    place = store._log.place
    with store.transaction() as transaction:
        transaction.put("t", b"before", b"v")
        with pytest.raises(errors.InvalidValue):
            store.settle()
        transaction.put("t", b"behind", b"v")
    assert (store._log.place, waiting(store)) == (place, 3)
    wanted = [b"before", b"behind", b"pending", b"settled"]
    assert [key for key, _ in store.scan("t")] == wanted
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert [key for key, _ in copy.scan("t")] == wanted


def test_others_wait_for_what_was_begun(store):
    """T02: another thread's transaction, and its settle, begin when what was begun is finished; reading does not
    wait.
    """
    seen = []

    def other():
        fill(store, "t", {b"k": b"second"})
        store.settle()

    with begun_and_finished(store, {b"k": b"first"}):
        writer = threading.Thread(target=other)
        writer.start()
        reader = threading.Thread(target=lambda: seen.append(store.get("t", b"k")))
        reader.start()
        reader.join()
    writer.join()
    assert seen == [None]
    assert (store.get("t", b"k"), waiting(store)) == (b"second", 0)


def test_what_cannot_be_a_record_begins_nothing(store):
    """T02, T04: changes that are none are our caller's mistake: nothing was begun and the store is free."""
    for _ in range(2):
        with pytest.raises(TypeError):
            store.begin([("t", b"k", b"v"), ("t", object(), b"v")])
    assert not is_done(store)
    thread = threading.Thread(target=fill, args=(store, "t", {b"k": b"v"}))
    thread.start()
    thread.join()
    assert list(store.scan("t")) == [(b"k", b"v")]


def test_a_transaction_that_is_over_takes_no_changes(store):
    """T02: neither one by one nor many at a time."""
    with store.transaction() as transaction:
        transaction.change(changing("t", {b"k": b"v"}))
    for late in (
        lambda: transaction.change(changing("t", {b"k": b"late"})),
        lambda: transaction.put("t", b"k", b"late"),
        lambda: transaction.discard("t", b"k"),
    ):
        with pytest.raises(errors.Closed):
            late()
    assert list(store.scan("t")) == [(b"k", b"v")]


def test_finishing_on_a_full_disk_is_tried_again(store, tmp_path):
    """F07: ENOSPC of what was begun is `DiskFull` at `finish`: nothing of it is there, nothing is fenced, and the same
    again succeeds when there is space, begun or not.
    """
    fill(store, "t", {b"k": b"old"})
    for again in ("begin", "transaction"):
        with log_on(store, "/dev/full", os.O_RDWR):
            for _ in range(2):
                assert store.begin(changing("t", {b"k": b"new", b"other": bytes(2000)}))
                wait_done(store)
                with pytest.raises(errors.DiskFull):
                    store.finish()
                assert not is_done(store)
                assert list(store.scan("t")) == [(b"k", b"old")]
        if again == "begin":
            with begun_and_finished(store, {b"k": b"old"}):
                pass
        else:
            fill(store, "t", {b"k": b"newer"})
    assert fences.read_fence(store.path) is None
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert list(copy.scan("t")) == [(b"k", b"newer")]


def test_a_quota_that_is_used_up_at_the_finish(store):
    """F07: EDQUOT is a full disk, too."""
    disk = Disk(store, errno.EDQUOT)
    assert store.begin(changing("t", {b"k": b"v"}))
    disk.answer()
    with pytest.raises(errors.DiskFull):
        store.finish()
    with begun_and_finished(store, {b"k": b"v"}):
        pass
    assert store.get("t", b"k") == b"v"


def test_an_input_output_error_at_the_finish_fences(store):
    """F05: EIO of what was begun is `TabletFenced` at `finish`, durably: nothing is answered, begun or written after
    it, the store closes, and has what was committed once it was proved.
    """
    both(store)
    disk = Disk(store, errno.EIO)
    assert store.begin(changing("t", {b"failed": b"v"}))
    disk.answer()
    with pytest.raises(errors.TabletFenced):
        store.finish()
    assert not is_done(store)
    for call in (*calls(store), lambda: store.begin(changing("t", {b"k": b"v"}))):
        with pytest.raises(errors.TabletFenced):
            call()
    check_fenced_for_good(store)
    recover_logged(store.path)
    with opened(store.path) as again:
        assert [key for key, _ in again.scan("t")] == [b"pending", b"settled"]


@pytest.mark.parametrize("code", [0, errno.ENOSPC, errno.EIO])
def test_closing_finishes_what_was_begun(store, code):
    """T14: what was begun is finished by `close` and there after reopening; if the disk fails then, the store is closed
    all the same and nobody was told anything.
    """
    both(store)
    Disk(store, code)
    assert store.begin(changing("t", {b"begun": b"v"}))
    store.close()
    store.close()
    with pytest.raises(errors.Closed):
        store.begin(changing("t", {b"k": b"v"}))
    assert (fences.read_fence(store.path) is not None) == (code == errno.EIO)
    recover_logged(store.path)
    with opened(store.path) as again:
        found = [key for key, _ in again.scan("t")]
    assert found == ([b"begun"] if code == 0 else []) + [b"pending", b"settled"]
