"""Frames: round trips, every damage found, and the vectors of docs/formats-wire.md."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, limits
from srengine._native import frame
from srengine.codec import envelopes, frames

BODY = msgspec.Raw(msgspec.msgpack.encode({"number": 1}))
MAX = limits.BULK_FRAME_BYTES_MAX
numbers = st.integers(1, 2**53)
small = st.integers(0, 40)
chunked = st.one_of(
    st.tuples(
        st.builds(
            envelopes.Ask,
            numbers,
            st.just("a.b"),
            st.just(BODY),
            st.lists(small, max_size=4).map(tuple),
            st.integers(0, 9),
        ),
        st.just(None),
    ),
    st.tuples(st.builds(envelopes.Data, numbers, small, small, st.booleans()), st.just(None)),
    st.tuples(st.builds(envelopes.Credit, numbers, small), st.just(None)),
    st.tuples(st.builds(envelopes.End, numbers), st.just(None)),
    st.tuples(st.builds(envelopes.Cancel, numbers), st.just(None)),
    st.tuples(st.builds(envelopes.Post, st.just("a.b"), st.just(BODY), numbers), st.just(None)),
    st.tuples(st.builds(envelopes.Post, st.just("a.b"), st.just(envelopes.NOTHING), numbers, small), st.just(None)),
    st.tuples(st.builds(envelopes.Taken, numbers), st.just(None)),
    st.tuples(st.builds(envelopes.Failure, numbers, st.text(), st.text(), st.just({"a": [1]})), st.just(None)),
).map(lambda pair: pair[0])


def same(one, other) -> bool:
    return msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)


@given(st.lists(chunked, min_size=1, max_size=10))
def test_round_trip(sent):
    """Envelopes and their data come out as they went in."""
    data = bytes(index % 251 for index in range(sum(frames.inline_bytes(envelope) for envelope in sent)))
    found, view = frames.unpack(frames.pack(sent, [data]), data_bytes_max=MAX)
    assert same(found, sent)
    assert bytes(view) == data


@pytest.mark.fuzz
@given(st.data())
def test_every_flipped_bit_is_found(data):
    """F28: one flipped bit anywhere in a frame is a typed error."""
    sent = [envelopes.Ask(7, "a.b", BODY, (30,)), envelopes.Data(8, 0, 20, last=True)]
    parts = [bytearray(part) for part in frames.pack(sent, [bytes(50)])]
    part = data.draw(st.sampled_from(parts))
    part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((errors.FrameError, errors.UnsupportedFeature)):
        frames.unpack(parts, data_bytes_max=MAX)


@pytest.mark.fuzz
@given(st.lists(st.binary(max_size=120), max_size=12))
def test_any_parts_are_refused_with_our_error(parts):
    """F33: any bytes in any number of parts are a FrameError."""
    with pytest.raises(errors.FrameError):
        frames.unpack(parts, data_bytes_max=MAX)


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.binary(max_size=20))
def test_any_envelopes_under_a_right_checksum(body, data):
    """F38: a hostile sender computes checksums; still only our typed error, or well-formed envelopes, come out."""
    try:
        found, _ = frames.unpack(forge(body, data), data_bytes_max=MAX)
    except errors.FrameError:
        return
    assert found
    assert sum(frames.inline_bytes(envelope) for envelope in found) == len(data)


def forge(body: bytes, data: bytes = b"") -> list[bytes]:
    return [head_of(body, len(data), xxhash.xxh3_64_intdigest(data) if data else 0) + body, *([data] if data else [])]


def head_of(body: bytes, data_bytes: int, data_checksum: int, magic: bytes = frames.MAGIC, form: int = 1) -> bytes:
    """The head as the format's description has it, byte by byte: what the kernel is compared with."""
    head = magic + struct.pack("<HHIIQ", form, 0, len(body), data_bytes, data_checksum)
    return head + xxhash.xxh3_64_digest(body, seed=xxhash.xxh3_64_intdigest(head))[::-1]


@given(st.binary(max_size=600), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_the_kernel_seals_and_proves_as_described(body, data_bytes, checksum):
    """The compiled head is the described one, and proves exactly what was sealed."""
    first = frame.sealed(body, data_bytes, checksum)
    assert first == head_of(body, data_bytes, checksum) + body
    assert frame.proved(first, data_bytes) == checksum
    assert frame.proved(first, data_bytes + 1) == -1


@given(st.binary(max_size=60), st.data())
def test_the_kernel_proves_nothing_else(body, data):
    """Any flipped bit, any cut, anything appended, another magic or format: not proved."""
    first = frame.sealed(body, 7, 99)
    at = data.draw(st.integers(0, len(first) - 1))
    flipped = bytearray(first)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    assert frame.proved(bytes(flipped), 7) == -1
    assert frame.proved(first[:at], 7) == -1
    assert frame.proved(first + b"x", 7) == -1
    assert frame.proved(head_of(body, 7, 99, magic=b"srEg") + body, 7) == -1
    assert frame.proved(head_of(body, 7, 99, form=2) + body, 7) == -1


@pytest.mark.parametrize(
    ("body", "data"),
    [
        pytest.param(msgspec.msgpack.encode([]), b"", id="no envelope"),
        pytest.param(msgspec.msgpack.encode([[7, 1]] * (limits.ENVELOPES_MAX + 1)), b"", id="too many envelopes"),
        pytest.param(msgspec.msgpack.encode([[99, 1]]), b"", id="an unknown envelope"),
        pytest.param(msgspec.msgpack.encode([[7, 0]]), b"", id="request id 0"),
        pytest.param(msgspec.msgpack.encode([[7, 2**60]]), b"", id="request id beyond every language"),
        pytest.param(msgspec.msgpack.encode([[5, 1, 0, 9, True]]), b"", id="data declared, none there"),
        pytest.param(msgspec.msgpack.encode([[7, 1]]), b"x", id="data there, none declared"),
        pytest.param(msgspec.msgpack.encode([[5, 1, 0, -1, True]]), b"", id="a negative size"),
        pytest.param(b"\x91" * 100_000 + b"\xc0", b"", id="a depth bomb"),
        pytest.param(b"\xdd\xff\xff\xff\xff", b"", id="a huge array header"),
        pytest.param(b"\x91\x95\x01\x01\xa3a.b\x82\xa1a\x01\xa1a\x01\x90", b"", id="a key twice inside a body"),
    ],
)
def test_hostile_envelopes(body, data):
    """F38: each trick with right checksums is a FrameError."""
    with pytest.raises(errors.FrameError):
        frames.unpack(forge(body, data), data_bytes_max=MAX)


def test_envelopes_of_newer_senders_may_be_longer():
    """F44: fields appended to an envelope are ignored."""
    found, _ = frames.unpack(forge(msgspec.msgpack.encode([[7, 1, "new", {"x": 1}]])), data_bytes_max=MAX)
    assert found == [envelopes.End(1)]


def test_another_frame_format_names_both():
    """F44: a frame of another format is UnsupportedFeature and names both versions."""
    first = bytearray(frames.pack([envelopes.End(1)])[0])
    first[4] = 9
    with pytest.raises(errors.UnsupportedFeature, match=r"format 9.*reads 1") as caught:
        frames.unpack([first], data_bytes_max=MAX)
    assert (caught.value.theirs, caught.value.ours) == (9, 1)


def test_data_beyond_the_port_is_refused():
    """F37: data larger than the port allows is refused before it is looked at."""
    parts = frames.pack([envelopes.Data(1, 0, 100, last=True)], [bytes(100)])
    with pytest.raises(errors.FrameError):
        frames.unpack(parts, data_bytes_max=99)


def test_documented_vectors():
    """The byte vectors in docs/formats-wire.md are what `pack` writes."""
    text = (Path(__file__).parents[2] / "docs" / "formats-wire.md").read_text()
    found = {
        name: [bytes.fromhex(line) for line in block.split("\n") if line]
        for name, block in re.findall(r"<!-- vector: ([a-z-]+) -->\n```\n(.*?)```", text, re.DOTALL)
    }
    cases = {
        "end": ([envelopes.End(1)], []),
        "ask": ([envelopes.Ask(7, "a.b", BODY, (2, 3), 1500)], [b"hi", b"you"]),
        "post": ([envelopes.Post("a.b", BODY, 8)], []),
        "two": ([envelopes.Credit(8, 4), envelopes.Data(9, 0, 4, last=True)], [b"data"]),
    }
    assert found.keys() == cases.keys()
    for name, (sent, chunks) in cases.items():
        assert [bytes(part) for part in frames.pack(sent, chunks)] == found[name], name


def test_a_proved_piece_is_not_covered_and_nothing_else_can_be():
    """F28: only a frame of one proved Data goes without a checksum of its data."""
    alone = frames.pack([envelopes.Data(1, 0, 4, last=True, proved=True)], [b"data"])
    assert frames.unpack([alone[0], b"atad"], data_bytes_max=4)[1] == b"atad"
    together = frames.pack([envelopes.Credit(1, 1), envelopes.Data(1, 0, 4, last=True, proved=True)], [b"data"])
    checked = frames.pack([envelopes.Data(1, 0, 4, last=True)], [b"data"])
    for parts in (together, checked):
        with pytest.raises(errors.FrameError):
            frames.unpack([parts[0], b"atad"], data_bytes_max=4)
