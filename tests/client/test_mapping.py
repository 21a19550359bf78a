"""A table is a MutableMapping of bytes: every method of the contract, against a dict as oracle."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator, MutableMapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

import srengine
from srengine import errors
from srengine.client import Client, Table
from tests.client.fake import FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster({"shop.orders": 4})


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[Client]:
    with Client("tcp://n1:1", source=cluster.source, timeout_s=5) as client:
        yield client


@pytest.fixture
def table(client: Client) -> Table:
    return client.table("shop.orders")


PAIRS = {b"key-%03d" % number: b"value-%d" % number for number in range(40)}


def test_is_a_mutable_mapping(table: Table) -> None:
    """isinstance, and therefore everything written for mappings, works."""
    assert isinstance(table, MutableMapping)


def test_item_access(table: Table) -> None:
    """[] stores, reads and deletes; an absent key is a KeyError with that key."""
    table[b"a"] = b"1"
    assert table[b"a"] == b"1"
    del table[b"a"]
    for attempt in (lambda: table[b"a"], lambda: table.__delitem__(b"a")):
        with pytest.raises(KeyError) as caught:
            attempt()
        assert caught.value.args == (b"a",)


def test_get_with_default(table: Table) -> None:
    """Get returns the default, None unless given, for an absent key."""
    assert table.get(b"a") is None
    assert table.get(b"a", b"x") == b"x"
    table[b"a"] = b""
    assert table.get(b"a", b"x") == b""


def test_iteration_is_in_key_order(table: Table) -> None:
    """Iteration, keys, values and items merge all tablets in key order, over many pages."""
    table.update(PAIRS)
    assert list(table) == list(PAIRS)
    assert list(table.keys()) == list(PAIRS)
    assert list(table.values()) == list(PAIRS.values())
    assert list(table.items()) == list(PAIRS.items())
    assert list(reversed(table)) == list(reversed(PAIRS))


def test_len_contains_bool_equality(table: Table) -> None:
    """Len counts, in asks, an empty table is false, equality compares with any mapping."""
    assert not table
    assert len(table) == 0
    table.update(PAIRS)
    assert table
    assert len(table) == len(PAIRS)
    assert b"key-003" in table
    assert b"nothing" not in table
    assert table == PAIRS
    assert (b"key-003", b"value-3") in table.items()


def test_pop(table: Table) -> None:
    """Pop removes and returns; absent: the default if given (None too), else KeyError."""
    table[b"a"] = b"1"
    assert table.pop(b"a") == b"1"
    assert b"a" not in table
    assert table.pop(b"a", b"x") == b"x"
    assert table.pop(b"a", None) is None
    with pytest.raises(KeyError):
        table.pop(b"a")


def test_popitem_and_clear(table: Table, cluster: FakeCluster) -> None:
    """Popitem takes the first pair; clear takes all; popitem of nothing is a KeyError."""
    table.update(PAIRS)
    assert table.popitem() == (b"key-000", b"value-0")
    table.clear()
    assert cluster.contents("shop.orders") == {}
    with pytest.raises(KeyError):
        table.popitem()


def test_setdefault(table: Table) -> None:
    """Setdefault stores once and returns what is there."""
    assert table.setdefault(b"a", b"1") == b"1"
    assert table.setdefault(b"a", b"2") == b"1"
    with pytest.raises(TypeError):
        table.setdefault(b"b")


def test_update_takes_what_dict_takes(table: Table, cluster: FakeCluster) -> None:
    """Update takes a mapping, pairs, or something with keys(); keywords cannot be bytes."""

    class WithKeys:
        def keys(self) -> list[bytes]:
            return [b"c"]

        def __getitem__(self, key: bytes) -> bytes:
            return b"3"

    table.update({b"a": b"1"})
    table.update([(b"b", b"2")])
    table.update(WithKeys())
    assert cluster.contents("shop.orders") == {b"a": b"1", b"b": b"2", b"c": b"3"}
    with pytest.raises(TypeError):
        table.update(a=b"1")


@pytest.mark.parametrize("wrong", ["text", 1, None, bytearray(b"x"), memoryview(b"x"), ["x"]])
def test_only_bytes(table: Table, wrong: object, cluster: FakeCluster) -> None:
    """A key or value that is not bytes is a TypeError, and nothing is sent."""
    for attempt in (
        lambda: table.get(wrong),
        lambda: table.put(wrong, b"v"),
        lambda: table.put(b"k", wrong),
        lambda: table.put_many([(b"k", b"v"), (b"k", wrong)]),
        lambda: table.delete(wrong),
        lambda: table.pop(wrong, None),
        lambda: wrong in table,
        lambda: list(table.scan(prefix=wrong)) if wrong is not None else table.get(wrong),
    ):
        with pytest.raises(TypeError):
            attempt()
    assert cluster.log == []


@pytest.mark.parametrize("key", [b"", b"x" * 512])
def test_key_bounds(table: Table, key: bytes) -> None:
    """Keys have 1 to 511 bytes; others are InvalidValue (exit code 11)."""
    with pytest.raises(errors.InvalidValue):
        table.put(key, b"v")
    table.put(b"x" * 511, b"v")


def test_get_many_and_delete_many(table: Table) -> None:
    """get_many returns what exists, over all tablets and several messages; delete_many counts what existed."""
    table.put_many(PAIRS)
    wanted = [*list(PAIRS)[::2], b"absent"]
    assert table.get_many(wanted) == {key: PAIRS[key] for key in wanted if key in PAIRS}
    assert list(table.get_many(reversed(list(PAIRS)))) == list(reversed(PAIRS))
    assert table.delete_many(wanted) == len(wanted) - 1
    assert list(table) == list(PAIRS)[1::2]


def test_scan_ranges(table: Table) -> None:
    """start, stop, prefix, reverse and limit behave as slices of the sorted keys."""
    table.put_many(PAIRS)
    keys = list(PAIRS)
    assert [key for key, _ in table.scan(start=b"key-005", stop=b"key-009")] == keys[5:9]
    assert [key for key, _ in table.scan(prefix=b"key-01")] == keys[10:20]
    assert [key for key, _ in table.scan(prefix=b"key-01", start=b"key-015")] == keys[15:20]
    assert [key for key, _ in table.scan(reverse=True, limit=7)] == keys[:-8:-1]
    assert [key for key, _ in table.scan(start=b"key-005", stop=b"key-035", reverse=True)] == keys[34:4:-1]
    assert [key for key, _ in table.scan(limit=0)] == []
    assert list(table.scan(start=b"z", stop=b"a")) == []
    with pytest.raises(errors.InvalidValue):
        list(table.scan(limit=-1))


def test_prefix_of_high_bytes(table: Table) -> None:
    """A prefix of 0xff has no successor: the scan goes to the end."""
    table.put_many({b"\xff": b"1", b"\xff\xff": b"2", b"\xff\xfe": b"3", b"\xfe": b"4"})
    assert [key for key, _ in table.scan(prefix=b"\xff")] == [b"\xff", b"\xff\xfe", b"\xff\xff"]
    assert [key for key, _ in table.scan(prefix=b"\xfe")] == [b"\xfe"]


_KEYS = st.binary(min_size=1, max_size=3)
_STEPS = st.one_of(
    st.tuples(st.just("put"), _KEYS, st.binary(max_size=4)),
    st.tuples(st.just("delete"), _KEYS, st.just(b"")),
    st.tuples(st.just("pop"), _KEYS, st.just(b"")),
    st.tuples(st.just("setdefault"), _KEYS, st.binary(max_size=4)),
    st.tuples(st.just("scan"), _KEYS, st.binary(min_size=1, max_size=3)),
)


@given(st.lists(_STEPS, max_size=30), st.integers(1, 5))
def test_any_history_equals_a_dict(steps: list[tuple[str, bytes, bytes]], tablets: int) -> None:
    """Whatever is done to a table and to a dict gives the same answers and the same content."""
    cluster = FakeCluster({"a.b": tablets})
    model: dict[bytes, bytes] = {}
    with Client("tcp://n1:1", source=cluster.source, timeout_s=5) as client:
        table = client.table("a.b")
        for what, key, value in steps:
            match what:
                case "put":
                    table[key] = model[key] = value
                case "delete":
                    assert table.delete(key) == (model.pop(key, None) is not None)
                case "pop":
                    assert table.pop(key, None) == model.pop(key, None)
                case "setdefault":
                    assert table.setdefault(key, value) == model.setdefault(key, value)
                case "scan":
                    low, high = sorted((key, value))
                    expected = sorted(pair for pair in model.items() if low <= pair[0] < high)
                    assert list(table.scan(start=low, stop=high)) == expected
                    assert list(table.scan(start=low, stop=high, reverse=True)) == expected[::-1]
        assert list(table.items()) == sorted(model.items())


def test_close_ends_calls_under_way(cluster: FakeCluster) -> None:
    """A call that another thread's close interrupts ends with Closed."""
    client = Client("tcp://n1:1", source=cluster.source, timeout_s=60)
    waiting = threading.Event()

    def keep_waiting(_: object) -> None:
        waiting.set()
        raise errors.NotReady("starting")

    cluster.faults["tcp://n1:1"] = [keep_waiting] * 100_000
    cluster.down = {"tcp://n2:1", "tcp://n3:1"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        call = pool.submit(client.list_databases)
        assert waiting.wait(30)
        client.close()
        with pytest.raises(errors.Closed):
            call.result(30)


def test_a_fork_needs_its_own_client(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork the child is told to make another client instead of waiting for a thread that is not there."""
    assert client.list_databases() == ["shop"]
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        with pytest.raises(errors.ForkedEnvironment):
            client.list_databases()


def test_closed_and_repr(cluster: FakeCluster) -> None:
    """A closed client says Closed, closing twice is nothing, and a table shows its name."""
    client = srengine.Client("tcp://n1:1", source=cluster.source)
    table = client.table("shop.orders")
    assert repr(table) == "<Table shop.orders>"
    assert table.get(b"a") is None
    client.close()
    client.close()
    with pytest.raises(errors.Closed):
        table.get(b"a")
