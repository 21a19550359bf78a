"""Checks of an open tablet in pieces, and healing of single records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from srengine import errors
from srengine.storage import Store, Tablet
from srengine.storage.checking import (
    CHANGE,
    RECORD,
    check_slice,
    damaged_key,
    heal,
    prove,
    remove_unreadable,
    sound_rows,
)
from tests.node import rot

COUNT = 500


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, str]:
    """A store with one tablet, closed, and the tablet's id."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        tablet.put_many([(b"k%05d" % number, b"value-%d" % number) for number in range(COUNT)])
        tablet.delete_many([b"k%05d" % number for number in range(50)])
        tablet.put_many([(b"k%05d" % number, b"again-%d" % number) for number in range(100, 150)])
        return tmp_path / "data", tablet.id


def walk(tablet: Tablet, bytes_max: int) -> tuple[int, list[tuple[str, bytes]]]:
    after: bytes | None = None
    records, damages, done = 0, [], False
    while not done:
        piece = check_slice(tablet, after, bytes_max=bytes_max)
        after, done = piece.after, piece.done
        records += piece.records
        damages += piece.damages
    return records, damages


@pytest.mark.parametrize("bytes_max", [1, 700, 1 << 20])
def test_a_walk_in_pieces_sees_every_record_once(made: tuple[Path, str], bytes_max: int) -> None:
    """T11: pieces of any size cover all records, tombstones included, and find nothing in a sound tablet."""
    with Store(made[0]) as store:
        assert walk(store.tablet("t"), bytes_max) == (COUNT, [])


@pytest.mark.parametrize("bytes_max", [1, 700, 1 << 20])
@pytest.mark.parametrize("keys", [[0], [499], [7, 8], [60, 100, 149]])
def test_every_damaged_record_is_named(made: tuple[Path, str], bytes_max: int, keys: list[int]) -> None:
    """T11, F10: a bit flipped in a value or a header names its record; the walk goes on behind it."""
    wanted = [b"k%05d" % number for number in keys]
    live = [key for key in wanted if int(key[1:]) >= 50]
    rot.flip_header(made[0], made[1], [key for key in wanted if key not in live])
    rot.flip_value(made[0], made[1], live)
    with Store(made[0]) as store:
        assert walk(store.tablet("t"), bytes_max) == (COUNT, [(RECORD, key) for key in wanted])


def test_a_lost_change_entry_is_named_and_written_again(made: tuple[Path, str]) -> None:
    """K11: a record without its entry in the change log is found; healing brings the entry back and nothing else."""
    with Store(made[0]) as store:
        before = store.tablet("t").position
        record = store.tablet("t").get_record(b"k00123")
        assert record is not None
    rot.lose_change(made[0], made[1], record.version)
    with Store(made[0]) as store:
        tablet = store.tablet("t")
        assert walk(tablet, 700) == (COUNT, [(CHANGE, b"k00123")])
        rows, count = sound_rows(tablet, [b"k00123"], bytes_max=1 << 20)
        assert count == 1
        assert heal(tablet, rows, recount=True) == [b"k00123"]
        assert tablet.position == before
        assert tablet.verify().clean


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path, tablet_id: rot.remove(path, tablet_id, [b"k00077"]), "499 records"),
        (lambda path, tablet_id: rot.flip_header(path, tablet_id, [b"k00077"]), "cannot be read"),
        (lambda path, tablet_id: rot.add(path, tablet_id, {b"zz": b"k00077"}), "cannot be read"),
    ],
)
def test_records_that_do_not_give_the_root_are_no_proof(
    made: tuple[Path, str], damage: Callable[[Path, str], None], what: str
) -> None:
    """K11: a record removed, added or rotten in its header shows when all are added up."""
    with Store(made[0]) as store:
        assert prove(store.tablet("t")).whole
    damage(*made)
    with Store(made[0]) as store:
        proof = prove(store.tablet("t"))
        assert not proof.whole
        assert what in proof.reason


def test_a_value_heals_from_a_sound_row_only(tmp_path: Path) -> None:
    """K10, F10: a rotten value is put right by the row of another copy; one that says something else is passed over."""
    with Store(tmp_path / "good") as store:
        good = store.tablet("t")
        good.put_many([(b"a", b"one"), (b"b", b"two"), (b"c", b"three")])
        tablet_id, lineage, seed = good.id, good.lineage, good.seed
        delta = good.delta_since(0, bytes_max=1 << 20)
        assert delta is not None
        with Store(tmp_path / "bad") as other:
            other.create_tablet(tablet_id, lineage=lineage, seed=seed).apply_delta(delta)
        rows, _ = sound_rows(good, [b"b"], bytes_max=1 << 20)
        good.put(b"b", b"another value")
        newer, _ = sound_rows(good, [b"b"], bytes_max=1 << 20)
    rot.flip_value(tmp_path / "bad", tablet_id, [b"b"])
    with Store(tmp_path / "bad") as store:
        tablet = store.open_tablet(tablet_id)
        before = tablet.position
        with pytest.raises(errors.CorruptionError) as raised:
            tablet.get(b"b")
        assert damaged_key(raised.value) == b"b"
        assert sound_rows(tablet, [b"a", b"b"], bytes_max=1 << 20)[1] == 1
        assert heal(tablet, newer) == []
        assert heal(tablet, rows) == [b"b"]
        assert (tablet.get(b"b"), tablet.position) == (b"two", before)
        assert tablet.verify().clean


def test_records_that_nobody_wrote_are_removed(made: tuple[Path, str]) -> None:
    """K11: records that cannot be read while all others give the root go; ones that belong to it stay."""
    rot.add(*made, {b"zz": b"k00077", b"a": b"k00099"})
    with Store(made[0]) as store:
        tablet = store.tablet("t")
        assert remove_unreadable(tablet) == 2
        assert tablet.verify().clean
    rot.flip_header(*made, [b"k00077"])
    with Store(made[0]) as store:
        with pytest.raises(errors.Diverged):
            remove_unreadable(store.tablet("t"))
        assert not prove(store.tablet("t")).whole
