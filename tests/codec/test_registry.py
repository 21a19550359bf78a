"""Message kinds: registered once, decoded within bounds, open for newer senders."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.codec import registry


class Sample(msgspec.Struct, frozen=True):
    number: int
    text: str = "default"
    data: bytes = b""
    share: float = 0.0


class NewerSample(msgspec.Struct, frozen=True):
    number: int
    text: str = "default"
    data: bytes = b""
    share: float = 0.0
    added: dict[str, list[int]] = {}


registry.register("codec_test.sample", Sample)
registry.register("codec_test.newer_sample", NewerSample)


@given(st.builds(Sample, number=st.integers(-(2**63), 2**63 - 1), text=st.text(), data=st.binary()))
def test_round_trip(message):
    """What is encoded is decoded as the same value."""
    kind, body = registry.encode(message)
    assert kind == "codec_test.sample"
    assert registry.decode(kind, body) == message


def test_unknown_fields_are_ignored_and_missing_ones_have_defaults():
    """F44: a newer sender's fields are ignored, an older one's missing fields take their defaults."""
    _, newer = registry.encode(NewerSample(1, added={"x": [1, 2]}))
    assert registry.decode("codec_test.sample", newer) == Sample(1)
    _, older = registry.encode(Sample(2))
    assert registry.decode("codec_test.newer_sample", older) == NewerSample(2)


@pytest.mark.fuzz
@given(st.binary(max_size=200))
def test_any_body_is_a_message_or_our_error(data):
    """F38: any bytes give a message of the kind or FrameError."""
    try:
        found = registry.decode("codec_test.sample", data)
    except errors.FrameError:
        return
    assert isinstance(found, Sample)


@pytest.mark.parametrize("body", [{"number": "1"}, {"number": 1.5}, {}, [], {"number": 2**64 - 1, "text": 5}, None])
def test_wrong_types_are_refused(body):
    """F38: a field of another type is a FrameError, never converted."""
    with pytest.raises(errors.FrameError):
        registry.decode("codec_test.sample", msgspec.msgpack.encode(body))


def test_unknown_kind():
    """F44: a kind that nobody registered is a FrameError that names it."""
    with pytest.raises(errors.FrameError, match=r"codec_test\.nothing"):
        registry.decode("codec_test.nothing", b"\x80")


def test_registering_twice_is_refused():
    """Two types under one kind, or two kinds for one type, are mistakes found at import."""

    class Other(msgspec.Struct, frozen=True):
        pass

    with pytest.raises(ValueError, match="twice"):
        registry.register("codec_test.sample", Other)
    with pytest.raises(ValueError, match="already"):
        registry.register("codec_test.other", Sample)


def test_only_frozen_maps_are_messages():
    """A message is frozen, encoded as a map, and has no tag; its kind is room.message."""

    class Mutable(msgspec.Struct):
        pass

    class Positional(msgspec.Struct, frozen=True, array_like=True):
        pass

    class Tagged(msgspec.Struct, frozen=True, tag="x"):
        pass

    for bad in (Mutable, Positional, Tagged):
        with pytest.raises(ValueError, match="frozen"):
            registry.register("codec_test.bad", bad)
    for kind in ("plain", "A.b", "a.b.c", "", "a."):
        with pytest.raises(ValueError, match="kind"):
            registry.register(kind, Mutable)
    with pytest.raises(ValueError, match="no registered"):
        registry.encode(Mutable())
