"""The newest rows of the agreed state, in memory above its store."""

from __future__ import annotations

import contextlib
import random

import pytest

from srengine import errors
from srengine.ha.metadata import Applying
from srengine.ha.recent import ROWS_KEPT_MAX, VALUE_BYTES_KEPT_MAX, NotInMemoryError, RecentStore
from srengine.storage import MetadataStore
from tests.ha.agreed import agreed, bootstrap


class Below:
    """A store in memory that counts its transactions, and fails when it is told to."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, bytes], bytes] = {}
        self.transactions = 0
        self.reads = 0
        self.fault: errors.Error | None = None
        self.in_scan = lambda: None

    def get(self, table, key):
        self.reads += 1
        return self.rows.get((table, key))

    def scan(self, table, start=None, stop=None):
        found = sorted(
            (key, value)
            for (of, key), value in self.rows.items()
            if of == table and (start is None or key >= start) and (stop is None or key < stop)
        )
        self.in_scan()
        return iter(found)

    @contextlib.contextmanager
    def transaction(self):
        before = dict(self.rows)
        try:
            yield self
            if self.fault is not None:
                raise self.fault
        except BaseException:
            self.rows = before
            raise
        self.transactions += 1

    def put(self, table, key, value):
        self.rows[table, key] = value

    def delete(self, table, key):
        return self.rows.pop((table, key), None) is not None

    def change(self, rows):
        for table, changed in rows.items():
            for key, value in changed.items():
                if value is None:
                    self.delete(table, key)
                else:
                    self.put(table, key, value)

    def replace_tables(self, tables, rows, *, bytes_expected):
        self.rows = {place: value for place, value in self.rows.items() if place[0] not in tables}
        for table, key, value in rows():
            self.put(table, key, value)


@pytest.fixture
def below() -> Below:
    return Below()


def put(store: RecentStore, **rows: bytes | None) -> None:
    with store.show() as tables:
        for key, value in rows.items():
            if value is None:
                tables.delete("t", key.encode())
            else:
                tables.put("t", key.encode(), value)


def test_changes_show_at_once_and_are_flushed_together(below):
    """Three transactions are visible to every read, and become one of the store below."""
    store = RecentStore(below)
    put(store, a=b"1", b=b"1")
    put(store, a=b"2")
    put(store, b=None, c=b"3")
    assert [store.get("t", key) for key in (b"a", b"b", b"c", b"d")] == [b"2", None, b"3", None]
    assert list(store.scan("t")) == [(b"a", b"2"), (b"c", b"3")]
    assert list(store.scan("t", b"b")) == [(b"c", b"3")]
    assert not list(store.scan("other"))
    assert (below.rows, below.transactions) == ({}, 0)
    store.flush()
    assert (below.rows, below.transactions) == ({("t", b"a"): b"2", ("t", b"c"): b"3"}, 1)
    assert list(store.scan("t")) == [(b"a", b"2"), (b"c", b"3")]
    store.flush()
    assert below.transactions == 1, "there was nothing to write"


def test_a_transaction_that_fails_shows_nothing(below):
    store = RecentStore(below)
    put(store, a=b"1")
    with pytest.raises(errors.Conflict), store.show() as tables:
        tables.put("t", b"a", b"2")
        raise errors.Conflict("no")
    assert store.get("t", b"a") == b"1"


def test_a_flush_that_fails_loses_nothing(below):
    """F07: a full disk leaves everything visible; the next flush writes it, newer changes with it."""
    store = RecentStore(below)
    put(store, a=b"1", b=b"1")
    below.fault = errors.DiskFull("no space")
    with pytest.raises(errors.DiskFull):
        store.flush()
    assert list(store.scan("t")) == [(b"a", b"1"), (b"b", b"1")]
    put(store, b=b"2")
    below.fault = None
    store.flush()
    assert below.rows == {("t", b"a"): b"1", ("t", b"b"): b"2"}


def test_a_durable_transaction_comes_after_what_is_recent(below):
    """What was visible before is in the file before, so a file never lacks what came earlier."""
    store = RecentStore(below)
    put(store, a=b"1")
    with store.transaction() as tables:
        assert tables.get("t", b"a") == b"1"
        tables.put("t", b"b", b"2")
    assert below.rows == {("t", b"a"): b"1", ("t", b"b"): b"2"}
    below.fault = errors.DiskFull("no space")
    with pytest.raises(errors.DiskFull), store.transaction() as tables:
        tables.put("t", b"b", b"3")
    assert store.get("t", b"b") == b"2"


def test_rows_that_were_flushed_or_read_are_read_from_memory_up_to_a_bound(below):
    below.rows["t", b"there"] = b"0"
    store = RecentStore(below)
    put(store, a=b"1", gone=None, long=b"x" * (VALUE_BYTES_KEPT_MAX + 1))
    store.flush()
    before = below.reads
    for _ in range(3):
        assert [store.get("t", key) for key in (b"a", b"gone", b"there", b"never")] == [b"1", None, b"0", None]
    assert below.reads == before + 2
    before = below.reads
    assert store.get("t", b"long") == b"x" * (VALUE_BYTES_KEPT_MAX + 1)
    assert below.reads == before + 1
    put(store, **{f"k{number}": b"" for number in range(ROWS_KEPT_MAX)})
    store.flush()
    assert store.get("t", b"a") == b"1"
    assert below.reads == before + 2, "it was forgotten, and read again"
    put(store, a=b"y" * (VALUE_BYTES_KEPT_MAX + 1))
    store.flush()
    assert store.get("t", b"a") == b"y" * (VALUE_BYTES_KEPT_MAX + 1)


def test_a_scan_across_a_flush_begins_again(below):
    """Rows that move to the store while a scan reads it are neither missed nor seen twice, nor old beside new ones."""
    store = RecentStore(below)
    put(store, a=b"old", b=b"old")
    store.flush()
    put(store, a=b"new")
    moved = []

    def move():
        if not moved:
            moved.append(True)
            put(store, b=b"newer")
            store.flush()

    below.in_scan = move
    assert list(store.scan("t")) == [(b"a", b"new"), (b"b", b"newer")]
    assert moved


def test_a_read_across_a_flush_is_not_kept(below):
    """A value that was read before a flush, and is returned after it, is not what later reads get."""
    store = RecentStore(below)
    read = below.get

    def slow(table, key):
        value = read(table, key)
        if not below.transactions:
            put(store, a=b"new")
            store.flush()
        return value

    below.get = slow
    assert store.get("t", b"a") is None
    assert store.get("t", b"a") == b"new"


def test_replaced_tables_forget_what_was_kept(below):
    store = RecentStore(below)
    put(store, a=b"1", b=b"1")
    store.replace_tables(["t"], lambda: iter([("t", b"b", b"2")]), bytes_expected=10)
    assert list(store.scan("t")) == [(b"b", b"2")]
    assert (store.get("t", b"a"), store.get("t", b"b")) == (None, b"2")


def test_a_whole_table_is_read_once(below):
    """What is held as a whole answers for absent rows, too; long values are read when they are asked for."""
    long = b"x" * (VALUE_BYTES_KEPT_MAX + 1)
    below.rows.update({("t", b"a"): b"1", ("t", b"long"): long})
    store = RecentStore(below, whole=["t"])
    assert [store.get("t", key) for key in (b"a", b"no", b"no2")] == [b"1", None, None]
    before = below.reads
    put(store, a=None, b=b"2")
    store.flush()
    assert [store.get("t", key) for key in (b"a", b"b", b"no")] == [None, b"2", None]
    assert below.reads == before
    assert store.get("t", b"long") == long
    assert below.reads == before + 1
    store.replace_tables(["t"], lambda: iter([("t", b"c", b"3")]), bytes_expected=10)
    assert [store.get("t", key) for key in (b"b", b"c", b"long")] == [None, b"3", None]


def test_a_damaged_whole_table_is_read_row_by_row(below):
    """F10: one damaged row is met by whoever needs it, not by everybody."""
    below.rows["t", b"a"] = b"1"

    def damaged(*_):
        raise errors.CorruptionError("a row is damaged")
        yield

    below.scan = damaged
    store = RecentStore(below, whole=["t"])
    assert [store.get("t", key) for key in (b"a", b"no")] == [b"1", None]


def test_changes_from_memory_never_ask_the_store(below):
    """A read that memory cannot answer ends the attempt, and nothing of it shows; after it was read it can."""
    below.rows["t", b"a"] = b"1"
    store = RecentStore(below)
    before = below.reads
    with pytest.raises(NotInMemoryError), store.show(from_memory=True) as tables:
        tables.put("t", b"b", b"2")
        tables.get("t", b"a")
    with pytest.raises(NotInMemoryError), store.show(from_memory=True) as tables:
        list(tables.scan("t"))
    assert below.reads == before
    assert store.get("t", b"b") is None
    assert store.get("t", b"a") == b"1"
    with store.show(from_memory=True) as tables:
        assert tables.get("t", b"a") == b"1"
        tables.put("t", b"a", b"2")
    assert store.get("t", b"a") == b"2"


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_changes_from_memory_beside_a_flush_read_what_is_newest(below, moment):
    """Whoever changes rows from memory sees them as they are, wherever a flush that runs beside it has them; rows of
    tables that are held whole, rows that were kept, new and deleted ones.
    """
    below.rows |= {("whole", b"a"): b"old", ("whole", b"gone"): b"old", ("t", b"a"): b"old", ("t", b"gone"): b"old"}
    store = RecentStore(below, whole=["whole"])
    for table in ("whole", "t"):
        assert [store.get(table, key) for key in (b"a", b"gone", b"new")] == [b"old", b"old", None]
    with store.show() as tables:
        for table in ("whole", "t"):
            tables.put(table, b"a", b"1")
            tables.put(table, b"new", b"1")
            tables.delete(table, b"gone")
    reads = below.reads

    def look(tables):
        for table in ("whole", "t"):
            assert [tables.get(table, key) for key in (b"a", b"gone", b"new")] == [b"1", None, b"1"]

    def flush_in_between():
        with store.show(from_memory=True) as tables:
            look(tables)
            change = below.change

            def changing(rows):
                change(rows)
                look(tables)

            below.change = changing
            assert store.flush()
            look(tables)
            tables.put("t", b"a", b"2")

    def show_in_a_flush():
        change = below.change

        def changing(rows):
            change(rows)
            with store.show(from_memory=True) as tables:
                look(tables)
                tables.put("t", b"a", b"2")

        below.change = changing
        assert store.flush()

    match moment:
        case "before":
            flush_in_between()
        case "while":
            show_in_a_flush()
        case "after":
            assert store.flush()
            with store.show(from_memory=True) as tables:
                look(tables)
                tables.put("t", b"a", b"2")
    assert below.reads == reads
    assert store.get("t", b"a") == b"2"
    assert below.rows["t", b"a"] == b"1"


@pytest.mark.parametrize("fault", [None, errors.DiskFull("no space")], ids=str)
def test_changes_beside_a_flush_are_kept(below, fault):
    """What is shown while a flush runs is visible, and durable with the next one; also when the flush fails."""
    store = RecentStore(below)
    put(store, a=b"1")
    change = below.change

    def beside(rows):
        put(store, a=b"2", b=b"2")
        assert store.get("t", b"a") == b"2"
        change(rows)
        if fault is not None:
            raise fault

    below.change = beside
    with pytest.raises(errors.DiskFull) if fault is not None else contextlib.nullcontext():
        store.flush()
    below.change = change
    assert [store.get("t", key) for key in (b"a", b"b")] == [b"2", b"2"]
    store.flush()
    assert below.rows == {("t", b"a"): b"2", ("t", b"b"): b"2"}


@pytest.mark.parametrize("seed", range(30))
def test_it_reads_like_a_dict(tmp_path, seed):
    """Random changes, flushes and reopenings over a real store: reads equal a dict's, and after a crash the file holds
    what the last flush wrote.
    """
    dice = random.Random(seed)
    visible: dict[bytes, bytes] = {}
    durable: dict[bytes, bytes] = {}
    keys = [b"k%d" % number for number in range(12)]
    tmp_path.chmod(0o700)
    disk = MetadataStore(tmp_path / "meta")
    whole = ["t"] if seed % 2 else []
    store = RecentStore(disk, whole=whole)
    for _ in range(120):
        what = dice.random()
        if what < 0.6:
            changes = {dice.choice(keys): dice.choice([None, dice.randbytes(dice.choice((3, 3000)))]) for _ in range(3)}
            with store.show() as tables:
                for key, value in changes.items():
                    tables.put("t", key, value) if value is not None else tables.delete("t", key)
            for key, value in changes.items():
                visible.pop(key, None) if value is None else visible.update({key: value})
        elif what < 0.75:
            store.flush()
            durable = dict(visible)
        elif what < 0.8:
            disk.close()
            disk = MetadataStore(tmp_path / "meta")
            store = RecentStore(disk, whole=whole)
            visible = dict(durable)
        start, stop = sorted(dice.sample(keys, 2))
        assert list(store.scan("t", start, stop)) == sorted(
            (key, value) for key, value in visible.items() if start <= key < stop
        )
        assert all(store.get("t", key) == visible.get(key) for key in keys)
    disk.close()


def test_entries_that_only_show_are_applied_again_after_a_crash(tmp_path):
    """H27: what was flushed is the state of one index; what was only visible comes again from the log, and both ways
    end in the same digest.
    """
    tmp_path.chmod(0o700)
    entries = [Applying(1, 1, bootstrap(), in_force=True), *(Applying(index, 1, None) for index in range(2, 6))]
    with agreed(tmp_path / "a") as node:
        node.machine.show_all(entries[:3])
        node.machine.flush()
        node.machine.show_all(entries[3:])
        assert node.machine.applied_index == 5
        shown = node.machine.digest()
    with agreed(tmp_path / "a") as node:
        assert node.machine.applied == (3, 1)
        node.machine.apply_all(entries[3:])
        assert node.machine.digest() == shown
        node.machine.flush()
    with agreed(tmp_path / "b") as other:
        other.machine.apply_all(entries)
        assert other.machine.digest() == shown


def test_a_scan_does_not_look_through_other_tables(below):
    """F17: seconds of writes are recent; a scan of another table, which the event loop makes, costs nothing by them."""

    class Unseen(dict):
        def items(self):
            raise AssertionError("another table was looked through")

    store = RecentStore(below)
    with store.show() as rows:
        rows.put("t", b"a", b"1")
        rows.put("other", b"b", b"2")
    store._recent["other"] = Unseen(store._recent["other"])
    assert list(store.scan("t")) == [(b"a", b"1")]
    assert list(store.scan("third")) == []
    assert store.get("other", b"b") == b"2"
