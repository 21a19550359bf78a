"""The bytes of docs/formats-consensus.md are those that nodes send."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from srengine import errors
from srengine.codec import registry
from srengine.consensus import checks
from srengine.consensus.entries import Configuration, Entry, EntryKind
from srengine.consensus.messages import Append, AppendReply, Bundle, Install, ReadIndexReply, Vote, VoteReply

TEXT = (Path(__file__).parents[2] / "docs" / "formats-consensus.md").read_text()
VECTORS = {
    name: bytes.fromhex(block.replace("\n", ""))
    for name, block in re.findall(r"<!-- vector: ([a-z-]+) -->\n```\n(.*?)```", TEXT, re.DOTALL)
}
BUNDLES = {
    "bundle": Bundle((Append("g", 2, "a", 5, 2, 5, 7),)),
    "reply": Bundle((AppendReply("g", 2, "b", success=True, match_index=5, round=7, previous_index=5),)),
}


@pytest.mark.parametrize("name", sorted(BUNDLES))
def test_examples_of_the_documentation(name):
    """What the documentation shows is what is encoded, and decodes to the same."""
    assert registry.encode(BUNDLES[name]) == ("consensus.bundle", VECTORS[name])
    assert registry.decode("consensus.bundle", VECTORS[name]) == BUNDLES[name]


def test_the_documentation_has_every_field_of_every_message():
    """No field is left out of docs/formats-consensus.md."""
    for kind in (Append, AppendReply, Vote, VoteReply, Install, ReadIndexReply, Configuration):
        for field in kind.__struct_fields__:
            assert re.search(rf"\b{field}\b", TEXT), (kind, field)


def test_entries_travel_whole():
    """A configuration entry comes out as it went in."""
    entry = Entry(3, 2, EntryKind.CONFIGURATION, b"\x00x", Configuration(("a", "b"), ("c",)))
    bundle = Bundle((Append("g", 2, "a", 2, 2, 2, 1, (entry,)),))
    assert registry.decode(*registry.encode(bundle)) == bundle


def test_an_unknown_message_is_refused():
    """A bundle with a message that is not known is a `FrameError`, not a surprise."""
    with pytest.raises(errors.FrameError):
        registry.decode("consensus.bundle", b"\x81\xa8messages\x91\x81\xa4type\xa5other")


@pytest.mark.parametrize(
    "message",
    [
        Append("g", 0, "a", 0, 0, 0, 1),
        Append("g", 2, "a", 5, 0, 0, 1),
        Append("g", 2, "a", 0, 1, 0, 1),
        Append("g", 2, "a", 5, 3, 0, 1),
        Append("g", 2, "a", 5, 2, -1, 1),
        Append("g", 2, "a", 5, 2, 1 << 53, 1),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(7, 2, EntryKind.NOOP),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 1, EntryKind.NOOP),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 3, EntryKind.NOOP),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.COMMAND, b"", Configuration(("a",))),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION, b"", Configuration((), ("a",))),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION, b"", Configuration(("b", "a"))),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION, b"", Configuration(("a",), ("a",))),)),
        Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION, b"", Configuration(("a", ""))),)),
        AppendReply("g", 2, "a", success=True, match_index=-1, round=1),
        AppendReply("g", 2, "a", success=True, match_index=1, round=1, votes=False),
        AppendReply("g", 2, "a", success=True, match_index=1, round=1, nonce=7),
        AppendReply("g", 2, "a", success=False, match_index=1, round=1),
        AppendReply("g", 2, "a", success=False, match_index=1, round=1, conflict_term=3),
        Vote("g", 2, "a", 0, 1),
        Vote("g", 2, "a", 3, 3),
        VoteReply("g", -1, "a", granted=True),
        Install("g", 2, "a", 1, 0, 0, Configuration(("a",))),
        Install("g", 2, "a", 1, 4, 3, Configuration(("a",))),
        Install("g", 2, "a", 1, 4, 2, Configuration()),
        ReadIndexReply("g", 2, "a", -1, 3),
    ],
    ids=str,
)
def test_unsound_values_are_found(message):
    """What cannot be is recognised before any rule looks at it."""
    assert not checks.is_sound(message)


SOUND = [
    *(message for bundle in BUNDLES.values() for message in bundle.messages),
    Append("g", 2, "a", 0, 0, 0, 1, (Entry(1, 1, EntryKind.NOOP), Entry(2, 2, EntryKind.COMMAND, b"x"))),
    Append("g", 2, "a", 5, 2, 5, 1, (Entry(6, 2, EntryKind.CONFIGURATION, b"", Configuration(("a",), ("b",))),)),
    AppendReply("g", 2, "a", success=False, match_index=0, round=0, votes=False, nonce=7),
    AppendReply("g", 2, "a", success=False, match_index=4, round=1, conflict_term=2),
    Vote("g", 2, "a", 0, 0, pre=True),
    VoteReply("g", 0, "a", granted=False, pre=True),
    Install("g", 2, "a", 1, 4, 2, Configuration(("a",), ("b",)), b"ref"),
    ReadIndexReply("g", 0, "a", 1, 0),
]


@pytest.mark.parametrize("message", SOUND, ids=str)
def test_sound_values_pass(message):
    """What honest nodes say is sound."""
    assert checks.is_sound(message)


@pytest.mark.parametrize("message", SOUND, ids=str)
@pytest.mark.parametrize("number", [-1, -(1 << 60), 1 << 53, 1 << 60])
def test_every_number_has_a_range(message, number):
    """Negative, or beyond what the wire has: whichever number of a sound message it is, the message is unsound."""
    names = [name for name in message.__struct_fields__ if type(getattr(message, name)) is int]
    assert names
    for name in names:
        assert not checks.is_sound(msgspec.structs.replace(message, **{name: number})), name
