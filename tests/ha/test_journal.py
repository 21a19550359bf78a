"""The journal's entries and the state that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.ha.journal import Command, Entry, chained, check_chain, decode_entries, encode_entries
from srengine.ha.journal_store import JournalStore
from srengine.ha.members import (
    BOOTSTRAP,
    IDENTIFY,
    Bootstrap,
    Cluster,
    Identify,
    Member,
    MembersApplier,
    read_cluster,
    read_members,
)
from srengine.ha.metadata import MetadataMachine, Tables
from srengine.storage import MetadataStore
from srengine.types import Position

CLUSTER = "c" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MetadataStore]:
    tmp_path.chmod(0o700)
    with MetadataStore(tmp_path / "meta") as opened:
        yield opened


def entries(count: int, *, after: bytes = bytes(16), first: int = 1, kind: str = "test.set") -> list[Entry]:
    made = []
    for index in range(first, first + count):
        made.append(chained(after, index, Command(kind, b"%d" % index)))
        after = made[-1].digest
    return made


def apply(machine: MetadataMachine, entry: Entry) -> errors.Error | None:
    return machine.apply(entry.index, entry.term, entry.command).refusal


class Setting:
    """Remembers bodies by index; refuses those that are odd by name."""

    kinds: Sequence[str] = ("test.set", "test.refuse")
    tables: Sequence[str] = ("test",)

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        tables.put("test", index.to_bytes(8, "big"), body)
        if kind == "test.refuse":
            raise errors.Conflict("refused")


def test_appended_entries_are_found_again(store: MetadataStore, tmp_path: Path) -> None:
    """What was appended is there after a reopen, with the same position; entries come back by index."""
    journal = JournalStore(store, CLUSTER)
    position = journal.append(entries(5))
    assert position.sequence == 5
    store.close()
    with MetadataStore(tmp_path / "meta") as again:
        journal = JournalStore(again, CLUSTER)
        assert journal.position == position
        assert [entry.index for entry in journal.entries_after(2)] == [3, 4, 5]
        assert journal.root_at(5) == position.root
        assert journal.root_at(0) == bytes(16)
        assert journal.root_at(6) is None


def test_an_entry_that_does_not_follow_is_refused(store: MetadataStore) -> None:
    """A gap, another past, or changed bytes is Diverged, and nothing is appended."""
    journal = JournalStore(store, CLUSTER)
    journal.append(entries(3))
    before = journal.position
    foreign = entries(1, after=b"x" * 16, first=4)
    gap = entries(1, after=before.root, first=5)
    changed = [msgspec.structs.replace(entries(1, after=before.root, first=4)[0], body=b"other")]
    for wrong in (foreign, gap, changed):
        with pytest.raises(errors.Diverged):
            journal.append(wrong)
    assert journal.position == before
    assert journal.entries_after(3) == []


def test_a_pull_is_bounded_but_always_moves_on(store: MetadataStore) -> None:
    """At least one entry is returned, however large; then as many as fit."""
    journal = JournalStore(store, CLUSTER)
    journal.append(entries(10))
    assert len(journal.entries_after(0, bytes_max=1)) == 1
    assert len(journal.entries_after(0, bytes_max=200)) < 10


def test_state_and_index_change_together(store: MetadataStore) -> None:
    """An entry is applied with its index in one transaction; a refused one raises the index and changes nothing
    else.
    """
    machine = MetadataMachine(store, [Setting()])
    good = chained(bytes(16), 1, Command("test.set", b"a"))
    bad = chained(good.digest, 2, Command("test.refuse", b"b"))
    unknown = chained(bad.digest, 3, Command("test.unknown", b""))
    assert apply(machine, good) is None
    digest = machine.digest()
    assert isinstance(apply(machine, bad), errors.Conflict)
    assert isinstance(apply(machine, unknown), errors.UnsupportedFeature)
    assert machine.applied_index == 3
    assert list(store.scan("test")) == [((1).to_bytes(8, "big"), b"a")]
    assert machine.digest() != digest


def test_equal_journals_make_equal_states(tmp_path: Path) -> None:
    """Two nodes that applied the same entries have the same digest, however they were grouped."""
    tmp_path.chmod(0o700)
    digests = []
    for name in ("one", "two"):
        with MetadataStore(tmp_path / name) as store:
            machine = MetadataMachine(store, [Setting()])
            for entry in entries(20):
                apply(machine, entry)
            digests.append(machine.digest())
    assert digests[0] == digests[1]


def test_members_are_bootstrapped_once_and_identified(store: MetadataStore) -> None:
    """F13: the first entry names the members in order; a wiped member gets another id and a higher incarnation."""
    machine = MetadataMachine(store, [MembersApplier()])
    members = tuple(Member(f"node-{number}", f"tcp://h:{number}", number) for number in range(3))
    bootstrap = Command(BOOTSTRAP, msgspec.msgpack.encode(Bootstrap(Cluster(CLUSTER, "prod"), members)))
    first = chained(bytes(16), 1, bootstrap)
    assert apply(machine, first) is None
    second = chained(first.digest, 2, bootstrap)
    assert isinstance(apply(machine, second), errors.Conflict)
    assert [member.name for member in read_members(store)] == ["node-0", "node-1", "node-2"]
    assert read_cluster(store) == Cluster(CLUSTER, "prod")
    last = second
    for node_id in ("a", "a", "b"):
        last = chained(
            last.digest, last.index + 1, Command(IDENTIFY, msgspec.msgpack.encode(Identify("node-1", node_id)))
        )
        assert apply(machine, last) is None
    (member,) = [member for member in read_members(store) if member.name == "node-1"]
    assert (member.node_id, member.incarnation) == ("b", last.index)
    stranger = chained(last.digest, last.index + 1, Command(IDENTIFY, msgspec.msgpack.encode(Identify("x", "y"))))
    assert isinstance(apply(machine, stranger), errors.NotFound)
    garbage = chained(stranger.digest, stranger.index + 1, Command(IDENTIFY, b"\xff\x00"))
    assert isinstance(apply(machine, garbage), errors.InvalidValue)


@given(st.binary(max_size=300))
def test_decoding_entries_takes_anything(data: bytes) -> None:
    """Bytes from a peer are entries or a FrameError."""
    try:
        found = decode_entries(data)
    except errors.FrameError:
        return
    assert all(isinstance(entry, Entry) for entry in found)


@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=50)), max_size=6), st.data())
def test_a_chain_proves_its_entries(commands: list[tuple[str, bytes]], data: st.DataObject) -> None:
    """Encoded entries come back equal; a changed bit is either no list of entries or no chain."""
    made: list[Entry] = []
    digest = bytes(16)
    for index, (kind, body) in enumerate(commands, 1):
        made.append(chained(digest, index, Command(kind, body)))
        digest = made[-1].digest
    start = Position(CLUSTER, 0, bytes(16), 0)
    encoded = encode_entries(made)
    assert decode_entries(encoded) == made
    assert check_chain(start, made).root == digest
    broken = bytearray(encoded)
    place = data.draw(st.integers(0, len(broken) - 1))
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode_entries(bytes(broken))
        assert check_chain(start, found).root != digest or found == made
    except (errors.FrameError, errors.Diverged):
        return
