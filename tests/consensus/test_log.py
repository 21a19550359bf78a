"""The node-wide log: durable by turns, sound or named, cut by rule."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors, failpoints
from srengine.consensus import log as log_module
from srengine.consensus import log_rows as rows
from srengine.consensus.effects import Persist
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState, entry_bytes
from srengine.consensus.log import NodeLog
from srengine.consensus.log_check import check_log
from srengine.storage import fences, pages, wal
from srengine.storage.logged import recover_logged
from srengine.storage.metadata import MetadataStore
from srengine.storage.metadata_rows import read_offline
from srengine.storage.report import VerifyReport
from tests.consensus.logs import FIRST, NODES, Raw, append, entries, entry, filled, read
from tests.crash import children, record
from tests.reference import wal as reference

GROUP = "journal"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


def open_group(path, name=GROUP):
    """Open, take a look at one group, and close."""
    with NodeLog.open(path) as log:
        group = log.group(name)
        return group, read(group) if not (group.damage and group.damage.lost) else []


# --- what is written is there ----------------------------------------------------------------------------------------


def test_what_a_turn_wrote_is_there_after_reopening(path):
    """H02: entries, hard state, terms and configurations of every group survive a reopen."""
    other = Configuration(NODES[:2])
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        log.bootstrap("tablet")
        log.append(
            {
                GROUP: Persist(
                    HardState(3, NODES[0]), (*entries(2, 4), Entry(4, 3, EntryKind.CONFIGURATION, b"", other))
                ),
                "tablet": Persist(HardState(7)),
            }
        )
        append(log, GROUP, entries(5, 8, term=3))
    with NodeLog.open(path) as log:
        assert log.groups() == [GROUP, "tablet"]
        group = log.group(GROUP)
        assert group.damage is None
        assert read(group) == [
            FIRST,
            *entries(2, 4),
            Entry(4, 3, EntryKind.CONFIGURATION, b"", other),
            *entries(5, 8, 3),
        ]
        assert group.hard_state == HardState(3, NODES[0])
        assert (group.floor, group.last_index, group.last_term) == (Floor(), 7, 3)
        assert [group.term_at(index) for index in range(9)] == [0, 1, 1, 1, 3, 3, 3, 3, None]
        assert group.configuration == other
        assert group.floor_at(3) == Floor(3, 1, Configuration(NODES))
        assert group.floor_at(4) == Floor(4, 3, other)
        assert log.group("tablet").hard_state == HardState(7)
        assert log.group("tablet").last_index == 0
        with pytest.raises(errors.NotFound):
            log.group("unknown")


def test_a_turn_of_many_groups_is_one_write_and_one_sync(library, tmp_path):
    """A turn is one write and one sync of the write-ahead log, whatever the number of groups, and nothing of LMDB's
    file.
    """
    ended = children.run(
        (
            WORK,
            """
            names = [f"tablet-{number}" for number in range(50)]
            for name in names:
                log.bootstrap(name)
            before = events()
            log.append({name: Persist(HardState(1), entries(1, 4, 1)) for name in names})
            tell([before, events(), sum(log.group(name).last_index for name in names)])
            """,
        ),
        tmp_path / "log",
        library=library,
        track=TRACKED,
        record=tmp_path / "events",
    )
    assert ended.code == 0, ended.errors
    before, after, appended = ended.told
    assert appended == 150
    events = record.read_events(tmp_path / "events")
    opened = record.paths(events)
    counted = [event for event in events if event.kind != record.OPEN]
    assert [(event.kind, opened[event.file]) for event in counted[before:after]] == [
        (record.WRITE, "wal"),
        (record.SYNC, "wal"),
    ]


def test_entries_are_read_within_their_bounds(path):
    """A reader gets at least one entry, then up to the bytes that it asks for, from memory and from the file alike."""
    items = [FIRST, *(entry(index, data=bytes(index * 100)) for index in range(2, 40))]
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, items[0])
        append(log, GROUP, items[1:])
        cached = ask(log.group(GROUP))
        assert len(log.group(GROUP)._cache) == 39
        assert log.group(GROUP).entries(40, 50, 1000) == ()
        assert log.group(GROUP).entries(0, 2, 1000) == (FIRST,)
    with NodeLog.open(path) as log:
        stored = ask(log.group(GROUP))
        assert not log.group(GROUP)._cache
    assert cached == stored
    for (start, stop, bytes_max), found in cached.items():
        assert list(found) == items[start - 1 : start - 1 + len(found)]
        if start < min(stop, 40):
            assert found
            assert len(found) == 1 or sum(map(entry_bytes, found)) <= bytes_max
            end = start - 1 + len(found)
            assert end + 1 == min(stop, 40) or sum(map(entry_bytes, items[start - 1 : end + 1])) > bytes_max


def ask(group):
    """Return what a group answers to many questions."""
    return {
        (start, stop, bytes_max): group.entries(start, stop, bytes_max)
        for start in (1, 2, 17, 39)
        for stop in (start, start + 1, 30, 40, 100)
        for bytes_max in (0, 1, 1000, 10_000, 1 << 30)
    }


def test_memory_for_entries_is_bounded(path):
    """P6: the entries in memory stay within their bound over all groups; what went is read from the file."""
    names = [f"tablet-{number}" for number in range(5)]
    with NodeLog.open(path, cache_bytes=20_000) as log:
        for name in names:
            log.bootstrap(name)
        for start in range(1, 101, 10):
            for name in names:
                append(log, name, (entry(index, data=bytes(300)) for index in range(start, start + 10)))
                held = sum(entry_bytes(item) for group in names for item in log.group(group)._cache)
                assert held == log._cache_bytes <= 20_000
        assert log.group(names[-1])._cache, "the one that was written last is held"
        for name in names:
            assert [item.index for item in read(log.group(name))] == list(range(1, 101))
        append(log, names[0], [entry(101, data=bytes(50_000))])
        assert log._cache_bytes <= 20_000
        assert log.group(names[0]).entries(101, 102, 0)[0].data == bytes(50_000)


def test_the_first_entry_is_the_same_again_or_a_conflict(path):
    """A group begins once; the same beginning again changes nothing, another one is refused."""
    with NodeLog.open(path) as log:
        group = log.bootstrap(GROUP, FIRST)
        assert group.hard_state == HardState(1)
        append(log, GROUP, entries(2, 4))
        assert log.bootstrap(GROUP, FIRST) is group
        with pytest.raises(errors.Conflict):
            log.bootstrap(GROUP, entry(1))
        assert group.last_index == 3
        with pytest.raises(errors.InvalidValue):
            log.bootstrap("../x")


def test_the_boot_number_is_kept(path):
    """F14: the log carries the boot number of the node, so that a log put back from an earlier start shows."""
    with NodeLog.open(path) as log:
        assert log.boot_number == 0
        log.note_boot(7)
    with NodeLog.open(path) as log:
        assert log.boot_number == 7


def test_another_format_is_refused(path):
    """A log of a newer version is refused with both formats, an environment of somebody else as foreign."""
    filled(path)
    with Raw(path) as raw:
        raw.seal("log", b"format", b"3")
    with pytest.raises(errors.UnsupportedFeature, match=r"'3'.*'2'"):
        NodeLog.open(path)
    with Raw(path) as raw:
        raw.delete("log", b"format")
    with pytest.raises(errors.ForeignData):
        NodeLog.open(path)


@pytest.mark.parametrize("what", ["foreign", "newer", "older"])
def test_a_log_is_known_before_it_gets_a_write_ahead_log(path, what, monkeypatch):
    """F44, F07: what is of somebody else, or of a newer version, is refused and stays as it is, without a write-ahead
    log; one of an older version has the new format before it has one, if there is no room for it, too.
    """

    def full(*_):
        raise errors.DiskFull("full")

    with MetadataStore(path) as store, store.transaction() as transaction:
        transaction.put("log" if what != "foreign" else "theirs", b"format", b"3" if what == "newer" else b"1")
    before = (path / pages.DATA_NAME).read_bytes()
    monkeypatch.setattr(wal.WriteAheadLog, "create", full)
    wanted = {"foreign": errors.ForeignData, "newer": errors.UnsupportedFeature, "older": errors.DiskFull}[what]
    for _ in range(2):
        with pytest.raises(wanted):
            NodeLog.open(path)
        assert sorted(file.name for file in path.iterdir()) == [pages.DATA_NAME, "lock.mdb"]
    if what == "older":
        assert dict(read_offline(path, "log"))[b"format"] == b"2"
    else:
        assert (path / pages.DATA_NAME).read_bytes() == before


def older(path, newer):
    """Make a log as a release without a write-ahead log left it, with the rows of another one."""
    with Raw(newer) as raw, MetadataStore(path) as store, store.transaction() as transaction:
        for table in ("log", "groups", "entries"):
            for key, value in raw.stored(table).items():
                transaction.put(table, key, value[:-8])
        transaction.put("log", b"format", b"1")


def format_in_the_file(path, copy):
    """Return the format that another release would find now, were this process to die."""
    shutil.copytree(path, copy)
    return dict(read_offline(copy, "log"))[b"format"]


def test_a_log_of_an_older_format_is_taken_over(path, tmp_path):
    """H02, F44: a log without a write-ahead log keeps everything and gets one; a release that does not know it finds
    the new format in LMDB's file as soon as the log is open, and refuses.
    """
    filled(tmp_path / "newer", last=9, floor=2)
    with NodeLog.open(tmp_path / "newer") as log:
        log.note_boot(5)
    older(path, tmp_path / "newer")
    assert not (path / wal.WAL_NAME).exists()
    with NodeLog.open(path) as log:
        assert format_in_the_file(path, tmp_path / "copy") == b"2"
        assert log.boot_number == 5
        group = log.group(GROUP)
        assert (group.damage, group.floor.index, group.hard_state) == (None, 2, HardState(1))
        assert read(group) == list(entries(3, 10))
        append(log, GROUP, entries(10, 12))
    group, found = open_group(path)
    assert (group.damage, found) == (None, list(entries(3, 12)))


def test_a_fenced_log_of_an_older_format_is_recovered(path, tmp_path):
    """F05, F44: one that was fenced before the write-ahead log came can be proved without it."""
    filled(tmp_path / "newer", last=9)
    older(path, tmp_path / "newer")
    fences.set_fence(path, "io-error", "a fault")
    recover_logged(path)
    group, found = open_group(path)
    assert (group.damage, len(found)) == (None, 9)


def test_a_new_log_is_of_the_new_format_at_once(path, tmp_path):
    """F44: the format of a new log is in LMDB's file, not in the write-ahead log, before anything else is written."""
    with NodeLog.open(path):
        assert format_in_the_file(path, tmp_path / "copy") == b"2"


def test_turns_that_were_never_settled_are_there_after_a_crash(path, tmp_path):
    """H02, F01: what a process that dies leaves in the write-ahead log alone is read at the next start, in groups that
    LMDB's file does not know yet, too.
    """
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        append(log, GROUP, entries(2, 8), term=1)
        append(log, GROUP, entries(6, 10, term=2), term=2)
        log.trim(GROUP, log.group(GROUP).floor_at(3))
        shutil.copytree(path, tmp_path / "copy")
        assert not list(read_offline(tmp_path / "copy", "entries"))
        with NodeLog.open(tmp_path / "copy") as copy:
            assert copy.group(GROUP).damage is None
            assert copy.group(GROUP).hard_state == HardState(2)
            assert read(copy.group(GROUP)) == read(log.group(GROUP)) == [*entries(4, 6), *entries(6, 10, term=2)]
            assert copy.saved(GROUP) == log.saved(GROUP)


def test_a_damaged_write_ahead_log_is_refused(path, tmp_path):
    """F10: a bit that rots in the write-ahead log is not an end of a group's log: nothing opens."""
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        shutil.copytree(path, tmp_path / "copy")
    with (tmp_path / "copy" / wal.WAL_NAME).open("r+b") as file:
        file.seek(40)
        file.write(b"damage")
    with pytest.raises(errors.CorruptionError) as caught:
        NodeLog.open(tmp_path / "copy")
    assert caught.value.file == str(tmp_path / "copy" / wal.WAL_NAME)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda file: file.mkdir(), lambda file: file.symlink_to(pages.DATA_NAME)],
    ids=["fifo", "directory", "link"],
)
def test_a_write_ahead_log_that_is_no_file_is_refused_and_found(path, make):
    """F40, H28: something else under its name is a typed error at start, and one finding that names it in a check:
    nobody follows it or waits for it.
    """
    filled(path)
    (path / wal.WAL_NAME).unlink()
    make(path / wal.WAL_NAME)
    with pytest.raises(errors.Error, match=str(path / wal.WAL_NAME)):
        NodeLog.open(path)
    report = VerifyReport()
    check_log(path, report)
    [damage] = report.damages
    assert (damage.kind, damage.file) == ("log", "log/wal")
    assert str(path / wal.WAL_NAME) in damage.detail


# --- a turn that is begun --------------------------------------------------------------------------------------------


def wait_done(log):
    select.select([log.done], [], [])


def is_done(log):
    return bool(select.select([log.done], [], [], 0)[0])


class Failing:
    """In the place of the kernel's thread: a disk that fails the next record that is begun."""

    def __init__(self, log, code):
        self._store = log._store
        self._code = code
        self._appender, log._store._appender = log._store._appender, self

    def begin(self, *_):
        os.write(self._store._notify, b"!")

    def take(self):
        self._store._appender = self._appender
        return self._code


def memory(log):
    """Return all that a log holds in memory of its groups."""
    fields = ("floor", "hard_state", "damage", "bytes", "_last", "_highest", "_terms", "_configurations")
    return (
        {
            name: ([getattr(log.group(name), field) for field in fields], log.group(name)._cache)
            for name in log.groups()
        },
        log._cache_bytes,
        list(log._cached),
    )


turns = st.lists(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.booleans(), st.sampled_from([0, 10, 300])),
        min_size=1,
    ),
    max_size=12,
)


@settings(max_examples=20)
@given(turns)
def test_a_turn_that_is_begun_is_one_that_is_appended(tmp_path_factory, turns):
    """H02: `begin` and `finish` leave in memory, with a cache that holds little, and on the disk exactly what `append`
    leaves, for turns of any groups with entries, terms, configurations and votes.
    """
    root = tmp_path_factory.mktemp("logs")
    begun, appended = (NodeLog.open(root / name, cache_bytes=1000) for name in ("begun", "appended"))
    try:
        for log in (begun, appended):
            for name in ("a", "b", "c"):
                log.bootstrap(name, FIRST)
        for number, turn in enumerate(turns):
            wanted = {}
            for name, (count, newer, votes, size) in turn.items():
                group = appended.group(name)
                term = group.hard_state.term + newer
                items = tuple(
                    Entry(index, term, EntryKind.CONFIGURATION, b"", Configuration(NODES[:2]))
                    if index % 4 == 0
                    else entry(index, term, bytes(size))
                    for index in range(group.last_index + 1, group.last_index + 1 + count)
                )
                hard_state = HardState(term, NODES[number % 3]) if votes else HardState(term)
                wanted[name] = Persist(hard_state if newer or votes else None, items)
            before = memory(begun)
            assert begun.begin(wanted)
            assert memory(begun) == before
            begun.finish()
            appended.append(wanted)
            assert memory(begun) == memory(appended)
        begun.close()
        appended.close()
        begun, appended = NodeLog.open(root / "begun"), NodeLog.open(root / "appended")
        assert memory(begun) == memory(appended)
        assert all(log.group(name).damage is None for log in (begun, appended) for name in log.groups())
        assert [read(begun.group(name)) for name in "abc"] == [read(appended.group(name)) for name in "abc"]
    finally:
        begun.close()
        appended.close()
        shutil.rmtree(root)


def test_nothing_of_a_turn_shows_before_it_is_finished(path, tmp_path):
    """H02: between `begin` and `finish` readers see the log as it was, the disk may have the turn or not; then all of
    it at once; after a crash it is there as soon as its end was told.
    """
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        log.bootstrap("tablet")
        before = memory(log)
        assert not is_done(log)
        assert log.begin({GROUP: Persist(HardState(2), entries(2, 5, 2)), "tablet": Persist(HardState(3))})
        wait_done(log)
        assert memory(log) == before
        assert read(log.group(GROUP)) == [FIRST]
        shutil.copytree(path, tmp_path / "copy")
        log.finish()
        assert not is_done(log)
        with NodeLog.open(tmp_path / "copy") as copy:
            for found in (log, copy):
                assert read(found.group(GROUP)) == [FIRST, *entries(2, 5, 2)]
                assert (found.group(GROUP).hard_state, found.group("tablet").hard_state) == (HardState(2), HardState(3))


def refused(log, turn):
    """A turn is not begun, nothing has happened, and `append` takes it."""
    before = memory(log), (log._store.path / wal.WAL_NAME).read_bytes()
    assert not log.begin(turn)
    assert not is_done(log)
    assert (memory(log), (log._store.path / wal.WAL_NAME).read_bytes()) == before
    log.append(turn)
    assert log.begin({name: Persist(HardState(9)) for name in turn})
    log.finish()


def test_a_turn_that_replaces_entries_is_not_begun(path):
    """H28: to cut a suffix is to read and to save it, which waits for the disk: one group that has to makes `begin`
    return False, and nothing of the turn happens before `append` does it.
    """
    filled(path, last=9)
    with NodeLog.open(path) as log:
        log.bootstrap("tablet")
        refused(log, {GROUP: Persist(HardState(2), entries(9, 12, 2)), "tablet": Persist(None, entries(1, 3))})
        assert read(log.group(GROUP)) == [FIRST, *entries(2, 9), *entries(9, 12, 2)]
        assert [saved for _, saved in log.saved(GROUP)] == [entries(9, 10)]
        assert read(log.group("tablet")) == list(entries(1, 3))
    assert open_group(path)[0].damage is None


def test_who_refuses_to_begin_reads_nothing(path, monkeypatch):
    """H28: that a turn replaces entries is known from memory: the event loop asks, and a row may be a disk away."""
    filled(path, last=9)
    with NodeLog.open(path) as log:

        def asked(*_):
            raise AssertionError("the store was read")

        for name in ("get", "scan", "survey"):
            monkeypatch.setattr(log._store, name, asked)
        assert not log.begin({GROUP: Persist(HardState(2), entries(5, 12, 2))})
        monkeypatch.undo()
        log.append({GROUP: Persist(HardState(2), entries(5, 12, 2))})
        assert read(log.group(GROUP)) == [FIRST, *entries(2, 5), *entries(5, 12, 2)]


def test_a_turn_over_damaged_entries_is_not_begun(path):
    """H28: entries that take the place of those behind a damaged one save them as well."""
    filled(path, last=9)
    with Raw(path) as raw:
        raw.delete("entries", key_of(7))
    with NodeLog.open(path) as log:
        assert log.group(GROUP).last_index == 6
        refused(log, {GROUP: Persist(HardState(2), entries(7, 8, 2))})
        assert [saved for _, saved in log.saved(GROUP)] == [entries(8, 10)]


def test_a_turn_for_which_there_is_no_room_is_not_begun(path):
    """A turn that settles goes to LMDB, which waits: `append` does it."""
    with NodeLog.open(path, wal_bytes=4096) as log:
        log.bootstrap(GROUP, FIRST)
        refused(log, {GROUP: Persist(HardState(2), [entry(2, 2, bytes(5000))])})
    assert open_group(path)[0].last_index == 2


@pytest.mark.parametrize("point", ["log.append.written", "log.append.committed"])
def test_a_turn_that_is_to_break_is_not_begun(path, point):
    """F01: while a named place inside a turn is armed every turn passes it; another place does not matter."""
    turn = {GROUP: Persist(HardState(2), entries(2, 4, 2))}
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        with failpoints.armed("log.trim.step=error"):
            assert log.begin({GROUP: Persist(HardState(1, NODES[0]))})
            log.finish()
        with failpoints.armed(f"{point}=error"):
            assert not log.begin(turn)
            with pytest.raises(OSError, match="failpoint"):
                log.append(turn)
    assert open_group(path)[0].last_index == (1 if point == "log.append.written" else 3)


def test_what_comes_between_begin_and_finish_of_a_turn_is_refused(path):
    """T02: until a turn is finished the log takes nothing else in this thread: a second one is not begun, whatever
    waits is `InvalidValue`; the first is not disturbed.
    """
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        assert log.begin({GROUP: Persist(None, entries(2, 4))})
        assert not log.begin({GROUP: Persist(HardState(7))})
        for wrong in (
            lambda: log.append({GROUP: Persist(HardState(7))}),
            lambda: log.note_boot(7),
            lambda: log.bootstrap("tablet"),
            lambda: log.trim(GROUP, log.group(GROUP).floor_at(1)),
        ):
            with pytest.raises(errors.InvalidValue):
                wrong()
        log.finish()
        assert (log.groups(), log.boot_number) == ([GROUP], 0)
        assert read(log.group(GROUP)) == [FIRST, *entries(2, 4)]
        assert log.group(GROUP).hard_state == HardState(1)
    group, found = open_group(path)
    assert (group.damage, found) == (None, [FIRST, *entries(2, 4)])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_turn_that_fails_at_its_finish_leaves_nothing_of_it(path, code):
    """F05, F07: `finish` raises as `append`: `DiskFull`, nothing happened and the same turn succeeds afterwards; or
    `TabletFenced`, durably, and nothing is written any more.
    """
    turn = {GROUP: Persist(HardState(2), entries(2, 6, 2))}
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        before = memory(log)
        Failing(log, code)
        assert log.begin(turn)
        with pytest.raises(errors.DiskFull if code == errno.ENOSPC else errors.TabletFenced):
            log.finish()
        assert memory(log) == before
        assert not is_done(log)
        if code == errno.ENOSPC:
            assert log.begin(turn)
            log.finish()
            assert read(log.group(GROUP)) == [FIRST, *entries(2, 6, 2)]
        else:
            for again in (log.begin, log.append):
                with pytest.raises(errors.TabletFenced):
                    again(turn)
    assert (fences.read_fence(path) is not None) == (code == errno.EIO)
    recover_logged(path)
    group, found = open_group(path)
    assert (group.damage, len(found)) == (None, 5 if code == errno.ENOSPC else 1)


def test_closing_a_log_finishes_the_turn_that_was_begun(path):
    """T14: a turn that was begun is there after `close`."""
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        assert log.begin({GROUP: Persist(HardState(2), entries(2, 4, 2))})
    group, found = open_group(path)
    assert (group.damage, group.hard_state, len(found)) == (None, HardState(2), 3)


def test_a_turn_is_begun_while_the_disk_does_not_answer(library, tmp_path):
    """F17: with a sync that takes two seconds `begin` returns before the disk has answered: the descriptor cannot be
    read and nothing of the turn shows; whoever waits for the descriptor waits for the disk, and sees it at `finish`.
    """
    ended = children.run(
        (
            WORK,
            """
            import select
            before = events()
            break_from_now(SYNC, 0, delay_ms=2000)
            begun = log.begin({"journal": Persist(HardState(2), entries(2, 4, 2))})
            early = [len(select.select([log.done], [], [], 0)[0]), group.last_index, group.hard_state.term]
            late = [len(select.select([log.done], [], [])[0]), events() - before, group.last_index]
            log.finish()
            tell([begun, early, late, group.last_index, group.hard_state.term])
            """,
        ),
        tmp_path / "log",
        library=library,
        track="wal",
    )
    assert ended.told == [True, [0, 1, 1], [1, 2, 1], 3, 2], ended.errors


def test_a_process_whose_disk_hangs_can_end(library, tmp_path):
    """F17: a log that nobody closes does not keep its process from ending, though its thread waits for the disk (here
    ten minutes); nobody was told anything, and what is there is sound.
    """
    path = tmp_path / "log"
    ended = children.run(
        (
            WORK,
            """
            import gc
            break_from_now(SYNC, 0, delay_ms=600_000)
            assert log.begin({"journal": Persist(HardState(2), entries(2, 4, 2))})
            del log, group
            gc.collect()
            tell("not closed")
            """,
        ),
        path,
        library=library,
        track="wal",
    )
    assert (ended.code, ended.told) == (0, "not closed"), ended.errors
    group, found = open_group(path)
    assert group.damage is None
    assert len(found) in {1, 3}


# --- cut by rule -----------------------------------------------------------------------------------------------------


def test_a_conflicting_suffix_is_cut_and_saved(path):
    """H28: entries in whose place a leader's come are truncated, a copy of them is kept, and the log goes on."""
    filled(path, last=9)
    with NodeLog.open(path) as log:
        append(log, GROUP, entries(6, 8, term=4), term=4)
        group = log.group(GROUP)
        assert read(group) == [FIRST, *entries(2, 6), *entries(6, 8, 4)]
        assert [group.term_at(index) for index in (5, 6, 7, 8)] == [1, 4, 4, None]
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        assert group.damage is None
        assert read(group) == [FIRST, *entries(2, 6), *entries(6, 8, 4)]
        [(suffix, saved)] = log.saved(GROUP)
        assert saved == entries(6, 10)
        assert (suffix.first_index, suffix.last_index, suffix.complete, suffix.damaged) == (6, 9, True, 0)


def test_a_cut_takes_configurations_back(path):
    """A configuration that is cut off is in force no more."""
    filled(path, last=3)
    added = Configuration((*NODES, "d" * 32))
    with NodeLog.open(path) as log:
        append(log, GROUP, [Entry(4, 1, EntryKind.CONFIGURATION, b"", added), entry(5)])
        assert log.group(GROUP).configuration == added
        append(log, GROUP, [entry(4, 2)], term=2)
        assert log.group(GROUP).configuration == Configuration(NODES)
    group, _ = open_group(path)
    assert group.configuration == Configuration(NODES)


def test_saved_suffixes_are_bounded(path, monkeypatch):
    """P6: of what was cut off only so much is kept, the newest; a larger one is kept in part and says so."""
    monkeypatch.setattr(log_module, "SAVED_SUFFIXES_MAX", 3)
    monkeypatch.setattr(log_module, "SAVED_BYTES_MAX", 5_000)
    filled(path, last=3)
    with NodeLog.open(path) as log:
        for term in range(2, 8):
            append(log, GROUP, entries(4, 8, term), term=term)
        assert [saved[0].term for _, saved in log.saved(GROUP)] == [4, 5, 6]
        append(log, GROUP, [entry(index, 8, bytes(400)) for index in range(4, 30)], term=8)
        append(log, GROUP, entries(4, 5, 9), term=9)
        [(suffix, saved)] = log.saved(GROUP)
        assert not suffix.complete
        assert suffix.last_index == 29
        assert 0 < sum(map(entry_bytes, saved)) <= 6_000
        assert [item.index for item in saved] == list(range(4, 4 + len(saved)))


def test_a_trim_leaves_a_floor(path):
    """Entries up to the floor go; what stands in for them is the floor, with its configuration; the rest stays."""
    filled(path, last=3)
    added = Configuration((*NODES, "d" * 32))
    with NodeLog.open(path) as log:
        append(log, GROUP, [Entry(4, 2, EntryKind.CONFIGURATION, b"", added), *entries(5, 3000, 3)], term=3)
        group = log.group(GROUP)
        before = group.bytes
        log.trim(GROUP, group.floor_at(2500))
        assert group.floor == Floor(2500, 3, added)
        assert [item.index for item in read(group)] == list(range(2501, 3000))
        assert group.term_at(2500) == 3
        assert group.term_at(2499) is None
        assert group.configuration == added
        assert 0 < group.bytes < before
        left = group.bytes
    group, found = open_group(path)
    assert group.damage is None
    assert group.floor == Floor(2500, 3, added)
    assert [item.index for item in found] == list(range(2501, 3000))
    assert group.bytes == left
    with Raw(path) as raw:
        assert len(raw.stored("entries")) == 499


def test_a_trim_reads_no_entries(path, monkeypatch):
    """What goes is known without reading it: entries cost a trim next to nothing. The first one after an opening looks,
    for what a damage may have left below the floor.
    """
    filled(path, last=99)
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        surveyed = []
        survey = log._store.survey
        monkeypatch.setattr(log._store, "survey", lambda *given: surveyed.append(given) or survey(*given))
        log.trim(GROUP, group.floor_at(10))
        assert len(surveyed) == 1
        log.trim(GROUP, group.floor_at(90))
        assert len(surveyed) == 1
        assert [item.index for item in read(group)] == list(range(91, 100))
    with Raw(path) as raw:
        assert len(raw.stored("entries")) == 9


def test_a_trim_takes_what_a_damage_left_below_the_floor(path):
    """A row at or below the floor is found, believed by nobody, and goes with the first trim."""
    filled(path, last=9)
    with Raw(path) as raw:
        left = dict(list(raw.stored("entries").items())[:2])
    with NodeLog.open(path) as log:
        log.trim(GROUP, log.group(GROUP).floor_at(4))
    with Raw(path) as raw:
        for key, stored in left.items():
            raw.put("entries", key, stored)
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        before = group.bytes
        log.trim(GROUP, group.floor_at(6))
        assert [item.index for item in read(group)] == [7, 8, 9]
        assert 0 < group.bytes < before
    with Raw(path) as raw:
        assert len(raw.stored("entries")) == 3


def test_a_trim_to_the_last_entry_leaves_nothing_but_the_floor(path):
    """A log that is trimmed whole goes on behind its floor."""
    filled(path, last=5, floor=5)
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        assert (group.last_index, group.last_term, group.term_at(5), read(group)) == (5, 1, 1, [])
        append(log, GROUP, entries(6, 8))
    group, found = open_group(path)
    assert group.damage is None
    assert [item.index for item in found] == [6, 7]


@pytest.mark.parametrize("floor", [3, 4])
def test_an_installed_state_that_matches_leaves_what_follows(path, floor):
    """Design rule 9: entries after the installed index stay when the entry at it has its term."""
    filled(path, last=9, floor=2)
    with NodeLog.open(path) as log:
        log.install(GROUP, log.group(GROUP).floor_at(floor))
        assert [item.index for item in read(log.group(GROUP))] == list(range(floor + 1, 10))
    group, found = open_group(path)
    assert group.damage is None
    assert [item.index for item in found] == list(range(floor + 1, 10))


@pytest.mark.parametrize("floor", [Floor(6, 2, Configuration(NODES)), Floor(20, 1, Configuration(NODES))])
def test_an_installed_state_that_does_not_match_begins_the_log_again(path, floor):
    """Design rule 9: else the log restarts there; what lay beyond it is saved."""
    filled(path, last=9, floor=2)
    with NodeLog.open(path) as log:
        log.append({GROUP: Persist(HardState(2))})
        log.install(GROUP, floor)
        group = log.group(GROUP)
        assert (group.floor, group.last_index, group.last_term, read(group)) == (floor, floor.index, floor.term, [])
        assert group.configuration == floor.configuration
        saved = [item.index for _, items in log.saved(GROUP) for item in items]
        assert saved == list(range(floor.index + 1, 10))
        append(log, GROUP, entries(floor.index + 1, floor.index + 3, 2))
    group, found = open_group(path)
    assert group.damage is None
    assert found == list(entries(floor.index + 1, floor.index + 3, 2))


def test_an_installed_state_below_the_floor_changes_nothing(path):
    """Design rule 9: a state that is older than the log's floor is no news."""
    filled(path, last=9, floor=5)
    with NodeLog.open(path) as log:
        log.install(GROUP, Floor(4, 9))
        assert log.group(GROUP).floor.index == 5
        assert log.group(GROUP).last_index == 9


# --- damage is found and named ---------------------------------------------------------------------------------------


def key_of(index, name=GROUP):
    return rows.entry_key(rows.group_range(name)[0], index)


def check_damaged(path, index, kind, *, last=9):
    """A log damaged at ``index`` opens with everything before it and nothing from it on, and says so."""
    group, found = open_group(path)
    assert group.damage is not None
    assert (group.damage.index, group.damage.kind) == (index, kind)
    assert group.damage.last_index == last
    assert not group.damage.lost
    assert group.last_index == index - 1
    assert found == [FIRST, *entries(2, index)][: index - 1]
    # And it is not forgotten.
    assert open_group(path)[0].damage == group.damage


def test_a_flip_in_any_byte_of_an_entry_is_found(path):
    """F10, H28: whatever byte of a stored entry is damaged, it is named and the log ends before it."""
    filled(path, last=9)
    with Raw(path) as raw:
        stored = raw.stored("entries")[key_of(5)]
    assert len(stored) > 48
    for position in range(len(stored)):
        damaged = bytearray(stored)
        damaged[position] ^= 1 << position % 8
        with Raw(path) as raw:
            raw.put("entries", key_of(5), bytes(damaged))
        check_damaged(path, 5, "entry")
        with Raw(path) as raw:
            raw.put("entries", key_of(5), stored)
            raw.delete("groups", rows.group_key(GROUP, rows.DAMAGE))
    assert open_group(path)[0].damage is None


def test_a_flip_in_the_file_is_found(path):
    """F10: a bit that rots in the file itself shows at start: as a damaged entry, or as a damaged page."""
    with NodeLog.open(path) as log:
        log.bootstrap(GROUP, FIRST)
        append(log, GROUP, [*entries(2, 5), entry(5, data=b"find me in the file" * 3), *entries(6, 10)])
    data = path / pages.DATA_NAME
    raw = bytearray(data.read_bytes())
    at = raw.rfind(b"find me in the file")
    raw[at + 4] ^= 4
    data.write_bytes(raw)
    check_damaged(path, 5, "entry")


def test_a_damaged_page_is_named(path):
    """F10: damage in LMDB's own structure is found before LMDB sees it."""
    filled(path, last=200)
    data = path / pages.DATA_NAME
    raw = bytearray(data.read_bytes())
    with pages.PageFile(data) as file:
        root = file.tables()["entries"].root
    raw[root * 4096 + 10] ^= 0xFF  # the flags of the tree's root
    data.write_bytes(raw)
    with pytest.raises(errors.CorruptionError) as caught:
        NodeLog.open(path)
    assert caught.value.page is not None


def test_a_missing_entry_is_found(path):
    """H28: an entry that is not there any more is named; what follows it is not believed."""
    filled(path, last=9)
    with Raw(path) as raw:
        raw.delete("entries", key_of(4))
    check_damaged(path, 4, "missing-entry")


@pytest.mark.parametrize("lost", [1, 3, 9])
def test_a_cut_tail_is_found(path, lost):
    """H28: a log that ends before the last entry that was written is not taken for a shorter one."""
    filled(path, last=9)
    with Raw(path) as raw:
        for index in range(10 - lost, 10):
            raw.delete("entries", key_of(index))
    check_damaged(path, 10 - lost, "missing-entry")


def test_a_duplicated_entry_is_found(path):
    """An entry in the place of another is damage, with its own check and with a right one for the place."""
    filled(path, last=9)
    with Raw(path) as raw:
        raw.put("entries", key_of(6), raw.stored("entries")[key_of(5)])
    check_damaged(path, 6, "entry")
    with Raw(path) as raw:
        raw.seal("entries", key_of(6), raw.stored("entries")[key_of(5)][:-8])
        raw.delete("groups", rows.group_key(GROUP, rows.DAMAGE))
    check_damaged(path, 6, "replaced-entry")


def test_a_replaced_tail_is_found(path):
    """H28: entries of another history, each sound in itself, are not taken for the ones that were written."""
    filled(path, last=9)
    other = path.parent / "other"
    with NodeLog.open(other) as log:
        log.bootstrap(GROUP, FIRST)
        append(log, GROUP, [*entries(2, 7), *(entry(index, data=b"another") for index in range(7, 10))])
    with Raw(other) as raw:
        theirs = raw.stored("entries")
    with Raw(path) as raw:
        for index in (7, 8, 9):
            raw.put("entries", key_of(index), theirs[key_of(index)])
    # Where the two part is not known: the chain up to the tail is not the one that was written.
    group, found = open_group(path)
    assert (group.damage.kind, group.damage.index, group.last_index, found) == ("replaced-entry", 1, 0, [])


def test_entries_beyond_the_tail_are_found(path):
    """An entry that no turn wrote is not believed."""
    filled(path, last=9)
    other = path.parent / "other"
    filled(other, last=11)
    with Raw(other) as raw:
        theirs = raw.stored("entries")
    with Raw(path) as raw:
        raw.put("entries", key_of(10), theirs[key_of(10)])
    group, _ = open_group(path)
    assert group.damage.kind == "tail"


@pytest.mark.parametrize("how", ["flip", "delete"])
@pytest.mark.parametrize("letter", [rows.TAIL, rows.FLOOR, rows.HARD_STATE])
def test_damage_of_a_groups_own_rows_is_found(path, letter, how):
    """H28: a tail, floor or hard state that is damaged or gone is named; without its hard state a node is lost."""
    filled(path, last=9, floor=2)
    with Raw(path) as raw:
        key = rows.group_key(GROUP, letter)
        if how == "delete":
            raw.delete("groups", key)
        else:
            stored = bytearray(raw.stored("groups")[key])
            stored[3] ^= 16
            raw.put("groups", key, bytes(stored))
    group, found = open_group(path)
    kinds = {rows.TAIL: "tail", rows.FLOOR: "floor", rows.HARD_STATE: "hard-state"}
    assert group.damage.kind == kinds[letter]
    assert group.damage.lost == (letter == rows.HARD_STATE)
    if letter == rows.TAIL:
        assert found == list(entries(3, 10)), "each entry is sound, only whether they are all is not known"
    if letter == rows.FLOOR:
        assert (found, group.floor, group.last_index) == ([], Floor(), 0)


def test_a_hard_state_that_is_older_than_the_entries_is_lost(path):
    """H28: a term below that of the entries says that votes may be forgotten, too."""
    filled(path, last=3)
    with NodeLog.open(path) as log:
        append(log, GROUP, entries(4, 6, 5), term=5)
    with Raw(path) as raw:
        raw.seal("groups", rows.group_key(GROUP, rows.HARD_STATE), rows.encode_hard_state(HardState(4)))
    with NodeLog.open(path) as log:
        assert log.group(GROUP).damage.lost
        with pytest.raises(errors.CorruptionError):
            log.heal(GROUP)


def test_damage_of_one_group_leaves_the_others_alone(path):
    """F10: the log of another group opens as if nothing was."""
    filled(path, last=9)
    with NodeLog.open(path) as log:
        log.bootstrap("tablet")
        append(log, "tablet", entries(1, 4), term=1)
    with Raw(path) as raw:
        raw.delete("entries", key_of(4))
    with NodeLog.open(path) as log:
        assert log.group(GROUP).damage is not None
        assert log.group("tablet").damage is None
        append(log, "tablet", entries(4, 6))
        assert log.group("tablet").last_index == 5


def test_damage_is_overwritten_by_rule_saved_and_remembered_until_it_is_healed(path):
    """H28: a leader's entries take the place of the bad ones, which are saved, the unreadable too; the mark stays over
    restarts until the node has caught up.
    """
    filled(path, last=9)
    with Raw(path) as raw:
        stored = bytearray(raw.stored("entries")[key_of(7)])
        stored[40] ^= 1
        raw.put("entries", key_of(7), bytes(stored))
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        assert group.last_index == 6
        append(log, GROUP, entries(7, 9), term=2)
        assert read(group) == [FIRST, *entries(2, 9)]
        [(suffix, saved)] = log.saved(GROUP)
        assert saved == entries(8, 10)
        assert suffix.damaged == 1
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        assert group.damage.index == 7
        assert group.damage.last_index == 9
        assert read(group) == [FIRST, *entries(2, 9)]
        log.heal(GROUP)
        assert group.damage is None
        log.heal(GROUP)
    group, found = open_group(path)
    assert group.damage is None
    assert found == [FIRST, *entries(2, 9)]


@pytest.mark.parametrize("letter", [rows.TAIL, rows.FLOOR])
def test_healing_writes_the_rows_that_were_damaged(path, letter):
    """H28: after a state was put in place and the mark is lifted nothing of the damage is left."""
    filled(path, last=9, floor=2)
    with Raw(path) as raw:
        raw.put("groups", rows.group_key(GROUP, letter), b"damaged")
    with NodeLog.open(path) as log:
        log.install(GROUP, Floor(12, 1, Configuration(NODES)))
        log.heal(GROUP)
    group, found = open_group(path)
    assert (group.damage, group.floor.index, found) == (None, 12, [])
    with Raw(path) as raw:
        assert not raw.stored("entries")


def test_healing_saves_what_lies_beyond(path):
    """H28: when the leader's log ends where the sound part does, the rest is saved and taken off by healing."""
    filled(path, last=9)
    with Raw(path) as raw:
        raw.delete("entries", key_of(7))
    with NodeLog.open(path) as log:
        log.heal(GROUP)
        assert log.saved(GROUP)[0][1] == entries(8, 10)
    group, found = open_group(path)
    assert group.damage is None
    assert found == [FIRST, *entries(2, 7)]


def test_an_entry_damaged_while_the_log_is_open_is_an_error(path):
    """F10: a reader never gets damaged bytes, also when they rot after the start."""
    filled(path, last=9)
    with NodeLog.open(path) as log:
        store = log._store._store
        store._environment.change([(store._tables["entries"], key_of(5), b"damaged bytes")])
        with pytest.raises(errors.CorruptionError):
            log.group(GROUP).entries(4, 7, 1000)


def test_documented_vectors():
    """The byte vectors in docs/formats-log.md are what is written."""
    text = (Path(__file__).parents[2] / "docs" / "formats-log.md").read_text()
    found = dict(re.findall(r"<!-- vector: ([a-z-]+) -->\n```\n(.*?)\n```", text))
    chain = rows.first_chain(GROUP, Floor())
    changes = []
    tail, sizes = rows.put_entries(changes, b"g\0", [Entry(1, 3, EntryKind.COMMAND, b"data")], chain)
    [(table, key, value)] = changes
    assert (table, key, sizes) == (rows.ENTRIES, rows.entry_key(b"g\0", 1), [len(value)])
    record = msgspec.msgpack.encode([("t", b"k", None)])
    [sector] = reference.sectors(record, first=0, identity=5, generation=1, number=0)
    assert not any(sector[48:])
    assert found == {"chain": chain.hex(), "entry": value.hex(), "sector": sector[:48].hex()}
    assert tail == rows.Place(1, 3, rows.chain_of(value))


# --- any history -----------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6), st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.just("trim"), st.integers(0, 10)),
        st.tuples(st.just("install"), st.integers(0, 15), st.booleans()),
        st.tuples(st.just("vote"), st.sampled_from(NODES)),
        st.tuples(st.just("reopen")),
    ),
    max_size=25,
)


class Model:
    """A group's log as plain Python: a dict of entries and a floor."""

    def __init__(self):
        self.entries = {1: FIRST}
        self.floor = Floor()
        self.hard_state = HardState(1)

    @property
    def last(self):
        return max(self.entries, default=self.floor.index)

    def term_at(self, index):
        if index == self.floor.index:
            return self.floor.term
        return self.entries[index].term if index in self.entries else None

    def configuration_at(self, index):
        found = [
            item.configuration for place, item in sorted(self.entries.items()) if item.configuration and place <= index
        ]
        return found[-1] if found else self.floor.configuration


def apply_step(log, model, step):
    name = GROUP
    match step:
        case ("append", count, back, new_term):
            first = max(model.last + 1 - back, model.floor.index + 1)
            term = model.hard_state.term + (1 if back else 0) + (new_term == 3)
            items = [
                Entry(index, term, EntryKind.CONFIGURATION, b"c", Configuration((NODES[index % 3],)))
                if index % 4 == 0
                else entry(index, term, b"%d" % index * (index % 7))
                for index in range(first, first + count)
            ]
            changed = HardState(term) if term != model.hard_state.term else None
            log.append({name: Persist(changed, tuple(items))})
            model.hard_state = changed or model.hard_state
            model.entries = {index: item for index, item in model.entries.items() if index < first}
            model.entries.update((item.index, item) for item in items)
        case ("trim", ahead):
            index = min(model.floor.index + ahead, model.last)
            floor = Floor(index, model.term_at(index), model.configuration_at(index))
            assert log.group(name).floor_at(index) == floor
            log.trim(name, floor)
            model.floor = floor
            model.entries = {place: item for place, item in model.entries.items() if place > index}
        case ("install", ahead, matches):
            index = model.floor.index + ahead
            term = model.term_at(index) if matches and model.term_at(index) is not None else model.hard_state.term
            floor = Floor(index, term, Configuration(NODES[:2]))
            stays = model.term_at(index) == term
            log.install(name, floor)
            if ahead:
                model.entries = {place: item for place, item in model.entries.items() if stays and place > index}
                model.floor = floor
        case ("vote", node):
            model.hard_state = HardState(model.hard_state.term, node)
            log.append({name: Persist(model.hard_state)})


def check_equal(log, model):
    group = log.group(GROUP)
    assert group.damage is None
    assert group.floor == model.floor
    assert group.hard_state == model.hard_state
    assert group.last_index == model.last
    assert {item.index: item for item in read(group)} == model.entries
    assert [group.term_at(index) for index in range(model.last + 2)] == [
        model.term_at(index) if index >= model.floor.index else None for index in range(model.last + 2)
    ]
    assert group.configuration == model.configuration_at(model.last)
    stored = list(log._store.survey(rows.ENTRIES, *rows.group_range(GROUP)))
    assert [int.from_bytes(row.key[-8:], "big") for row in stored] == sorted(model.entries)
    assert group.bytes == sum(len(row.value) for row in stored)


@settings(max_examples=60)
@given(STEPS)
def test_any_history_equals_a_plain_one(tmp_path_factory, steps):
    """H02: whatever is appended, overwritten, trimmed, installed and reopened, the log is what a dict would be, with
    a cache that holds little, and opens sound.
    """
    path = tmp_path_factory.mktemp("log") / "log"
    model = Model()
    log = NodeLog.open(path, cache_bytes=400)
    try:
        log.bootstrap(GROUP, FIRST)
        for step in steps:
            if step[0] == "reopen":
                log.close()
                log = NodeLog.open(path, cache_bytes=400)
            else:
                apply_step(log, model, step)
            check_equal(log, model)
        log.close()
        log = NodeLog.open(path)
        check_equal(log, model)
    finally:
        log.close()
        shutil.rmtree(path.parent)


@settings(max_examples=60)
@given(st.integers(0, 8), st.integers(1, 9), st.data())
def test_any_damage_is_found(tmp_path_factory, floor, many, data):
    """F10: any set of rows flipped, deleted or swapped is found, and what is shown is a true beginning of the log."""
    path = tmp_path_factory.mktemp("log") / "log"
    filled(path, last=9, floor=floor)
    truth = {item.index: item for item in [FIRST, *entries(2, 10)]}
    with Raw(path) as raw:
        places = [("entries", key) for key in raw.stored("entries")] + [("groups", key) for key in raw.stored("groups")]
        chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=many, unique=True))
        for table, key in chosen:
            what = data.draw(st.sampled_from(["flip", "delete", "other"]))
            if what == "delete":
                raw.delete(table, key)
                continue
            stored = bytearray(raw.stored(table).get(key, b"gone"))
            if what == "other":
                others = sorted(value for other, value in raw.stored(table).items() if other != key)
                stored = bytearray(data.draw(st.sampled_from(others))) if others else bytearray(b"nothing")
            else:
                stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            raw.put(table, key, bytes(stored))
    try:
        with NodeLog.open(path) as log:
            if GROUP not in log.groups():
                assert len(chosen) >= len(places), "every row is gone"
                return
            group = log.group(GROUP)
            assert group.damage is not None
            for item in read(group):
                assert item == truth[item.index]
    finally:
        shutil.rmtree(path.parent)


# --- crashes and faults ----------------------------------------------------------------------------------------------

TRACKED = "data.mdb:wal"
"""The files of a log that the recorder follows."""

WORK = """
from srengine.consensus.log import NodeLog
from srengine.consensus.effects import Persist
from srengine.consensus.entries import *
nodes = ("a" * 32, "b" * 32)
def entries(start, stop, term):
    return tuple(Entry(index, term, EntryKind.COMMAND, b"%d of %d" % (index, term)) for index in range(start, stop))
log = NodeLog.open(Path(sys.argv[1]), wal_bytes=int(sys.argv[2]) if sys.argv[2:] else 1 << 20)
log.bootstrap("journal", Entry(1, 1, EntryKind.CONFIGURATION, b"", Configuration(nodes)))
log.bootstrap("tablet")
group = log.group("journal")
"""

HISTORY = """
tell("made")
def turn(term, first, count):
    log.append({"journal": Persist(HardState(term), entries(first, first + count, term)),
                "tablet": Persist(HardState(term), entries(log.group("tablet").last_index + 1,
                                                           log.group("tablet").last_index + 2, term))})
    tell([term, group.last_index])
turn(1, 2, 3)
turn(2, 4, 3)
turn(3, 5, 4)
log.trim("journal", group.floor_at(3))
tell([3, 8])
turn(4, 9, 1)
log.install("journal", Floor(12, 4, Configuration(nodes)))
tell([4, 12])
turn(5, 13, 2)
"""


WAL_BYTES = 2048
"""Room for two turns or three of the history."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return record.build_recorder(tmp_path_factory.mktemp("recorder"))


def check_after_crash(path, lines):
    """What was acknowledged is there, and what opens is sound."""
    acknowledged = [line for line in lines if isinstance(line, list)]
    with NodeLog.open(path) as log:
        for name in log.groups():
            assert log.group(name).damage is None, (lines, log.group(name).damage)
        if not lines:
            return
        group = log.group(GROUP)
        term, last = acknowledged[-1] if acknowledged else (1, 1)
        assert group.hard_state.term >= term
        assert group.hard_state.term <= term + 1
        if group.hard_state.term == term:
            # Exactly what was acknowledged, or the next step of the same term, which was not told yet.
            assert group.last_index == last or (term, group.last_index) in {(1, 4), (4, 12)}
        assert log.group("tablet").hard_state.term in {group.hard_state.term, 0}, "a turn is whole"
        append(log, GROUP, entries(group.last_index + 1, group.last_index + 3, 9), term=9)


def test_every_kill_leaves_a_sound_log(library, tmp_path):
    """F01: SIGKILL before writes and syncs (every third, and the last ones) of a history of turns, cuts, a trim and an
    install, which settles several times: what was acknowledged is there, a turn is there for all groups or for none,
    nothing opens as damaged.
    """
    source = (WORK, HISTORY, "log.close()\n")
    counted = children.run((*source, "tell(events())"), tmp_path / "counted", WAL_BYTES, library=library, track=TRACKED)
    assert counted.code == 0, counted.errors
    assert counted.told > 30
    for number in sorted({*range(1, counted.told + 1, 3), *range(counted.told - 3, counted.told + 1)}):
        path = tmp_path / f"at-{number}"
        ended = children.run(source, path, WAL_BYTES, library=library, track=TRACKED, kill_at=number)
        assert ended.code == -signal.SIGKILL
        check_after_crash(path, ended.lines)
        shutil.rmtree(path)


BEGUN = """
import select
count = 0
tell([1, 1, events(), count])
for term in range(2, 8):
    turn = {"journal": Persist(HardState(term), entries(group.last_index + 1, group.last_index + 3, term)),
            "tablet": Persist(HardState(term), entries(term - 1, term, term))}
    if log.begin(turn):
        count += 1
        select.select([log.done], [], [])
        log.finish()
    else:
        log.append(turn)
    tell([term, group.last_index, events(), count])
"""


def test_every_kill_of_a_turn_that_was_begun_leaves_a_sound_log(library, tmp_path):
    """F01: SIGKILL before each write and sync of a history of turns that are begun and finished, with those for which
    there is no room between them: what was finished is there, a turn is there for all groups or for none.
    """
    source = (WORK, BEGUN)
    counted = children.run(source, tmp_path / "counted", WAL_BYTES, library=library, track=TRACKED)
    assert counted.code == 0, counted.errors
    before, last = counted.lines[0][2], counted.told[2]
    assert 3 <= counted.told[3] < 6
    for number in range(before + 1, last + 1):
        path = tmp_path / f"at-{number}"
        ended = children.run(source, path, WAL_BYTES, library=library, track=TRACKED, kill_at=number)
        assert ended.code == -signal.SIGKILL
        check_after_crash(path, [line[:2] for line in ended.lines])
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "point",
    ["log.append.written", "log.append.committed", "log.trim.step", "log.install.written"],
)
@pytest.mark.parametrize("number", [1, 3])
def test_kills_inside_a_turn(tmp_path, point, number):
    """F01: SIGKILL at the named places of a turn, a trim, an install."""
    ended = children.run((WORK, HISTORY), tmp_path / "log", failpoints=f"{point}=kill@{number}")
    if ended.code == 0:
        assert number == 3, "the point was never reached"
        assert point in {"log.trim.step", "log.install.written"}
        return
    assert ended.code == -signal.SIGKILL, ended.errors
    check_after_crash(tmp_path / "log", ended.lines)


def test_a_turn_that_fails_leaves_nothing_of_it(path):
    """F07: an error inside a turn takes all of it back, in memory too, and the same turn succeeds afterwards."""
    filled(path, last=5)
    with NodeLog.open(path) as log:
        group = log.group(GROUP)
        for action in ("full", "error"):
            with failpoints.armed(f"log.append.written={action}"), pytest.raises(OSError, match="failpoint"):
                append(log, GROUP, entries(4, 9, 2), term=2)
            assert (group.last_index, group.hard_state.term) == (5, 1)
            assert read(group) == [FIRST, *entries(2, 6)]
            assert log.saved(GROUP) == []
        append(log, GROUP, entries(4, 9, 2), term=2)
        assert read(group) == [FIRST, *entries(2, 4), *entries(4, 9, 2)]


@pytest.mark.parametrize("kind", ["WRITE", "SYNC"])
def test_an_input_output_error_of_a_turn_fences_the_log(library, tmp_path, kind):
    """F05, F06: EIO of a write or a sync of the write-ahead log fences the log durably; nothing is acknowledged after
    it, and it opens only after it was proved past the page cache, with what was acknowledged.
    """
    path = tmp_path / "log"
    ended = children.run(
        (
            WORK,
            f"""
            log.append({{"journal": Persist(HardState(2), entries(2, 4, 2))}})
            break_from_now({kind}, 5)
            tell([code_of(lambda: log.append({{"journal": Persist(None, entries(4, 6, 2))}})),
                  code_of(lambda: log.append({{"journal": Persist(None, entries(4, 6, 2))}})), group.last_index])
            log.close()
            """,
        ),
        path,
        library=library,
        track="wal",
    )
    assert ended.told == ["FENCED", "FENCED", 3], ended.errors
    assert fences.read_fence(path) is not None
    with pytest.raises(errors.TabletFenced):
        NodeLog.open(path)
    recover_logged(path)
    with NodeLog.open(path) as log:
        assert log.group(GROUP).damage is None
        assert log.group(GROUP).last_index in {3, 5}
        assert log.group(GROUP).hard_state == HardState(2)


@pytest.mark.parametrize("kind", ["WRITE", "SYNC", "META"])
def test_an_input_output_error_while_the_log_settles_fences_it(library, tmp_path, kind):
    """F05, F06: EIO of LMDB's pages, their sync or the meta page while a turn that found the write-ahead log full goes
    to LMDB fences the log durably; every turn that was acknowledged before is there after the proof, whichever file
    has it.
    """
    path = tmp_path / "log"
    ended = children.run(
        (
            WORK,
            f"""
            log.append({{"journal": Persist(HardState(2), entries(2, 4, 2))}})
            large = Entry(4, 2, EntryKind.COMMAND, bytes(1 << 20))
            break_from_now({kind}, 5)
            tell([code_of(lambda: log.append({{"journal": Persist(None, (large,))}})),
                  code_of(lambda: log.append({{"journal": Persist(None, entries(4, 6, 2))}})), group.last_index])
            log.close()
            """,
        ),
        path,
        library=library,
        track=TRACKED,
    )
    assert ended.told == ["FENCED", "FENCED", 3], ended.errors
    assert fences.read_fence(path) is not None
    with pytest.raises(errors.TabletFenced):
        NodeLog.open(path)
    recover_logged(path)
    with NodeLog.open(path) as log:
        assert log.group(GROUP).damage is None
        assert log.group(GROUP).hard_state == HardState(2)
        assert log.group(GROUP).last_index in {3, 4}
        assert read(log.group(GROUP))[1:3] == list(entries_of_work(2, 4, 2))
        append(log, GROUP, entries(log.group(GROUP).last_index + 1, 9, 2))


def entries_of_work(start, stop, term):
    return (entry(index, term, b"%d of %d" % (index, term)) for index in range(start, stop))


@pytest.mark.parametrize("settles", [False, True])
def test_a_full_disk_comes_back(library, tmp_path, settles):
    """F07, H26: ENOSPC of the write-ahead log, or of LMDB's file while it settles, is `DiskFull`, the log reads on, and
    the same turn succeeds when there is space.
    """
    ended = children.run(
        (
            WORK,
            f"""
            data = bytes({(1 << 20) if settles else 10})
            turn = {{"journal": Persist(HardState(2), (*entries(2, 3, 2), Entry(3, 2, EntryKind.COMMAND, data)))}}
            break_from_now(WRITE, 28)
            tell([code_of(lambda: log.append(turn)), group.last_index, len(group.entries(1, 9, 1 << 30)),
                  code_of(lambda: log.append(turn)), group.last_index, len(group.entries(1, 9, 1 << 30))])
            """,
        ),
        tmp_path / "log",
        library=library,
        track=TRACKED,
    )
    assert ended.told == ["DISK_FULL", 1, 1, None, 3, 3], ended.errors
    group, found = open_group(tmp_path / "log")
    assert (group.damage, [item.index for item in found]) == (None, [1, 2, 3])


@pytest.mark.requires_root
def test_a_small_file_system_that_fills_up(tmp_path):
    """F07, H26: on a small file system the log ends in `DiskFull`, and goes on when there is space; without room for
    its write-ahead log does not begin, and leaves nothing that a smaller one would trip over.
    """
    with children.small_file_system(tmp_path / "small") as mount:
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(500_000))
        with pytest.raises(errors.DiskFull):
            NodeLog.open(mount / "log")
        with NodeLog.open(mount / "log", wal_bytes=1 << 18) as log:
            log.bootstrap(GROUP, FIRST)
            group = log.group(GROUP)
            with pytest.raises(errors.DiskFull):
                while True:
                    append(log, GROUP, [entry(group.last_index + 1, data=bytes(20_000))])
            last = group.last_index
            assert last > 10
            assert len(read(group)) == last
            ballast.unlink()
            append(log, GROUP, [entry(last + 1, data=bytes(20_000))])
        with NodeLog.open(mount / "log") as log:
            assert log.group(GROUP).damage is None
            assert log.group(GROUP).last_index == last + 1
