"""The logged store: a metadata store whose rows may be in either of two files, which nobody can tell."""

from __future__ import annotations

import contextlib
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors
from srengine.storage import logged, wal
from srengine.storage.logged import LoggedStore, OfflineRows
from srengine.storage.metadata import MetadataStore
from srengine.storage.metadata_rows import Row, read_offline
from srengine.storage.pages import DATA_NAME
from tests.storage.logged.stores import (
    SMALL,
    Disk,
    change,
    crashed,
    fill,
    is_done,
    mixed,
    opened,
    transactions,
    wait_done,
    waiting,
)

# --- any history -----------------------------------------------------------------------------------------------------

TABLES = ("a", "b", "c")
keys = st.binary(min_size=1, max_size=2)
values = st.none() | st.integers(0, 3000).map(lambda size: size.to_bytes(2, "big") * (size // 2))
changes = st.lists(st.tuples(st.sampled_from(TABLES), keys, values), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(st.sampled_from(["change", "change", "begin", "begin", "fail"]), changes)
    | st.sampled_from([("settle", ()), ("reopen", ()), ("crash", ())]),
    max_size=20,
)


def check_equal(store, model, start, stop):
    # A table that was ever settled stays one, as in a metadata store.
    assert {table for table, rows in model.items() if rows} <= set(store.tables()) <= set(TABLES)
    for table in TABLES:
        wanted = model[table]
        assert list(store.scan(table)) == sorted(wanted.items())
        within = [
            (key, value)
            for key, value in sorted(wanted.items())
            if (start is None or key >= start) and (stop is None or key < stop)
        ]
        assert list(store.scan(table, start, stop)) == within
        assert [(row.key, row.value) for row in store.survey(table, start, stop) if row.sound] == within
        for key in [*wanted, b"\0\0", b"none"]:
            assert store.get(table, key) == wanted.get(key)


def begun(store, model, wanted, to):
    """Begin and finish a transaction, and see what a crash leaves of it; return False if it has to be one that waits,
    and nothing happened.
    """
    before = store._log._sector, waiting(store), transactions(store)
    disk = Disk(store)
    if not store.begin(wanted):
        store._appender = disk.appender
        assert (store._log._sector, waiting(store), transactions(store)) == before
        return False
    old = {table: sorted(rows.items()) for table, rows in model.items()}
    assert {table: list(store.scan(table)) for table in TABLES} == offline(crashed(store, to / "before")) == old
    disk.answer()
    wait_done(store)
    assert {table: list(store.scan(table)) for table in TABLES} == old, "nothing shows before it is finished"
    durable = offline(crashed(store, to / "between"))
    store.finish()
    assert not is_done(store)
    assert {table: list(store.scan(table)) for table in TABLES} == offline(crashed(store, to / "after")) == durable
    return True


def offline(path):
    with OfflineRows(path) as found:
        return {table: [(row.key, row.value) for row in found.survey(table) if row.sound] for table in TABLES}


@settings(max_examples=50)
@given(STEPS, st.none() | keys, st.none() | keys)
def test_any_history_equals_dictionaries(tmp_path_factory, steps, start, stop):
    """H02, F01: whatever is put, discarded, begun and finished, taken back, settled, reopened, or left behind by a
    process that died, the store shows what dicts would hold, and so does who reads its files without it. What was begun
    is there after a crash as soon as its end was told, and shows when it is finished.
    """
    root = tmp_path_factory.mktemp("logged")
    store = LoggedStore.open(root / "0", capacity=SMALL)
    left = [store]
    model = {table: {} for table in TABLES}
    try:
        for number, (what, wanted) in enumerate(steps, 1):
            if what == "change" or (what == "begin" and not begun(store, model, wanted, root / f"begun-{number}")):
                with store.transaction() as transaction:
                    change(transaction, wanted)
            if what in {"change", "begin"}:
                for table, key, value in wanted:
                    if value is None:
                        model[table].pop(key, None)
                    else:
                        model[table][key] = value
            elif what == "fail":
                with pytest.raises(KeyError), store.transaction() as transaction:
                    for table, key, value in wanted:
                        transaction.put(table, key, value or b"")
                    raise KeyError
            elif what == "settle":
                store.settle()
                assert waiting(store) == 0
            elif what == "reopen":
                store.close()
                store = LoggedStore.open(store.path)
                left.append(store)
            else:
                store = LoggedStore.open(crashed(store, root / str(number)))
                left.append(store)
            check_equal(store, model, start, stop)
        with OfflineRows(crashed(store, root / "last")) as offline:
            for table in TABLES:
                assert list(offline.survey(table)) == list(store.survey(table))
    finally:
        for found in left:
            found.close()
        shutil.rmtree(root)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (None, None),
        (b"0014", b"0014"),
        (b"0007", b"0008"),
        (b"0010", b"1000"),
        (b"0011", None),
        (None, b"0000"),
        (b"1199", b"3"),
        (b"9", None),
        (b"", b"0007"),
    ],
)
def test_pending_rows_cover_settled_ones(store, start, stop):
    """T01: a scan merges both in order of the keys, within its bounds, over many pages: pending rows win, also between,
    before and behind all others, and a row that is deleted is not there.
    """
    wanted = [
        item for item in sorted(mixed(store).items()) if item[0] >= (start or b"") and (stop is None or item[0] < stop)
    ]
    assert list(store.scan("t", start, stop)) == wanted
    assert list(store.survey("t", start, stop)) == [Row(key, value, sound=True) for key, value in wanted]


def test_one_row_is_found_wherever_it_is(store):
    """T03: `get` finds a row in the log, in LMDB and in neither; `tables` names those of both with anything in them."""
    wanted = mixed(store)
    for key in [*wanted, b"0010", b"0001", b"none"]:
        assert store.get("t", key) == wanted.get(key)
    assert store.get("new", b"k") == b"v"
    assert store.get("nothing", b"k") is None
    assert store.get("unknown", b"k") is None
    assert store.tables() == ["new", "t"]
    store.settle()
    assert waiting(store) == 0
    assert dict(store.scan("t")) == wanted
    assert store.tables() == ["new", "t"]


def test_a_damaged_row_is_named_unless_another_covers_it(store):
    """F10: a row of LMDB's file that fails its check is an error in `get` and `scan`, and is marked in a survey; one
    that is replaced or deleted by a pending row is gone.
    """
    fill(store, "t", {b"%d" % number: b"sound" for number in range(5)})
    store.settle()
    inner = store._store
    inner._environment.change([(inner._tables["t"], b"%d" % number, b"damaged bytes") for number in (1, 2, 3)])
    fill(store, "t", {b"1": b"new", b"3": None})
    found = {row.key: row for row in store.survey("t")}
    assert found.keys() == {b"0", b"1", b"2", b"4"}
    assert found[b"1"] == Row(b"1", b"new", sound=True)
    assert found[b"2"] == Row(b"2", b"damaged bytes", sound=False)
    assert store.get("t", b"1") == b"new"
    assert store.get("t", b"3") is None
    assert [key for key, _ in store.scan("t", None, b"2")] == [b"0", b"1"]
    for read in (lambda: store.get("t", b"2"), lambda: list(store.scan("t"))):
        with pytest.raises(errors.CorruptionError) as caught:
            read()
        assert (caught.value.table, caught.value.key) == ("t", b"2".hex())
        assert caught.value.file == str(store.path / DATA_NAME)
    fill(store, "t", {b"2": b"new"})
    assert [value for _, value in store.scan("t")] == [b"sound", b"new", b"new", b"sound"]
    store.settle()
    assert [value for _, value in store.scan("t")] == [b"sound", b"new", b"new", b"sound"]


def test_every_row_is_there_before_during_and_after_a_settle(store, monkeypatch):
    """H02: at no moment of a settle is a committed row in neither file for a reader."""
    wanted = {b"%03d" % number: b"v" for number in range(100)}
    fill(store, "t", wanted)
    inner = store._store.transaction
    seen = []

    def look():
        seen.append((dict(store.scan("t")), {key: store.get("t", key) for key in wanted}, store.tables()))

    def reading():
        reader = threading.Thread(target=look)
        reader.start()
        reader.join()

    @contextlib.contextmanager
    def watched():
        with inner() as transaction:
            reading()
            yield transaction
            reading()
        reading()

    monkeypatch.setattr(store._store, "transaction", watched)
    store.settle()
    reading()
    assert seen == [(wanted, wanted, ["t"])] * 4


def test_readers_never_miss_a_committed_row(path):
    """H02: while one thread writes and settles again and again, every row that was committed is seen by all others,
    with its value or a later one.
    """
    committed = 0
    wrong = []
    done = threading.Event()

    def read(store):
        while not done.is_set():
            before = committed
            newest, last = store.get("t", b"newest"), store.get("t", b"row-%04d" % before)
            rows = dict(store.scan("t", b"row-"))
            if (before and int(newest or b"0") < before) or (before and last is None):
                wrong.append((before, newest, last))
            if any(b"row-%04d" % number not in rows for number in range(1, before + 1)):
                wrong.append((before, len(rows)))

    with opened(path, SMALL) as store:
        readers = [threading.Thread(target=read, args=(store,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(1, 300):
                fill(store, "t", {b"newest": b"%d" % number, b"row-%04d" % number: bytes(number)})
                committed = number
        finally:
            done.set()
            for reader in readers:
                reader.join()
    assert not wrong


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_transaction_that_raises_changes_nothing(store, tmp_path):
    """T02, F53: an exception inside, Ctrl-C too, takes all of it back, in memory and in both files."""
    fill(store, "t", {b"k": b"old"})
    for raised in (KeyError, KeyboardInterrupt):
        with pytest.raises(raised), store.transaction() as transaction:
            transaction.put("t", b"k", b"new")
            transaction.put("other", b"k", b"v")
            transaction.discard("t", b"k")
            assert store.get("t", b"k") == b"old", "nothing shows before the end"
            raise raised
    assert list(store.scan("t")) == [(b"k", b"old")]
    assert store.tables() == ["t"]
    with opened(crashed(store, tmp_path / "copy")) as copy:
        assert (copy.tables(), list(copy.scan("t"))) == (["t"], [(b"k", b"old")])


@pytest.mark.parametrize("what", [("../x", b"k", b"v"), ("t", b"", b"v"), ("t", b"k" * 512, b"v"), ("t", b"", None)])
def test_what_is_no_row_is_refused_at_once(store, what):
    """T04, F40: tables are named as everything is, keys have 1 to 511 bytes: `InvalidValue`, and nothing changes."""
    table, key, value = what
    with pytest.raises(errors.InvalidValue), store.transaction() as transaction:
        transaction.put("t", b"before", b"v")
        transaction.discard(table, key) if value is None else transaction.put(table, key, value)
    assert (waiting(store), store.tables()) == (0, [])


def test_a_value_beyond_the_bound_is_refused(store, monkeypatch):
    """T04: a value that LMDB's side would refuse is refused before it is in the log."""
    monkeypatch.setattr(logged, "VALUE_BYTES_MAX", 100)
    with pytest.raises(errors.InvalidValue):
        fill(store, "t", {b"k": bytes(101)})
    assert waiting(store) == 0
    fill(store, "t", {b"k": bytes(100)})


def test_a_nested_transaction_is_refused(store):
    """T02: a transaction inside a transaction of the same thread is our caller's mistake and says so."""
    with store.transaction() as outer:
        with pytest.raises(errors.InvalidValue), store.transaction():
            pass
        outer.put("t", b"k", b"v")
    assert store.get("t", b"k") == b"v"


def test_a_transaction_is_over_when_it_is_over(store):
    """T02: a kept transaction object refuses what comes after its end, instead of losing it."""
    with store.transaction() as transaction:
        pass
    for late in (lambda: transaction.put("t", b"k", b"v"), lambda: transaction.discard("t", b"k")):
        with pytest.raises(errors.Closed):
            late()


def test_transactions_wait_for_each_other(store):
    """T02: another thread's transaction begins when this one is over; reading does not wait."""
    seen = []

    def other():
        fill(store, "t", {b"k": b"second"})

    with store.transaction() as transaction:
        writer = threading.Thread(target=other)
        writer.start()
        reader = threading.Thread(target=lambda: seen.append(store.get("t", b"k")))
        reader.start()
        reader.join()
        transaction.put("t", b"k", b"first")
    writer.join()
    assert seen == [None]
    assert store.get("t", b"k") == b"second"


def test_a_large_transaction_goes_to_lmdb_at_once(tmp_path):
    """A record of more than a MiB is not written twice, though it would fit: it settles what is pending with it, in one
    LMDB transaction.
    """
    with opened(tmp_path / "store", wal.CAPACITY) as store:
        check_large(store, tmp_path)


def check_large(store, tmp_path):
    fill(store, "t", {b"small": b"v", b"old": b"v"})
    before = transactions(store)
    fill(store, "t", {b"large": bytes(1 << 20), b"old": None})
    assert (transactions(store), waiting(store)) == (before + 1, 0)
    wanted = [(b"large", bytes(1 << 20)), (b"small", b"v")]
    assert list(store.scan("t")) == wanted
    copy = crashed(store, tmp_path / "copy")
    assert list(read_offline(copy, "t")) == wanted
    fill(store, "t", {b"next": b"v"})
    assert waiting(store) == 1
    with opened(crashed(store, tmp_path / "later")) as later:
        assert [key for key, _ in later.scan("t")] == [b"large", b"next", b"small"]


def test_a_full_log_settles(path, tmp_path):
    """The transaction that finds no room goes to LMDB with all that is pending, and the log begins again; between two
    of them LMDB is not written.
    """
    with opened(path, SMALL) as store:
        numbers = []
        for number in range(40):
            fill(store, "t", {b"%02d" % number: bytes(300)})
            numbers.append(transactions(store))
            with opened(crashed(store, tmp_path / str(number))) as copy:
                assert [key for key, _ in copy.scan("t")] == [b"%02d" % i for i in range(number + 1)]
        assert len(set(numbers)) == 40 // 9 + 1
        assert store._log.place.generation == 40 // 9 + 1


def test_a_settle_of_nothing_is_nothing(store):
    """No transaction, no new generation, when nothing is pending."""
    before = transactions(store), store._log.place
    store.settle()
    with store.transaction():
        pass
    assert (transactions(store), store._log.place) == before


def test_closing_settles(path):
    """What is closed in order is in LMDB's file alone."""
    with opened(path) as store:
        fill(store, "t", {b"k": b"v"})
        assert not list(read_offline(path, "t"))
    assert list(read_offline(path, "t")) == [(b"k", b"v")]
    store.close()


# --- without a process -----------------------------------------------------------------------------------------------


def test_files_are_read_as_an_open_store_shows_them(store, tmp_path):
    """Rows of the log over those of LMDB's file, sound and damaged ones, as the store itself surveys them."""
    mixed(store)
    store.settle()
    inner = store._store
    inner._environment.change([(inner._tables["t"], key, b"damaged bytes") for key in (b"0002", b"0004")])
    fill(store, "t", {b"0002": b"covered", b"0006": None, b"0007x": b"between", b"0008": None, b"0010": b"v"})
    fill(store, "t", {b"0002": b"and again", b"0008": b"back", b"0010": None})
    fill(store, "newer", {b"k": b"v"})
    fill(store, "gone", {b"k": None})
    with OfflineRows(crashed(store, tmp_path / "copy")) as offline:
        for table in ("t", "new", "newer", "gone", "unknown"):
            assert list(offline.survey(table)) == list(store.survey(table))
        offline.close()
    with pytest.raises(errors.NotFound):
        OfflineRows(tmp_path / "nothing")


def test_an_older_store_is_read_without_a_log(path):
    """One that knew no log has its rows in LMDB's file alone."""
    with MetadataStore(path) as inner, inner.transaction() as transaction:
        transaction.put("t", b"k", b"v")
    with OfflineRows(path) as offline:
        assert list(offline.survey("t")) == [Row(b"k", b"v", sound=True)]
