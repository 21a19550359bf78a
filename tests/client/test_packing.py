"""The attachments and messages of the client protocol: bounded readers that answer anything with a typed error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, limits
from srengine.client import messages, packing, scans
from srengine.client.packing import PackedRecord
from srengine.codec import registry

PAIRS = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(max_size=60)), max_size=20)
RECORDS = st.lists(
    st.one_of(
        st.just(PackedRecord(None)),
        st.builds(PackedRecord, st.binary(max_size=60), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    ),
    max_size=20,
)
KINDS = [kind for kind in registry.kinds() if kind.startswith("client.")]


@given(PAIRS)
def test_pairs_round_trip(pairs):
    """Pairs read back as they were written; the layout is the one of docs/formats."""
    packed = packing.pack_pairs(pairs)
    assert packing.unpack_pairs(packed, len(pairs)) == pairs
    by_hand = b"".join(
        len(key).to_bytes(4, "little") + len(value).to_bytes(4, "little") + key + value for key, value in pairs
    )
    assert packed == by_hand


@given(RECORDS)
def test_records_round_trip(records):
    """Records read back as they were written, absent ones included."""
    assert packing.unpack_records(memoryview(packing.pack_records(records)), len(records)) == records


@pytest.mark.fuzz
@given(st.binary(max_size=300), st.integers(-2, 40))
def test_any_bytes(data, count):
    """Any bytes with any count are items that say exactly these bytes, or FrameError."""
    for unpack, pack in ((packing.unpack_pairs, packing.pack_pairs), (packing.unpack_records, packing.pack_records)):
        try:
            items = unpack(data, count)
        except errors.FrameError:
            continue
        assert len(items) == count
        assert pack(items) == data


@pytest.mark.fuzz
@given(PAIRS, st.data())
def test_damaged_pairs(pairs, data):
    """A changed, cut or lengthened run of pairs never reads as more bytes than it has."""
    packed = bytearray(packing.pack_pairs(pairs) + b"\0")
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = packed[: data.draw(st.integers(0, len(packed)))]
    try:
        items = packing.unpack_pairs(bytes(cut), len(pairs))
    except errors.FrameError:
        return
    assert packing.pack_pairs(items) == cut


@pytest.mark.parametrize("count", [1, 2**31, 2**63])
def test_counts_are_checked_before_anything_is_allocated(count):
    """A count that cannot be in the bytes is refused at once."""
    with pytest.raises(errors.FrameError):
        packing.unpack_pairs(b"", count)
    with pytest.raises(errors.FrameError):
        packing.unpack_records(b"", count)


def test_declared_sizes_are_bounded():
    """A key or value larger than it may be is refused, also when it says that it is there."""
    for key_bytes, value_bytes in ((0, 1), (limits.KEY_BYTES_MAX + 1, 0), (1, limits.VALUE_BYTES_MAX + 1)):
        header = key_bytes.to_bytes(4, "little") + value_bytes.to_bytes(4, "little")
        with pytest.raises(errors.FrameError):
            packing.unpack_pairs(header + b"x" * 1000, 1)


def test_single_attachment():
    """A reply has one attachment, none counts as empty, more are refused."""
    assert packing.single([]) == b""
    assert packing.single([b"x"]) == b"x"
    with pytest.raises(errors.FrameError):
        packing.single([b"x", b"y"])


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
@given(body=st.binary(max_size=200))
def test_any_message(kind, body):
    """Any bytes are a message of the kind, or FrameError."""
    try:
        message = registry.decode(kind, body)
    except errors.FrameError:
        return
    assert registry.kind_of(type(message)) == kind


def test_unknown_fields_are_ignored():
    """A message of a newer version with more fields is understood."""
    import msgspec

    body = msgspec.msgpack.encode({"table": "a.b", "later": {"x": [1]}})
    assert registry.decode("client.open_session", body).table == "a.b"


@pytest.mark.parametrize(
    ("reverse", "pairs", "done"),
    [
        (False, [(b"b", b""), (b"a", b"")], True),
        (False, [(b"b", b""), (b"b", b"")], True),
        (True, [(b"a", b""), (b"b", b"")], True),
        (False, [(b"0", b"")], True),
        (False, [(b"z", b"")], True),
        (False, [], False),
    ],
)
def test_pages_are_checked(reverse, pairs, done):
    """A page that is out of order, outside what was asked, or empty without an end is refused: a scan never loops."""
    cursor = scans.Cursor(0, messages.Scan("a.b", 0, start=b"a", stop=b"z", reverse=reverse))
    with pytest.raises(errors.FrameError):
        cursor.take(pairs, done=done)
