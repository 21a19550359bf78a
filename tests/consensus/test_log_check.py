"""`srengine verify` reads the node-wide log as entries."""

from __future__ import annotations

import shutil

import pytest

from srengine.consensus import log_rows as rows
from srengine.consensus.log import NodeLog
from srengine.consensus.log_check import check_log
from srengine.storage import verify_directory
from tests.consensus.logs import FIRST, Raw, append, entries, entry, filled

GROUP = "journal"


@pytest.fixture
def directory(tmp_path):
    """Return a data directory with a log of two groups."""
    root = tmp_path / "data"
    (root / "tablets").mkdir(mode=0o700, parents=True)
    root.chmod(0o700)
    filled(root / "log", last=9, floor=2)
    with NodeLog.open(root / "log") as log:
        log.bootstrap("tablet")
        append(log, "tablet", entries(1, 5), term=1)
        append(log, GROUP, [entry(10, data=bytes(10_000))])
    return root


def verify(root):
    return verify_directory(root, {"log": check_log})


def key_of(index, name=GROUP):
    return rows.entry_key(rows.group_range(name)[0], index)


def test_a_whole_log_is_clean(directory):
    """H28: a sound log has no damage, and its rows are counted."""
    report = verify(directory)
    assert report.clean, report.damages
    assert report.records > 12


@pytest.mark.parametrize(
    ("harm", "kind", "index"),
    [
        (lambda raw: raw.delete("entries", key_of(5)), "missing-entry", 5),
        (lambda raw: raw.delete("entries", key_of(10)), "missing-entry", 10),
        (lambda raw: raw.put("entries", key_of(6), b"damaged bytes"), "entry", 6),
        (lambda raw: raw.seal("entries", key_of(7), raw.stored("entries")[key_of(6)][:-8]), "replaced-entry", 7),
        (lambda raw: raw.seal("entries", key_of(2), b"old"), "stray-entry", 2),
        (lambda raw: raw.delete("groups", b"journal\0t"), "tail", None),
        (lambda raw: raw.put("groups", b"journal\0h", b"x"), "hard-state", None),
        (lambda raw: raw.delete("groups", b"journal\0f"), "floor", None),
    ],
)
def test_what_is_wrong_is_named(directory, harm, kind, index):
    """H28: each damaged, missing, replaced or superfluous entry and each damaged row of a group is named."""
    with Raw(directory / "log") as raw:
        harm(raw)
    report = verify(directory)
    found = [damage for damage in report.damages if damage.kind == kind]
    assert found, report.damages
    assert found[0].file == "log/data.mdb"
    assert "journal" in found[0].detail
    if index is not None:
        assert found[0].key == key_of(index)
    assert not [damage for damage in report.damages if "tablet" in damage.detail]


def test_every_damaged_entry_is_named(directory):
    """H28: not only the first one."""
    with Raw(directory / "log") as raw:
        raw.delete("entries", key_of(4))
        raw.put("entries", key_of(6), b"damaged bytes")
        raw.delete("entries", key_of(3, "tablet"))
    places = {(damage.kind, damage.key) for damage in verify(directory).damages}
    assert places >= {("missing-entry", key_of(4)), ("entry", key_of(6)), ("missing-entry", key_of(3, "tablet"))}


def test_a_damage_that_was_overwritten_is_reported_until_it_is_healed(directory):
    """H28: the mark of a log that has not caught up yet is a finding."""
    with Raw(directory / "log") as raw:
        raw.delete("entries", key_of(5))
    with NodeLog.open(directory / "log") as log:
        append(log, GROUP, entries(5, 7, term=2), term=2)
    assert [damage.kind for damage in verify(directory).damages] == ["log"]
    with NodeLog.open(directory / "log") as log:
        log.heal(GROUP)
    assert verify(directory).clean


def test_offline_and_at_start_find_the_same(directory):
    """H28: what verify names is what the node finds when it starts."""
    with Raw(directory / "log") as raw:
        raw.delete("entries", key_of(8))
    named = verify(directory).damages[0].detail
    with NodeLog.open(directory / "log") as log:
        assert log.group(GROUP).damage.detail == named


@pytest.fixture
def crashed(directory):
    """Return a data directory whose process died: its newest turns are in the write-ahead log alone."""
    root = directory.with_name("crashed")
    with NodeLog.open(directory / "log") as log:
        append(log, GROUP, [entry(11, data=bytes(2000))])
        append(log, "tablet", entries(3, 7, term=2), term=2)
        log.bootstrap("new", FIRST)
        log.trim(GROUP, log.group(GROUP).floor_at(4))
        shutil.copytree(directory, root)
    return root


def test_what_is_in_the_write_ahead_log_alone_is_sound(crashed):
    """H28, F01: turns that were never settled are read with those that were; nothing is changed by looking."""
    before = {path: path.read_bytes() for path in (crashed / "log").iterdir()}
    report = verify(crashed)
    assert report.clean, report.damages
    assert {path: path.read_bytes() for path in (crashed / "log").iterdir()} == before
    # Without the rows of the log it would not fit: they are what makes it whole.
    with Raw(crashed / "log") as raw:
        assert key_of(11) not in raw.stored("entries")
        raw.delete("entries", key_of(10))
    assert [(damage.kind, damage.key) for damage in verify(crashed).damages] == [("missing-entry", key_of(10))]


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:700] + b"damage" + content[706:],
        lambda content: content[:512] + bytes(512) + content[1024:],
        lambda content: content[:-512],
        lambda content: b"",
        None,
    ],
)
def test_a_damaged_write_ahead_log_is_named(crashed, harm):
    """H28, F10, F11: a flipped byte, a sector that is gone, a file that was cut, emptied or removed is one finding that
    names the file: what the groups' logs are nobody knows then.
    """
    file = crashed / "log" / "wal"
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(file.read_bytes()))
    [damage] = verify(crashed).damages
    assert (damage.kind, damage.file) == ("log", "log/wal")
    assert str(file) in damage.detail


def test_a_log_without_a_write_ahead_log_is_read(directory):
    """F44: a log that no release with a write-ahead log has opened yet is as sound as it was."""
    with Raw(directory / "log") as raw:
        raw.seal("log", b"format", b"1")
        raw.delete("wal", b"place")
    (directory / "log" / "wal").unlink()
    assert verify(directory).clean
    with Raw(directory / "log") as raw:
        raw.delete("entries", key_of(5))
    assert [damage.kind for damage in verify(directory).damages] == ["missing-entry"]
