"""The metadata store: durable, checked, growing, honest about faults."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors, limits
from srengine.storage import fences, pages
from srengine.storage.metadata import MetadataStore
from srengine.storage.metadata_rows import recover_metadata
from tests.crash import children, record


@pytest.fixture
def store(tmp_path):
    with MetadataStore(tmp_path / "meta", map_bytes=65536) as opened:
        yield opened


def fill(store, table, rows):
    with store.transaction() as t:
        for key, value in rows:
            t.put(table, key, value)


def test_what_was_committed_is_there_after_reopening(tmp_path):
    """T03: rows of several tables survive a reopen; unknown tables and keys are empty and None."""
    with MetadataStore(tmp_path / "meta") as store:
        fill(store, "boot", [(b"node", b"7")])
        fill(store, "members", [(b"b", b"2"), (b"a", b"1"), (b"c", b"")])
    with MetadataStore(tmp_path / "meta") as store:
        assert store.get("boot", b"node") == b"7"
        assert list(store.scan("members")) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"")]
        assert store.tables() == ["boot", "members"]
        assert store.get("members", b"z") is None
        assert store.get("unknown", b"z") is None
        assert list(store.scan("unknown")) == []


def test_a_transaction_is_all_or_nothing(store):
    """T02: an exception inside the with-block takes all of it back, new tables included."""
    fill(store, "t", [(b"k", b"old")])
    with pytest.raises(KeyError), store.transaction() as t:
        t.put("t", b"k", b"new")
        t.put("other", b"k", b"v")
        assert t.get("t", b"k") == b"new"
        raise KeyError
    assert store.get("t", b"k") == b"old"
    assert store.tables() == ["t"]
    fill(store, "other", [(b"k", b"v")])
    assert store.get("other", b"k") == b"v"


def test_keyboard_interrupt_takes_a_transaction_back(store):
    """F53: Ctrl-C inside a transaction leaves nothing of it, and the next one is not blocked."""
    with pytest.raises(KeyboardInterrupt), store.transaction() as t:
        t.put("t", b"k", b"v")
        raise KeyboardInterrupt
    assert store.get("t", b"k") is None
    fill(store, "t", [(b"k", b"v")])


def test_reads_in_a_transaction_see_its_changes_and_others_do_not(store):
    """T02: inside, a scan merges what was changed; outside, nothing shows before the end."""
    fill(store, "t", [(b"%03d" % i, b"old") for i in range(300)])
    with store.transaction() as t:
        t.put("t", b"0005", b"between")
        assert t.delete("t", b"299")
        assert not t.delete("t", b"299")
        rows = dict(t.scan("t", b"000", b"290"))
        assert rows[b"0005"] == b"between"
        assert len(rows) == 291
        seen = []
        reader = threading.Thread(target=lambda: seen.append((store.get("t", b"0005"), store.get("t", b"299"))))
        reader.start()
        reader.join()
        assert seen == [(None, b"old")]
    assert store.get("t", b"0005") == b"between"


def test_scans_are_half_open_ranges(store):
    """T01: scan(start, stop) gives start <= key < stop in order, also over many pages of rows."""
    keys = [b"%05d" % i for i in range(1000)]
    fill(store, "t", [(key, key) for key in keys])
    assert [key for key, _ in store.scan("t", b"00100", b"00900")] == keys[100:900]
    assert [key for key, _ in store.scan("t", None, b"00001")] == keys[:1]
    assert [key for key, _ in store.scan("t", b"00999")] == keys[999:]
    with store.transaction() as t:
        assert t.delete_range("t", b"00010", b"00990") == 980
    assert [key for key, _ in store.scan("t")] == keys[:10] + keys[990:]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.binary(min_size=1, max_size=4), st.none() | st.binary(max_size=40)),
        max_size=60,
    )
)
def test_tables_are_sorted_maps(tmp_path_factory, changes):
    """T01: any puts and deletes over two tables equal two dicts, before and after a reopen."""
    path = tmp_path_factory.mktemp("m") / "meta"
    model = {"a": {}, "b": {}}
    with MetadataStore(path, map_bytes=65536) as store:
        for start in range(0, len(changes), 7):
            with store.transaction() as t:
                for table, key, value in changes[start : start + 7]:
                    if value is None:
                        assert t.delete(table, key) == (model[table].pop(key, None) is not None)
                    else:
                        t.put(table, key, value)
                        model[table][key] = value
    with MetadataStore(path) as store:
        for table, wanted in model.items():
            assert list(store.scan(table)) == sorted(wanted.items())
    shutil.rmtree(path.parent)


def test_the_map_grows_between_and_inside_transactions(store):
    """T05: from 64 KiB, megabytes go in, in many transactions and in one, while other threads read."""
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            if store.get("t", b"first") not in {None, b"1"}:
                wrong.append("value")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        fill(store, "t", [(b"first", b"1")])
        for n in range(8):
            fill(store, "t", [(b"%d-%d" % (n, i), bytes(1500)) for i in range(60)])
        fill(store, "t", [(b"one-%d" % i, bytes(5000)) for i in range(200)])
        fill(store, "t", [(b"huge", bytes(3_000_000))])
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert sum(1 for _ in store.scan("t")) == 1 + 8 * 60 + 200 + 1
    assert store.get("t", b"huge") == bytes(3_000_000)


def test_a_full_map_in_the_middle_of_a_scan_in_a_transaction(store):
    """T05: when the map grows inside a transaction its scans go on where they were."""
    fill(store, "t", [(b"%05d" % i, b"x") for i in range(1000)])
    with store.transaction() as t:
        seen = []
        for key, _ in t.scan("t"):
            seen.append(key)
            t.put("u", key, bytes(2000))
    assert seen == [b"%05d" % i for i in range(1000)]
    assert sum(1 for _ in store.scan("u")) == 1000


def test_many_rows_at_once(store, monkeypatch):
    """T01, T05: what `put` and `discard` one by one would come to, in a new table, too, while the map grows; what came
    earlier in the transaction gives way to it, and it to what comes later.
    """
    fill(store, "t", [(b"gone", b"1"), (b"old", b"1")])
    many = {b"%05d" % (number * 7 % 1000): bytes(300) for number in range(1000)}
    with store.transaction() as t:
        t.put("t", b"old", b"2")
        t.put("new", b"00001", b"given way")
        t.change({"t": {b"old": b"3", b"gone": None, b"never": None}, "new": many, "none": {b"k": None}, "empty": {}})
        t.discard("new", b"00002")
        assert t.get("t", b"old") == b"3"
        assert t.get("new", b"00001") == bytes(300)
    assert list(store.scan("t")) == [(b"old", b"3")]
    assert dict(store.scan("new")) == {key: value for key, value in many.items() if key != b"00002"}
    assert store.tables() == ["new", "t"]
    monkeypatch.setattr("srengine.storage.metadata.TRANSACTION_ROWS_MAX", 3)
    with pytest.raises(errors.InvalidValue, match="at most 3 rows"), store.transaction() as t:
        t.put("t", b"x", b"")
        t.change({"t": {b"a": b"", b"b": b"", b"c": None}})
    with store.transaction() as t:
        t.put("t", b"x", b"")
        t.change({"t": {b"a": b"", b"b": b""}})
    assert [key for key, _ in store.scan("t")] == [b"a", b"b", b"old", b"x"]


@pytest.mark.parametrize(
    "rows",
    [
        {"t": {b"k": b"v", b"": b"v"}},
        {"t": {b"k": b"v", b"x" * 512: None}},
        {"t": {b"k": b"v", b"l": bytes(limits.ENTRY_BYTES_MAX + 1)}},
        {"t": {b"k": b"v"}, "a b": {b"k": None}},
    ],
    ids=["empty key", "long key", "long value", "no name"],
)
def test_of_many_rows_all_or_none_are_taken(store, rows):
    """T04: one that cannot be keeps all of them out, and the transaction goes on without."""
    with store.transaction() as t:
        t.put("t", b"before", b"v")
        with pytest.raises(errors.InvalidValue):
            t.change(rows)
    assert list(store.scan("t")) == [(b"before", b"v")]


@pytest.mark.parametrize("key", [b"", b"x" * 512])
def test_keys_out_of_bounds_are_refused(store, key):
    """T04: keys have 1 to 511 bytes."""
    fill(store, "t", [(b"k" * 511, b"v")])
    for action in (lambda t: t.put("t", key, b""), lambda t: t.get("t", key), lambda t: t.delete("t", key)):
        with pytest.raises(errors.InvalidValue), store.transaction() as t:
            action(t)
    assert [name for name, _ in store.scan("t")] == [b"k" * 511]


@pytest.mark.parametrize("table", ["", "../x", "a b", "x" * 129, "a\0"])
def test_table_names_are_names(store, table):
    """F40: a table is named like everything else."""
    with pytest.raises(errors.InvalidValue), store.transaction() as t:
        t.put(table, b"k", b"v")


def test_a_nested_transaction_is_refused(store):
    """T02: a transaction inside a transaction of the same thread is our caller's mistake and says so."""
    with store.transaction(), pytest.raises(errors.InvalidValue), store.transaction():
        pass


def test_a_transaction_is_over_when_it_is_over(store):
    """T02: a kept transaction object refuses what comes after its end."""
    with store.transaction() as t:
        pass
    with pytest.raises(errors.Closed):
        t.put("t", b"k", b"v")
    store.close()
    with pytest.raises(errors.Closed):
        store.get("t", b"k")
    with pytest.raises(errors.Closed), store.transaction():
        pass
    store.close()


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_value_is_named(tmp_path):
    """F10, T11: a value with a flipped bit is never returned: `CorruptionError` names table and key, others go on."""
    path = tmp_path / "meta"
    with MetadataStore(path) as store:
        fill(store, "t", [(b"damaged", b"find this value"), (b"sound", b"another one")])
    data = path / pages.DATA_NAME
    raw = bytearray(data.read_bytes())
    at = raw.find(b"find this value")
    while at >= 0:
        raw[at + 3] ^= 4
        at = raw.find(b"find this value", at + 1)
    data.write_bytes(raw)
    with MetadataStore(path) as store:
        with pytest.raises(errors.CorruptionError) as caught:
            store.get("t", b"damaged")
        assert caught.value.table == "t"
        assert caught.value.key == b"damaged".hex()
        assert store.get("t", b"sound") == b"another one"
        with pytest.raises(errors.CorruptionError):
            list(store.scan("t"))


def test_a_value_moved_to_another_key_or_table_is_noticed(store):
    """F10: the checksum covers table and key: a sound value in the wrong place is damage."""
    fill(store, "t", [(b"a", b"1"), (b"b", b"2")])
    table = store._tables["t"]
    store._environment.change([(table, b"a", store._environment.get(table, b"b"))])
    with pytest.raises(errors.CorruptionError):
        store.get("t", b"a")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda raw: b"", errors.TruncatedTablet),
        (lambda raw: raw[: len(raw) // 2], errors.TruncatedTablet),
        (lambda raw: bytes(len(raw)), errors.ForeignData),
        (lambda raw: raw[:16] + bytes(4) + raw[20:], errors.CorruptionError),
    ],
)
def test_a_truncated_or_foreign_file_is_refused(tmp_path, damage, error):
    """T14, F11: the process does not die by SIGBUS; the start is refused and the file unharmed."""
    path = tmp_path / "meta"
    with MetadataStore(path) as store:
        fill(store, "t", [(b"%d" % i, bytes(1000)) for i in range(100)])
    data = path / pages.DATA_NAME
    damaged = damage(data.read_bytes())
    data.write_bytes(damaged)
    with pytest.raises(error):
        MetadataStore(path)
    assert data.read_bytes() == damaged


def test_a_missing_file_is_damage(tmp_path):
    """T14: a directory without its file is not silently begun again."""
    path = tmp_path / "meta"
    MetadataStore(path).close()
    (path / pages.DATA_NAME).unlink()
    with pytest.raises(errors.CorruptionError):
        MetadataStore(path)
    with pytest.raises(errors.NotFound):
        MetadataStore(tmp_path / "other", create=False)


def test_an_environment_of_somebody_else_is_foreign(tmp_path):
    """T14: an LMDB environment that is no metadata store is refused."""
    path = tmp_path / "meta"
    path.mkdir(mode=0o700)
    lmdb.open(str(path), mode=0o600).close()
    (path / "data.mdb").chmod(0o600)
    with pytest.raises(errors.ForeignData):
        MetadataStore(path)


def test_a_loose_directory_is_refused(tmp_path):
    """F52: the store's directory and file are private."""
    path = tmp_path / "meta"
    MetadataStore(path).close()
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "data.mdb").stat().st_mode & 0o777 == 0o600
    path.chmod(0o755)
    with pytest.raises(errors.UnsafePermissions):
        MetadataStore(path)
    MetadataStore(path, insecure=True).close()


# --- faults ----------------------------------------------------------------------------------------------------------

OPEN = """
store = storage.MetadataStore(sys.argv[1])
def put(n):
    def action():
        with store.transaction() as t:
            t.put("t", b"%d" % n, b"v")
    return action
put(0)()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return record.build_recorder(tmp_path_factory.mktemp("recorder"))


@pytest.mark.parametrize("kind", ["SYNC", "META"])
def test_an_input_output_error_fences(library, tmp_path, kind):
    """F05, F06: EIO of a sync or of the meta page fences the store, durably, and nothing is acknowledged after it."""
    path = tmp_path / "meta"
    ended = children.run(
        (
            OPEN,
            f"break_from_now({kind}, 5)\n",
            "tell([code_of(put(1)), code_of(put(2)), code_of(lambda: store.get('t', b'0'))])\n",
        ),
        path,
        library=library,
    )
    assert ended.told == ["FENCED", "FENCED", "FENCED"], ended.errors
    assert fences.read_fence(path) is not None
    with pytest.raises(errors.TabletFenced):
        MetadataStore(path)
    recover_metadata(path)
    recover_metadata(path)
    with MetadataStore(path) as store:
        assert [key for key, _ in store.scan("t")] == [b"0"]
        fill(store, "t", [(b"2", b"v")])


def test_a_full_disk_comes_back(library, tmp_path):
    """F07: ENOSPC is `DiskFull`; reads go on, and writes when space returns."""
    ended = children.run(
        (
            OPEN,
            """
            break_from_now(WRITE, 28)
            tell([code_of(put(1)), store.get("t", b"0").decode(), code_of(put(2)), store.get("t", b"1")])
            """,
        ),
        tmp_path / "meta",
        library=library,
    )
    assert ended.told == ["DISK_FULL", "v", None, None], ended.errors


@pytest.mark.requires_root
def test_a_small_file_system_that_fills_up(tmp_path):
    """F07: a write cut short by a full disk is `DiskFull`, not an input/output error; space back, it goes on."""
    with children.small_file_system(tmp_path / "small") as mount:
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(500_000))
        with MetadataStore(mount / "meta") as store:
            with pytest.raises(errors.DiskFull):
                for n in range(10_000):
                    fill(store, "t", [(b"%d-%d" % (n, i), bytes(1000)) for i in range(50)])
            assert store.get("t", b"0-0") == bytes(1000)
            ballast.unlink()
            fill(store, "t", [(b"after", b"v")])
            assert store.get("t", b"after") == b"v"


def test_every_kill_leaves_a_store_that_opens(library, tmp_path):
    """T02, F01: SIGKILL before each write and sync of a making and a transaction: all of it or nothing."""
    source = (OPEN, "tell('first')\nput(1)()\ntell('second')\ntell(events())")
    counted = children.run(source, tmp_path / "counted", library=library)
    assert counted.code == 0, counted.errors
    for number in range(1, counted.told + 1):
        path = tmp_path / f"at-{number}"
        ended = children.run(source, path, library=library, kill_at=number)
        assert ended.code == -signal.SIGKILL
        with MetadataStore(path) as store:
            rows = [key for key, _ in store.scan("t")]
        assert rows in ([], [b"0"], [b"0", b"1"])
        assert len(rows) >= len(ended.lines)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_unharmed(store):
    """F18, T14: after a fork the child gets `ForkedEnvironment` from every call; the parent goes on."""
    fill(store, "t", [(b"k", b"v")])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for action in (
            lambda: store.get("t", b"k"),
            lambda: list(store.scan("t")),
            lambda: store.transaction().__enter__(),
            store.tables,
        ):
            try:
                action()
                told.append("no error")
            except errors.Error as error:
                told.append(error.code)
        store.close()
        os.write(writer, " ".join(told).encode())
        os._exit(0)
    os.close(writer)
    told = os.read(reader, 1000)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert told == b"FORKED FORKED FORKED FORKED"
    fill(store, "t", [(b"k", b"again")])
    assert store.get("t", b"k") == b"again"
