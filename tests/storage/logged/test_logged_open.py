"""The logged store: how it opens, what keeps it shut, and that nothing is left open."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from srengine import errors
from srengine.storage import fences, logged, wal
from srengine.storage.logged import LoggedStore, OfflineRows
from srengine.storage.metadata import MetadataStore
from srengine.storage.metadata_rows import read_offline
from srengine.storage.pages import DATA_NAME
from tests.storage.logged.stores import SMALL, both, changing, crashed, damage_place, damage_wal, fill, opened, waiting

# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_metadata_store_becomes_a_logged_one(path):
    """One that knew no log gets one, and keeps its rows."""
    with MetadataStore(path) as inner:
        for number in range(3):
            with inner.transaction() as transaction:
                transaction.put("t", b"%d" % number, b"v")
    with opened(path) as store:
        assert [key for key, _ in store.scan("t")] == [b"0", b"1", b"2"]
        assert store.tables() == ["t"]
        fill(store, "t", {b"3": b"v"})
    with opened(path) as store:
        assert len(list(store.scan("t"))) == 4


def test_a_log_that_was_made_and_is_not_known_is_made_again(path):
    """F01: a crash between the new file and the row that knows it: the file is nobody's, and is replaced."""
    MetadataStore(path).close()
    wal.WriteAheadLog.create(path, SMALL)
    before = (path / wal.WAL_NAME).stat().st_ino
    with opened(path) as store:
        assert (path / wal.WAL_NAME).stat().st_ino != before
        fill(store, "t", {b"k": b"v"})
        assert store.get("t", b"k") == b"v"


def lose_place(path):
    with MetadataStore(path) as inner, inner.transaction() as transaction:
        transaction.discard("wal", b"place")


@pytest.mark.parametrize("settled", [False, True])
def test_a_log_of_which_the_place_is_lost_is_not_made_again(store, tmp_path, settled):
    """F10, F14: when the row that knows the log is gone and something was ever written to it, what was promised may be
    in it: `CorruptionError` naming it, at every start, and both files stay as they are.
    """
    both(store)
    if settled:
        store.settle()
    copy = crashed(store, tmp_path / "copy")
    lose_place(copy)
    before = {name: (copy / name).read_bytes() for name in (DATA_NAME, wal.WAL_NAME)}
    for _ in range(2):
        with pytest.raises(errors.CorruptionError) as caught:
            LoggedStore.open(copy)
        assert caught.value.file == str(copy / wal.WAL_NAME)
        with pytest.raises(errors.CorruptionError) as caught:
            OfflineRows(copy)
        assert caught.value.file == str(copy / wal.WAL_NAME)
        assert {name: (copy / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nothing"), os.mkfifo, lambda path: path.mkdir()])
def test_what_has_the_name_of_a_new_log_is_not_replaced(path, make):
    """F40: something that is no log, under the name of one that is to be made, is a typed error, waits for nobody, and
    stays.
    """
    MetadataStore(path).close()
    make(path / wal.WAL_NAME)
    kind = (path / wal.WAL_NAME).lstat()
    with pytest.raises(errors.InvalidValue):
        LoggedStore.open(path)
    assert (path / wal.WAL_NAME).lstat() == kind
    assert not (path / "nothing").exists()


def test_what_refuses_to_prepare_keeps_everything_as_it_is(store, tmp_path):
    """F44: ``prepare`` is shown what is settled, before the log is looked at, and what it raises is what `open` raises:
    neither file changes, what is in the log is still there for who may open it.
    """
    both(store)
    copy = crashed(store, tmp_path / "copy")
    before = {name: (copy / name).read_bytes() for name in (DATA_NAME, wal.WAL_NAME)}
    seen = []

    def refuse(inner):
        seen.append(dict(inner.scan("t")))
        raise errors.ForeignData("of somebody else")

    with pytest.raises(errors.ForeignData):
        LoggedStore.open(copy, prepare=refuse)
    assert seen == [{b"settled": b"v"}]
    assert {name: (copy / name).read_bytes() for name in before} == before
    with opened(copy) as again:
        assert [key for key, _ in again.scan("t")] == [b"pending", b"settled"]


@pytest.mark.parametrize("new", [False, True])
def test_a_store_is_prepared_before_it_has_a_log(path, new):
    """F44: as long as ``prepare`` has not returned there is no log beside a store that had none, and none when it
    raises; what it wrote is in LMDB's file by then.
    """
    if not new:
        with MetadataStore(path) as inner, inner.transaction() as transaction:
            transaction.put("t", b"k", b"v")
    seen = []

    def look(inner):
        seen.append((path / wal.WAL_NAME).exists())
        with inner.transaction() as transaction:
            transaction.put("own", b"format", b"%d" % len(seen))
        if len(seen) == 1:
            raise errors.UnsupportedFeature("not yet")

    with pytest.raises(errors.UnsupportedFeature):
        LoggedStore.open(path, prepare=look)
    assert not (path / wal.WAL_NAME).exists()
    LoggedStore.open(path, prepare=look).close()
    assert seen == [False, False]
    assert (path / wal.WAL_NAME).exists()
    assert dict(read_offline(path, "own")) == {b"format": b"2"}


def threads():
    """The threads of this process, those that the interpreter does not know, too."""
    return set(Path("/proc/self/task").iterdir())


def until_gone(before):
    """Wait until no thread is there but those of before: one that was joined is listed for a moment longer."""
    while threads() - before:
        os.sched_yield()


def refuse(*_):
    raise errors.DiskFull("full")


def exhaust(*_):
    raise OSError(errno.EMFILE, "too many open files")


FAILURES = {
    "fenced": lambda path, _: fences.set_fence(path, "io-error", "a fault"),
    "damaged-log": lambda path, _: damage_wal(path),
    "no-log": lambda path, _: (path / wal.WAL_NAME).unlink(),
    "loose-log": lambda path, _: (path / wal.WAL_NAME).chmod(0o640),
    "damaged-place": lambda path, _: damage_place(path),
    "lost-place": lambda path, _: lose_place(path),
    "no-new-log": lambda path, patching: (
        lose_place(path),
        (path / wal.WAL_NAME).unlink(),
        patching.setattr(wal.WriteAheadLog, "create", refuse),
    ),
    "no-record": lambda path, patching: patching.setattr(logged, "_decode", lambda record: ["no change"]),
    "no-pipe": lambda path, patching: patching.setattr(logged, "_pipe", exhaust),
    "no-thread": lambda path, patching: patching.setattr(logged.kernel, "Appender", exhaust),
    "no-settle": lambda path, patching: patching.setattr(LoggedStore, "_settle", refuse),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_does_not_open_leaves_nothing_open(store, tmp_path, monkeypatch, failure):
    """F15: wherever opening fails, no descriptor and no thread is left, and neither file is locked."""
    both(store)
    copy = crashed(store, tmp_path / "copy")
    LoggedStore.open(crashed(store, tmp_path / "other")).close()
    before = sorted(Path("/proc/self/fd").iterdir()), threads()
    with monkeypatch.context() as patching:
        FAILURES[failure](copy, patching)
        for _ in range(2):
            with pytest.raises(ValueError if failure == "no-record" else errors.Error):
                LoggedStore.open(copy)
    with pytest.raises(ZeroDivisionError):
        LoggedStore.open(tmp_path / "new", prepare=lambda _: 1 / 0)
    until_gone(before[1])
    assert sorted(Path("/proc/self/fd").iterdir()) == before[0]


def test_what_was_opened_and_closed_leaves_nothing_open(path):
    """T14: the log, the thread and both ends of its descriptor go with `close`, also when something was begun."""
    before = sorted(Path("/proc/self/fd").iterdir()), threads()
    for number in range(3):
        with opened(path) as store:
            assert len(threads() - before[1]) == 1
            assert store.begin(changing("t", {b"%d" % number: b"v"}))
        until_gone(before[1])
        assert sorted(Path("/proc/self/fd").iterdir()) == before[0]
    assert [key for key, _ in read_offline(path, "t")] == [b"0", b"1", b"2"]


def test_the_log_keeps_its_size(path):
    """``capacity`` is that of a new log: one that is there is opened with its own."""
    with opened(path, SMALL):
        pass
    with opened(path, 2 * SMALL) as store:
        assert store._log.place.capacity == (path / wal.WAL_NAME).stat().st_size == SMALL


def test_every_start_settles(path, tmp_path):
    """F01: what a crash left in the log is in LMDB once the store is open, and a crash right then leaves both sound."""
    with opened(path) as store:
        both(store)
        copy = crashed(store, tmp_path / "copy")
        assert [key for key, _ in read_offline(copy, "t")] == [b"settled"]
        with opened(copy) as again:
            assert waiting(again) == 0
            assert again._log.place.generation == store._log.place.generation + 1
            third = crashed(again, tmp_path / "third")
            assert [key for key, _ in read_offline(third, "t")] == [b"pending", b"settled"]
        with opened(third) as again:
            assert [key for key, _ in again.scan("t")] == [b"pending", b"settled"]


@pytest.mark.parametrize("damage", [damage_wal, lambda path: (path / wal.WAL_NAME).unlink()])
def test_a_store_with_a_damaged_log_does_not_open(store, tmp_path, damage):
    """F10, F11: what is in LMDB is older than what was promised: nothing is shown and nothing changed."""
    both(store)
    copy = crashed(store, tmp_path / "copy")
    damage(copy)
    before = (copy / DATA_NAME).read_bytes()
    for read in (LoggedStore.open, OfflineRows):
        with pytest.raises(errors.CorruptionError) as caught:
            read(copy)
        assert caught.value.file == str(copy / wal.WAL_NAME)
    assert (copy / DATA_NAME).read_bytes() == before


def test_a_file_that_was_put_back_is_noticed(store, tmp_path):
    """F14: LMDB's file from before a settle does not go with the log from behind it."""
    both(store)
    old = crashed(store, tmp_path / "old")
    store.settle()
    fill(store, "t", {b"later": b"v"})
    new = crashed(store, tmp_path / "new")
    shutil.copyfile(old / DATA_NAME, new / DATA_NAME)
    for read in (LoggedStore.open, OfflineRows):
        with pytest.raises(errors.CorruptionError, match="generation"):
            read(new)


@pytest.mark.parametrize(
    "place", [b"", b"x" * 20, wal.Place(1, 1, 0), wal.Place(1, 1, 513), wal.Place(1, 1, 1 << 40)], ids=str
)
def test_a_place_that_is_none_is_damage(path, place):
    """F10: what the store keeps about its log is checked before anything is read or allocated by it."""
    with opened(path) as store:
        both(store)
    with MetadataStore(path) as inner, inner.transaction() as transaction:
        transaction.put("wal", b"place", logged._PLACE.pack(*place) if isinstance(place, wal.Place) else place)
    for read in (LoggedStore.open, OfflineRows):
        with pytest.raises(errors.CorruptionError, match=r"is none|cannot have"):
            read(path)


@pytest.mark.parametrize("record", [b"", b"\xc1", b"\x91\x93\xa1t\xc4\x01k", b"\x91\x92\xa1t\xc4\x01k", b"\x81"])
def test_a_sound_record_that_is_none_is_damage(store, tmp_path, record):
    """F38: what is in the log is decoded strictly; a record of something else is `CorruptionError`."""
    both(store)
    store._log.append(record)
    copy = crashed(store, tmp_path / "copy")
    for read in (LoggedStore.open, OfflineRows):
        with pytest.raises(errors.CorruptionError):
            read(copy)
    store.settle()


def test_a_loose_log_is_refused(path):
    """F52: the log is private, and a refused store leaves nothing open."""
    with opened(path):
        pass
    (path / wal.WAL_NAME).chmod(0o640)
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(errors.UnsafePermissions):
        LoggedStore.open(path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    LoggedStore.open(path, insecure=True).close()
