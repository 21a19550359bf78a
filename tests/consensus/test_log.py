"""The node-wide log: durable by turns, sound or named, cut by rule."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors, failpoints
from srengine.consensus import log as log_module
from srengine.consensus import log_rows as rows
from srengine.consensus.effects import Persist
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState
from srengine.consensus.log import NodeLog, entry_bytes
from srengine.storage import fences, pages
from srengine.storage.metadata_rows import recover_metadata
from tests.consensus.logs import FIRST, NODES, Raw, append, entries, entry, filled, read
from tests.crash import children, record

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


def test_a_turn_of_many_groups_is_one_transaction(path):
    """One transaction, and so one fsync, for a turn, whatever the number of groups."""
    names = [f"tablet-{number}" for number in range(50)]
    with NodeLog.open(path) as log:
        for name in names:
            log.bootstrap(name)
        before = log._store._environment.last_transaction()
        log.append({name: Persist(HardState(1), entries(1, 4)) for name in names})
        assert log._store._environment.last_transaction() == before + 1
        assert all(log.group(name).last_index == 3 for name in names)


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
        raw.seal("log", b"format", b"2")
    with pytest.raises(errors.UnsupportedFeature, match=r"'2'.*'1'"):
        NodeLog.open(path)
    with Raw(path) as raw:
        raw.delete("log", b"format")
    with pytest.raises(errors.ForeignData):
        NodeLog.open(path)


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
        log._store._environment.change([(log._store._tables["entries"], key_of(5), b"damaged bytes")])
        with pytest.raises(errors.CorruptionError):
            log.group(GROUP).entries(4, 7, 1000)


def test_documented_vectors():
    """The byte vectors in docs/formats-log.md are what is written."""
    text = (Path(__file__).parents[2] / "docs" / "formats-log.md").read_text()
    found = dict(re.findall(r"<!-- vector: ([a-z-]+) -->\n```\n(.*?)\n```", text))
    chain = rows.first_chain(GROUP, Floor())
    value, after = rows.encode_entry(Entry(1, 3, EntryKind.COMMAND, b"data"), chain)
    assert found == {"chain": chain.hex(), "entry": value.hex()}
    assert rows.chain_of(value) == after


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

WORK = """
from srengine.consensus.log import NodeLog
from srengine.consensus.effects import Persist
from srengine.consensus.entries import *
nodes = ("a" * 32, "b" * 32)
def entries(start, stop, term):
    return tuple(Entry(index, term, EntryKind.COMMAND, b"%d of %d" % (index, term)) for index in range(start, stop))
log = NodeLog.open(Path(sys.argv[1]))
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
    """F01: SIGKILL before writes and syncs (every fourth, and the last ones) of a history of turns, cuts, a trim and an
    install: what was acknowledged is there, a turn is there for all groups or for none, nothing opens as damaged.
    """
    counted = children.run((WORK, HISTORY, "tell(events())"), tmp_path / "counted", library=library)
    assert counted.code == 0, counted.errors
    assert counted.told > 30
    for number in sorted({*range(1, counted.told + 1, 4), *range(counted.told - 3, counted.told + 1)}):
        path = tmp_path / f"at-{number}"
        ended = children.run((WORK, HISTORY), path, library=library, kill_at=number)
        assert ended.code == -signal.SIGKILL
        check_after_crash(path, ended.lines)
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


@pytest.mark.parametrize("kind", ["SYNC", "META"])
def test_an_input_output_error_fences_the_log(library, tmp_path, kind):
    """F05, F06: EIO of a sync or of the meta page fences the log durably; nothing is acknowledged after it, and it
    opens only after it was proved past the page cache, with what was acknowledged.
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
            """,
        ),
        path,
        library=library,
    )
    assert ended.told == ["FENCED", "FENCED", 3], ended.errors
    assert fences.read_fence(path) is not None
    with pytest.raises(errors.TabletFenced):
        NodeLog.open(path)
    recover_metadata(path)
    with NodeLog.open(path) as log:
        assert log.group(GROUP).damage is None
        assert log.group(GROUP).last_index in {3, 5}
        assert log.group(GROUP).hard_state == HardState(2)


def test_a_full_disk_comes_back(library, tmp_path):
    """F07, H26: ENOSPC is `DiskFull`, the log reads on, and the same turn succeeds when there is space."""
    ended = children.run(
        (
            WORK,
            """
            turn = {"journal": Persist(HardState(2), entries(2, 4, 2))}
            break_from_now(WRITE, 28)
            tell([code_of(lambda: log.append(turn)), group.last_index, len(group.entries(1, 9, 999)),
                  code_of(lambda: log.append(turn)), group.last_index, len(group.entries(1, 9, 999))])
            """,
        ),
        tmp_path / "log",
        library=library,
    )
    assert ended.told == ["DISK_FULL", 1, 1, None, 3, 3], ended.errors
    assert open_group(tmp_path / "log")[0].damage is None


@pytest.mark.requires_root
def test_a_small_file_system_that_fills_up(tmp_path):
    """F07, H26: on a small file system the log ends in `DiskFull`, and goes on when there is space."""
    with children.small_file_system(tmp_path / "small") as mount:
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(500_000))
        with NodeLog.open(mount / "log") as log:
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
