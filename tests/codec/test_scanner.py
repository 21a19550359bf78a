"""The bounded look at msgpack: everything that msgspec writes passes, and of anything else only our typed error is
seen.
"""

from __future__ import annotations

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, limits
from srengine._native import scan
from srengine.codec import scanner

encode = msgspec.msgpack.encode
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(plain)
def test_accepts_every_plain_value(value):
    """What msgspec writes of plain values passes."""
    scanner.check(encode(value))


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_anything_is_accepted_or_refused_with_our_error(data):
    """F38: any bytes either pass, and then msgspec reads them, or raise FrameError."""
    try:
        scanner.check(data)
    except errors.FrameError:
        return
    msgspec.msgpack.decode(data)


@pytest.mark.fuzz
@given(plain, st.data())
def test_damaged_values_raise_only_our_error(value, data):
    """F38: a value with a byte changed, cut or appended is refused with FrameError, or is another value."""
    whole = bytearray(encode(value))
    where = data.draw(st.integers(0, len(whole) - 1))
    whole[where] = data.draw(st.integers(0, 255))
    for damaged in (bytes(whole), bytes(whole[:where]), bytes(whole) + b"\x00"):
        try:
            scanner.check(damaged)
        except errors.FrameError:
            continue
        msgspec.msgpack.decode(damaged)


@pytest.mark.fuzz
@given(plain)
def test_every_prefix_is_refused(value):
    """F38: a message that ends too early is never read."""
    whole = encode(value)
    for end in range(min(len(whole), 64)):
        with pytest.raises(errors.FrameError):
            scanner.check(whole[:end])


def nested(depth: int, opening: bytes = b"\x91") -> bytes:
    return opening * depth + b"\xc0"


def test_depth_is_capped():
    """F38: 64 levels pass, 65 do not, and a million are refused without recursion."""
    scanner.check(nested(limits.MESSAGE_DEPTH_MAX))
    for depth in (limits.MESSAGE_DEPTH_MAX + 1, 1_000_000):
        with pytest.raises(errors.FrameError, match="deeper"):
            scanner.check(nested(depth))
    with pytest.raises(errors.FrameError, match="deeper"):
        scanner.check(nested(1000, b"\x81\xa1a"))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff", id="array of 2^32"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of 2^32"),
        pytest.param(b"\xdc\xff\xff" + b"\xc0" * 100, id="array of 65535 with 100"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="text of 2^32"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes of 2^32"),
        pytest.param(b"\x82\xa1a\x01\xa1a\x02", id="a key twice"),
        pytest.param(b"\x82\xa1a\x01\xd9\x01a\x02", id="a key twice, written differently"),
        pytest.param(b"\x81\x01\x02", id="a key that is a number"),
        pytest.param(b"\x81\xc4\x01a\x02", id="a key of bytes"),
        pytest.param(b"\x81\x90\x02", id="a key that is an array"),
        pytest.param(b"\xcb" + struct.pack(">d", math.nan), id="NaN"),
        pytest.param(b"\xca" + struct.pack(">f", math.nan), id="short NaN"),
        pytest.param(b"\xcb" + struct.pack(">d", -math.inf), id="infinity"),
        pytest.param(b"\xa2\xff\xfe", id="text that is not UTF-8"),
        pytest.param(b"\xa3\xed\xa0\x80", id="a surrogate"),
        pytest.param(b"\x81\xa2\xff\xfe\x01", id="a key that is not UTF-8"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="an extension"),
        pytest.param(b"\xc7\x00\x05", id="an empty extension"),
        pytest.param(b"\xc1", id="a byte that starts nothing"),
        pytest.param(b"\xc0\xc0", id="two values"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_hostile_bytes_are_refused(data):
    """F38: each known trick is a FrameError."""
    with pytest.raises(errors.FrameError):
        scanner.check(data)


def test_keys_repeat_only_within_one_map():
    """The same key in two maps, or as a value, is no duplicate."""
    scanner.check(encode({"a": {"a": "a"}, "b": [{"a": 1}, {"a": 2}]}))
    scanner.check(encode({str(number): number for number in range(2000)}))
    with pytest.raises(errors.FrameError, match="twice"):
        scanner.check(b"\xde\x07\xd1" + b"".join(encode(str(number)) + b"\x01" for number in [*range(2000), 1999]))


def accepts(data: bytes, depth_max: int = limits.MESSAGE_DEPTH_MAX) -> bool:
    """What the scanner in Python says: the oracle of the kernel."""
    try:
        scanner.look_closely(data, depth_max)
    except errors.FrameError:
        return False
    return True


@pytest.mark.fuzz
@given(plain, st.data())
def test_what_the_kernel_calls_plain_passes_the_close_look(value, data):
    """F38: the kernel never accepts what the scanner in Python refuses: whole, cut, changed, appended, at any depth."""
    whole = bytearray(encode(value))
    depth_max = data.draw(st.integers(0, 6) | st.just(limits.MESSAGE_DEPTH_MAX))
    where = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[where] = data.draw(st.integers(0, 255))
    for candidate in (whole, changed, whole[:where], whole + b"\x00", changed + whole):
        if scan.is_plain(candidate, depth_max):
            assert accepts(bytes(candidate), depth_max)


@pytest.mark.fuzz
@given(st.binary(max_size=80), st.integers(0, 130))
def test_any_bytes_that_the_kernel_calls_plain_pass(data, depth_max):
    """F38: the same for bytes of no meaning."""
    if scan.is_plain(data, depth_max):
        assert accepts(data, depth_max)


ascii_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(max_codepoint=127))
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(max_codepoint=127)), inner, max_size=20),
    max_leaves=30,
)


@given(ascii_plain, st.integers(0, 6))
def test_the_kernel_knows_plain_values(value, depth_max):
    """Of values with ASCII text and maps of few keys the kernel says the same as the scanner in Python."""
    data = encode(value)
    assert scan.is_plain(data, depth_max) == accepts(data, depth_max)


def test_the_kernel_leaves_the_rest_to_the_close_look():
    """What may pass but needs more than the kernel has is not called plain, and passes."""
    for value in ("ü", {"ü": 1}, {str(number): 1 for number in range(100)}, [{f"{i}": 1} for i in range(600)]):
        scanner.check(encode(value))
    assert not scan.is_plain(encode("ü"), 64)
    assert not scan.is_plain(encode({str(number): 1 for number in range(100)}), 64)
    assert scan.is_plain(encode([{f"{i}": 1} for i in range(600)]), 64), "keys of closed maps are forgotten"
    assert not scan.is_plain(b"", 64)
    assert not scan.is_plain(nested(1), -1)
    assert scan.is_plain(memoryview(nested(3)), 3)
    assert not scan.is_plain(nested(3), 2)
    with pytest.raises(TypeError):
        scan.is_plain("text", 64)
