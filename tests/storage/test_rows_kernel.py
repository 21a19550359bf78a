"""The kernel `rows` against dictionaries, and what it refuses."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine._native import rows
from srengine._native.rows import Environment, RowsError
from srengine.storage.metadata_rows import Row, read_row

MAP_BYTES = 1 << 22
TABLES = (b"one", b"two")
keys = st.binary(min_size=1, max_size=3)
changes = st.lists(st.tuples(st.sampled_from(TABLES), keys, st.none() | st.binary(max_size=40)), max_size=12)


def opened(path, map_bytes=MAP_BYTES):
    return Environment(os.fsencode(path), map_bytes, 8, 0o600)


def with_tables(path, names=TABLES, **settings):
    """An environment with empty tables, and their handles."""
    environment = opened(path, **settings)
    writer = environment.begin()
    handles = {name: writer.open_table(name) for name in names}
    writer.commit()
    return environment, handles


def all_rows(source, table):
    found, last = source.page(table, None, False, None, 1 << 20, 1 << 30)
    assert last
    return found


def between(model, start, after, stop):
    return [
        (key, value)
        for key, value in sorted(model.items())
        if (start is None or key > start or (key == start and not after)) and (stop is None or key < stop)
    ]


@given(st.data())
def test_the_kernel_does_what_dictionaries_do(tmp_path_factory, data):
    """Changes in one call or in a transaction, committed or taken back, read by key and by range, page by page."""
    environment, handles = with_tables(tmp_path_factory.mktemp("rows"))
    model = {name: {} for name in TABLES}
    for _ in range(data.draw(st.integers(1, 4))):
        wanted = data.draw(changes)
        given_rows = [(handles[name], key, value) for name, key, value in wanted]
        after = {name: dict(table) for name, table in model.items()}
        for name, key, value in wanted:
            if value is None:
                after[name].pop(key, None)
            else:
                after[name][key] = value
        how = data.draw(st.sampled_from(["one call", "committed", "taken back", "emptied"]))
        if how == "one call":
            environment.change(given_rows)
        else:
            writer = environment.begin()
            writer.change(given_rows)
            if how == "emptied":
                writer.empty(handles[b"one"])
                after[b"one"] = {}
            for name in TABLES:
                assert dict(all_rows(writer, handles[name])) == after[name]
                assert dict(all_rows(environment, handles[name])) == model[name]
            writer.abort() if how == "taken back" else writer.commit()
        if how != "taken back":
            model = after
    start, stop = data.draw(st.none() | keys), data.draw(st.none() | keys)
    skips = data.draw(st.booleans())
    for name in TABLES:
        for key in [*model[name], b"none"]:
            assert environment.get(handles[name], key) == model[name].get(key)
        expected = between(model[name], start, skips, stop)
        found, last = [], False
        position, after_it = start, skips
        while not last:
            page, last = environment.page(handles[name], position, after_it, stop, 2, 1 << 20)
            assert last or len(page) == 2
            found += page
            position, after_it = (page[-1][0], True) if page else (position, after_it)
        assert found == expected
    environment.close()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["one", "two"]), st.binary(min_size=1, max_size=3), st.none() | st.binary(max_size=40)
        ),
        max_size=30,
    ),
    st.data(),
)
def test_rows_by_name_are_stored_with_their_seal(tmp_path_factory, wanted, data):
    """One by one or many of a table, in any order: the last of a key holds, and each value has its seal behind it."""
    environment, handles = with_tables(tmp_path_factory.mktemp("rows"))
    tables = {name.decode(): handle for name, handle in handles.items()}
    model = {name: {} for name in tables}
    given_rows = []
    for name, key, value in wanted:
        if given_rows and len(given_rows[-1]) == 2 and given_rows[-1][0] == name and data.draw(st.booleans()):
            given_rows[-1][1][key] = value
        else:
            given_rows.append(data.draw(st.sampled_from([(name, key, value), (name, {key: value}), (name, {})])))
            if given_rows[-1] == (name, {}):
                given_rows[-1][1][key] = value
        model[name][key] = value
    environment.change(given_rows, tables)
    for name, handle in tables.items():
        expected = [Row(key, value, sound=True) for key, value in sorted(model[name].items()) if value is not None]
        assert [read_row(name, key, stored) for key, stored in all_rows(environment, handle)] == expected
    environment.close()


def test_sealed_values_of_every_size(tmp_path):
    """Also those that LMDB keeps on pages of their own, beside rows that are stored as they are."""
    environment, handles = with_tables(tmp_path)
    table = handles[b"one"]
    values = {b"%06d" % size: bytes([size % 251]) * size for size in (0, 1, 8, 500, 2000, 4096, 70_000, 1_000_000)}
    writer = environment.begin()
    writer.change([("one", dict(reversed(values.items()))), (handles[b"two"], b"raw", b"as it is")], {"one": table})
    writer.commit()
    rows_read = [read_row("one", key, stored) for key, stored in all_rows(environment, table)]
    assert rows_read == [Row(key, value, sound=True) for key, value in values.items()]
    assert all_rows(environment, handles[b"two"]) == [(b"raw", b"as it is")]
    stored = environment.get(table, b"000500")
    assert not read_row("two", b"000500", stored).sound
    assert not read_row("one", b"000501", stored).sound


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (("unknown", b"k", b"v"), KeyError),
        (("one", {b"k": "v"}), TypeError),
        (("one", {"k": b"v"}), TypeError),
        (("one", [(b"k", b"v")]), TypeError),
        (("one", {b"k" * 600: b"v"}), RowsError),
        (("o" * 70_000, b"k", b"v"), ValueError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_named_rows_that_are_none_change_nothing(tmp_path, row, error):
    """What is no row, and a table without a handle."""
    environment, handles = with_tables(tmp_path)
    tables = {"one": handles[b"one"], "o" * 70_000: handles[b"two"]}
    with pytest.raises(error):
        environment.change([("one", b"a", b"1"), row], tables)
    assert all_rows(environment, handles[b"one"]) == []


def test_a_page_ends_at_its_bound_of_bytes(tmp_path):
    """A page has one row at least, and none after the bound is reached."""
    environment, handles = with_tables(tmp_path)
    table = handles[b"one"]
    environment.change([(table, b"%d" % number, bytes(100)) for number in range(9)])
    page, last = environment.page(table, None, False, None, 100, 1)
    assert ([key for key, _ in page], last) == ([b"0"], False)
    page, last = environment.page(table, b"0", True, None, 100, 250)
    assert ([key for key, _ in page], last) == ([b"1", b"2", b"3"], False)


def test_everything_is_there_after_opening_again(tmp_path):
    """Tables are found by name, rows by key."""
    environment, handles = with_tables(tmp_path)
    environment.change([(handles[b"two"], b"k", b"v")])
    before = environment.last_transaction()
    environment.close()
    environment.close()
    environment = opened(tmp_path)
    found = environment.tables()
    assert set(found) == set(TABLES)
    assert environment.get(found[b"two"], b"k") == b"v"
    assert environment.last_transaction() == before


def test_a_full_map_takes_everything_back(tmp_path):
    """MAP_FULL: nothing of the call is there; with a larger map the same call goes through."""
    environment, handles = with_tables(tmp_path, map_bytes=1 << 16)
    table = handles[b"one"]
    wanted = [(table, b"%04d" % number, bytes(1000)) for number in range(200)]
    with pytest.raises(RowsError) as caught:
        environment.change(wanted)
    assert caught.value.code == rows.MAP_FULL
    assert all_rows(environment, table) == []
    page_bytes, used = environment.sizes()
    assert page_bytes * used <= 1 << 16
    environment.set_map_bytes(MAP_BYTES)
    environment.change(wanted)
    assert len(all_rows(environment, table)) == 200


@pytest.mark.parametrize(
    "row", [(b"k" * 600, b"v"), (b"", b"v"), ("k", b"v"), (b"k", "v"), (b"k", bytearray(b"v"))], ids=str
)
def test_what_is_no_row_changes_nothing(tmp_path, row):
    """Keys that LMDB does not take are errors with a code, other types a TypeError; rows before them stay out, too."""
    environment, handles = with_tables(tmp_path)
    table = handles[b"one"]
    with pytest.raises((RowsError, TypeError)):
        environment.change([(table, b"a", b"1"), (table, *row)])
    assert all_rows(environment, table) == []


def test_what_is_closed_or_over_refuses(tmp_path):
    """No call reaches LMDB after the end of an environment or a transaction."""
    environment, handles = with_tables(tmp_path)
    table = handles[b"one"]
    writer = environment.begin()
    writer.commit()
    writer.abort()  # nothing happens
    for call in (
        writer.commit,
        lambda: writer.get(table, b"k"),
        lambda: writer.change([]),
        lambda: writer.empty(table),
        lambda: writer.open_table(b"x"),
        lambda: writer.page(table, None, False, None, 1, 1),
    ):
        with pytest.raises(RowsError) as caught:
            call()
        assert caught.value.code == errno.EINVAL
    environment.close()
    for call in (
        environment.tables,
        environment.begin,
        environment.sizes,
        environment.last_transaction,
        lambda: environment.get(table, b"k"),
        lambda: environment.page(table, None, False, None, 1, 1),
        lambda: environment.change([]),
        lambda: environment.set_map_bytes(MAP_BYTES),
    ):
        with pytest.raises(RowsError) as caught:
            call()
        assert caught.value.code == errno.EINVAL
    with pytest.raises(RowsError) as caught:
        opened(tmp_path / "missing")
    assert caught.value.code == errno.ENOENT


def test_a_call_that_waits_lets_others_run(tmp_path):
    """`change` waits for another writer without the interpreter: else this thread could not end that one."""
    environment, handles = with_tables(tmp_path)
    table = handles[b"one"]
    writer = environment.begin()
    writer.change([(table, b"k", b"first")])
    waiting = threading.Thread(target=environment.change, args=([(table, b"k", b"second")],))
    waiting.start()
    assert environment.get(table, b"k") is None
    writer.commit()
    waiting.join(60)
    assert not waiting.is_alive()
    assert environment.get(table, b"k") == b"second"
