"""The kernel `entries` against its oracle, and what it refuses."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine._native import entries as kernel
from srengine.consensus.entries import Configuration, Entry, EntryKind
from tests.reference import log as reference

encode = msgspec.msgpack.encode
chains = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, (1 << 64) - 1)
configurations = st.builds(
    Configuration, st.lists(st.text("ab", max_size=3)).map(tuple), st.lists(st.text("cd", max_size=3)).map(tuple)
)
entries = st.lists(
    st.builds(
        Entry,
        numbers,
        numbers,
        st.sampled_from(EntryKind),
        st.one_of(st.binary(max_size=40), st.integers(200, 2000).map(bytes)),
        st.none() | configurations,
    ),
    max_size=6,
)


@given(st.binary(max_size=20), entries, chains)
def test_rows_are_those_of_the_oracle(prefix, given_entries, chain):
    """Any entries become the rows that docs/formats-log.md says, chained, behind what is in the list already."""
    changes = [("before", b"k", None)]
    after, sizes = kernel.put_rows(changes, "table", prefix, given_entries, chain, encode)
    wanted = [("before", b"k", None)]
    for entry in given_entries:
        configuration = encode(entry.configuration) if entry.configuration is not None else b""
        key, value, before = reference.row(
            prefix, chain, entry.index, entry.term, entry.kind, configuration, entry.data
        )
        assert kernel.chained(chain, entry.index, entry.term, entry.kind, configuration, entry.data) == before
        chain = before
        wanted.append(("table", key, value))
    assert changes == wanted
    assert (after, sizes) == (chain, [len(value) for _, _, value in wanted[1:]])


@pytest.mark.parametrize(
    ("entry", "chain", "error"),
    [
        (Entry(1, 1, EntryKind.NOOP), bytes(15), ValueError),
        (Entry(1, 1, EntryKind.NOOP), bytes(17), ValueError),
        (Entry(-1, 1, EntryKind.NOOP), bytes(16), OverflowError),
        (Entry(1, 1 << 64, EntryKind.NOOP), bytes(16), OverflowError),
        (Entry(1, 1, 256), bytes(16), OverflowError),
        (Entry(1, 1, EntryKind.NOOP, None), bytes(16), TypeError),
        (Entry(1, 1, EntryKind.NOOP, "text"), bytes(16), TypeError),
        (None, bytes(16), AttributeError),
    ],
)
def test_what_is_no_entry_is_refused(entry, chain, error):
    """Whatever our caller does wrong is an exception, and no row of the wrong entry."""
    changes = []
    with pytest.raises(error):
        kernel.put_rows(changes, "table", b"g", [entry], chain, encode)
    assert changes == []


@pytest.mark.parametrize(("configuration", "error"), [("text", TypeError), (None, TypeError), (b"", None)])
def test_a_configuration_is_bytes_once_encoded(configuration, error):
    """What ``encode`` returns is taken if it is bytes, and is not asked for without a configuration."""
    entry = Entry(1, 1, EntryKind.CONFIGURATION, b"data", Configuration(("a",)))
    changes = []
    if error is None:
        kernel.put_rows(changes, "table", b"g", [entry], bytes(16), lambda _: configuration)
        assert changes[0][2] == reference.row(b"g", bytes(16), 1, 1, 2, configuration, b"data")[1]
    else:
        with pytest.raises(error):
            kernel.put_rows(changes, "table", b"g", [entry], bytes(16), lambda _: configuration)
    kernel.put_rows([], "table", b"g", [Entry(1, 1, EntryKind.NOOP)], bytes(16), None)


def test_a_chain_of_another_size_is_refused():
    """As in `put_rows`."""
    for size in (0, 15, 17):
        with pytest.raises(ValueError, match="size"):
            kernel.chained(bytes(size), 1, 1, 0, b"", b"")
