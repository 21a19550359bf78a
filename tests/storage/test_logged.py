"""The logged store: a metadata store whose rows may be in either of two files, which nobody can tell."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors
from srengine.storage import fences, logged, metadata, wal
from srengine.storage.logged import LoggedStore, OfflineRows, recover_logged
from srengine.storage.metadata import MetadataStore
from srengine.storage.metadata_rows import Row, read_offline
from srengine.storage.pages import DATA_NAME

SMALL = 4096
"""A log of eight sectors: it is full all the time."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    with opened(path) as found:
        yield found


@contextlib.contextmanager
def opened(path, capacity=wal.CAPACITY // 16):
    store = LoggedStore.open(path, capacity=capacity)
    try:
        yield store
    finally:
        store.close()


def fill(store, table, rows):
    """Put rows, None deletes, in one transaction."""
    with store.transaction() as transaction:
        for key, value in dict(rows).items():
            if value is None:
                transaction.discard(table, key)
            else:
                transaction.put(table, key, value)


def crashed(store, to):
    """Copy a store that is open: what a process that dies now leaves behind."""
    shutil.copytree(store.path, to)
    return to


def waiting(store):
    """Return how many rows are not in LMDB yet."""
    return sum(len(rows) for rows in store._pending.values())


def changing(table, rows):
    """Return what fills a transaction that is begun."""

    def change(transaction):
        for key, value in dict(rows).items():
            if value is None:
                transaction.discard(table, key)
            else:
                transaction.put(table, key, value)

    return change


def is_done(store):
    """Return whether the descriptor says that what was begun has ended."""
    return bool(select.select([store.done], [], [], 0)[0])


def wait_done(store):
    select.select([store.done], [], [])


class Disk:
    """The disk under a store's write-ahead log for the next record that is begun: it does not answer before `answer`,
    or until somebody waits for it, and fails then with ``code`` unless that is 0.
    """

    def __init__(self, store, code=0):
        self._store = store
        self._code = code
        self._held = None
        self.appender, store._appender = store._appender, self

    def begin(self, *given):
        self._held = given

    def answer(self):
        if self._code:
            os.write(self._store._notify, b"!")
        else:
            self.appender.begin(*self._held)
        self._held = None

    def take(self):
        if self._held is not None:
            self.answer()
        self._store._appender = self.appender
        return self._code or self.appender.take()

    def close(self):
        self.appender.close()


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


def change(transaction, wanted):
    for table, key, value in wanted:
        if value is None:
            transaction.discard(table, key)
        else:
            transaction.put(table, key, value)


def begun(store, model, wanted, to):
    """Begin and finish a transaction, and see what a crash leaves of it; return False if it has to be one that waits,
    and nothing happened.
    """
    before = store._log._sector, waiting(store), transactions(store)
    disk = Disk(store)
    if not store.begin(lambda transaction: change(transaction, wanted)):
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


def mixed(store):
    """Fill table t with settled rows of several pages of a scan, cover some, and return what is to be seen."""
    settled = {b"%04d" % number: b"settled" for number in range(0, 1200, 2)}
    fill(store, "t", settled)
    store.settle()
    pending = {b"%04d" % number: b"pending" for number in range(0, 1200, 7)}
    pending |= {b"%04d" % number: None for number in range(0, 1200, 10)}
    pending |= {b"000": b"before all", b"2": b"behind all", b"1199": b"last but one"}
    fill(store, "t", pending)
    fill(store, "new", {b"k": b"v"})
    fill(store, "nothing", {b"k": None})
    assert waiting(store) == len(pending) + 2
    return {key: value for key, value in {**settled, **pending}.items() if value is not None}


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


def transactions(store):
    return store._store._environment.last_transaction()


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


@contextlib.contextmanager
def begun_and_finished(store, rows):
    assert store.begin(changing("t", rows))
    yield
    store.finish()


def fill_log(store):
    """Leave less room in the log than a row of 100 bytes takes."""
    while store._log.fits(bytes(100)):
        fill(store, "full", {b"k": bytes(100)})


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
            changing("t", rows)(transaction)
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
        assert not store.begin(lambda transaction: pytest.fail("nobody asks for changes that are not begun"))

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


def test_changes_that_raise_begin_nothing(store):
    """T02, T04, F53: when the changes cannot be made, nothing was begun and the store is free; a transaction that was
    begun takes no more.
    """
    kept = []

    def wrong(transaction):
        transaction.put("t", b"k", b"v")
        transaction.put("../x", b"k", b"v")

    for _ in range(2):
        with pytest.raises(errors.InvalidValue):
            store.begin(wrong)
    with pytest.raises(KeyboardInterrupt):
        store.begin(lambda transaction: signal.raise_signal(signal.SIGINT))
    assert not is_done(store)
    assert store.begin(kept.append)
    with pytest.raises(errors.Closed):
        kept[0].put("t", b"k", b"late")
    store.finish()
    thread = threading.Thread(target=fill, args=(store, "t", {b"k": b"v"}))
    thread.start()
    thread.join()
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
    store.close()
    assert fences.read_fence(store.path).reason == "io-error"
    with pytest.raises(errors.TabletFenced):
        LoggedStore.open(store.path)
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


# --- what LMDB would refuse ------------------------------------------------------------------------------------------


def fill_tables(store, names, *, begins=False):
    wanted = [(name, b"k", b"v") for name in names]
    if begins and store.begin(lambda transaction: change(transaction, wanted)):
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


def calls(store):
    """Everything that a store may be asked, for a row that is pending and for one that is not."""
    return (
        lambda: store.get("t", b"pending"),
        lambda: store.get("t", b"settled"),
        lambda: list(store.scan("t")),
        lambda: list(store.survey("t")),
        lambda: list(store.scan("unknown")),
        store.tables,
        lambda: fill(store, "t", {b"k": b"v"}),
    )


def both(store):
    fill(store, "t", {b"settled": b"v"})
    store.settle()
    fill(store, "t", {b"pending": b"v"})


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


@contextlib.contextmanager
def log_on(store, path, flags):
    """Let an open store write its log to another file."""
    log = store._log
    kept, other = os.dup(log._fd), os.open(path, flags)
    os.dup2(other, log._fd)
    try:
        yield
    finally:
        os.dup2(kept, log._fd)
        os.close(kept)
        os.close(other)


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


def fenced(store):
    """Commit two rows, one of them settled; then let the log fail."""
    both(store)
    with log_on(store, os.devnull, os.O_RDONLY), pytest.raises(errors.TabletFenced):
        fill(store, "t", {b"failed": b"v"})


def test_a_log_that_cannot_be_written_fences(store):
    """F05: any other error of the log fences the store, durably: it answers and writes nothing any more, does not open,
    and has what was committed once it was proved.
    """
    fenced(store)
    for call in calls(store):
        with pytest.raises(errors.TabletFenced):
            call()
    store.close()
    assert fences.read_fence(store.path).reason == "io-error"
    with pytest.raises(errors.TabletFenced):
        LoggedStore.open(store.path)
    recover_logged(store.path)
    assert fences.read_fence(store.path) is None
    recover_logged(store.path)
    with opened(store.path) as again:
        assert [key for key, _ in again.scan("t")] == [b"pending", b"settled"]


def damage_wal(path):
    with (path / wal.WAL_NAME).open("r+b") as file:
        file.seek(100)
        file.write(b"damage")


def damage_value(path):
    with MetadataStore(path) as inner:
        inner._environment.change([(inner._tables["t"], b"settled", b"damaged bytes")])


def damage_place(path):
    with MetadataStore(path) as inner:
        inner._environment.change([(inner._tables["wal"], b"place", b"damaged bytes")])


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
