"""The metadata machine: what happens to a command, and the whole state on its way to another node."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors
from srengine.ha import outcomes
from srengine.ha.journal import Command, decode_command, encode_command
from srengine.ha.metadata import Applying, MetadataMachine
from srengine.ha.state import ITEM_BYTES_TARGET, Header, Trailer, check_file, read_file, write_item
from srengine.storage import MetadataStore
from tests.ha.agreed import Setting, add, agreed, bootstrap

REQUEST = b"r" * 16


def numbered(number: int) -> bytes:
    return number.to_bytes(16, "big")


def write_file(path, items) -> None:
    with path.open("wb") as file:
        for item in items:
            write_item(file, item)


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_its_first_outcome(node):
    """H11, F27: a command that comes twice is applied once, and both times the answer is the first one's."""
    node.must(bootstrap())
    first = node.put(Command("test.set", b"a", request=REQUEST))
    again = node.put(Command("test.set", b"a", request=REQUEST))
    assert again == first
    assert first.index == 2
    assert node.setting.seen == [(2, "test.set")]
    assert node.machine.applied_index == 3


def test_a_refusal_is_an_outcome(node):
    """A refused command that is proposed again is refused again with the same code, message and details."""
    node.must(bootstrap())
    first = node.put(Command("test.refuse", b"a", request=REQUEST)).refusal
    again = node.put(Command("test.refuse", b"a", request=REQUEST)).refusal
    assert isinstance(first, errors.Conflict)
    assert (again.code, again.message, again.details) == (first.code, first.message, {"current_version": 2})
    assert list(node.store.scan("test")) == []


def test_a_stale_command_leaves_no_outcome(node):
    """B06: refused for its epoch, a request is applied when the new leader proposes it, once."""
    node.must(bootstrap())
    node.fence()
    request = Command("test.set", b"a", request=REQUEST)
    assert isinstance(node.put(request, epoch=0).refusal, errors.StaleEpoch)
    assert node.setting.seen == []
    assert node.put(request).refusal is None
    assert node.put(request).index == 4
    assert node.setting.seen == [(4, "test.set")]


def test_outcomes_are_bounded_and_the_oldest_goes_first(node, monkeypatch):
    """The table of outcomes holds the latest ones, and no more rows than it should."""
    monkeypatch.setattr(outcomes, "OUTCOMES_KEPT", 8)
    for number in range(20):
        node.must(Command("test.set", b"", request=numbered(number)))
    kept = [number for number in range(20) if outcomes.find_outcome(node.store, numbered(number)) is not None]
    assert kept == list(range(12, 20))
    assert len(list(node.store.scan(outcomes.OUTCOME_TABLE))) == 8 + 8 + 1


def test_overlong_facts_are_left_out(node):
    """An outcome is bounded whatever a refusal says."""
    error = errors.Conflict("x" * 100_000, much="y" * 100_000)
    kept = outcomes.refused(7, error)
    assert len(msgspec.msgpack.encode(kept)) < 20_000
    assert isinstance(kept.refusal, errors.Conflict)


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, 1])
def test_only_the_newest_epoch_changes_anything(node, offset):
    """B06, H06: a command of epoch e-1 (or of one that does not exist) is STALE_EPOCH before its applier sees it."""
    node.must(bootstrap())
    node.fence()
    node.fence(2, term=2)
    before = node.machine.digest()
    stale = node.put(Command("test.set", b"a"), epoch=2 + offset).refusal
    assert isinstance(stale, errors.StaleEpoch)
    assert (stale.epoch, stale.newest) == (2 + offset, 2)
    assert isinstance(node.put(add("n9", 9), epoch=2 + offset).refusal, errors.StaleEpoch)
    assert node.setting.seen == []
    assert "n9" not in node.names()
    assert node.machine.digest() != before, "the index is part of it"


def test_membership_follows_what_is_in_force(node):
    """A change of membership that consensus has put in force is applied whatever its epoch says."""
    node.must(bootstrap())
    node.fence()
    outcome = node.machine.apply_all([Applying(3, 5, add("n9", 9), in_force=True)])[0]
    assert outcome.refusal is None
    assert node.names() == ["n0", "n1", "n2", "n9"]


# --- transactions ----------------------------------------------------------------------------------------------------


def test_entries_without_meaning_raise_the_index(node):
    """The first entry of a term has no command; index and term are kept all the same."""
    node.must(bootstrap())
    assert node.put(None, term=7).refusal is None
    assert node.machine.applied == (2, 7)


def test_grouping_changes_nothing(node, other):
    """H27: entries applied one by one and in one transaction make the same state and the same outcomes."""
    commands = [bootstrap(), add("n3", 9), add("n3", 9), Command("test.refuse", b"x"), None, Command("none.such", b"")]
    commands += [Command("test.set", b"y", request=REQUEST), Command("test.set", b"z", request=REQUEST)]
    entries = [Applying(index, 1, each) for index, each in enumerate(commands, 1)]
    one_by_one = [node.machine.apply(entry.index, entry.term, entry.command) for entry in entries]
    assert other.machine.apply_all(entries) == one_by_one
    assert [outcome.code for outcome in one_by_one][1:4] == ["", "CONFLICT", "CONFLICT"]
    assert node.machine.digest() == other.machine.digest()


def test_a_fault_of_the_disk_is_no_outcome(node, monkeypatch):
    """A store that cannot be read while a command is decided stops the entry; nothing is kept, not even the index."""
    node.must(bootstrap())
    reads = type(node.store).transaction

    def broken(self):
        manager = reads(self)

        class Manager:
            def __enter__(self):
                inner = manager.__enter__()
                real = inner.get

                def get(table, key):
                    if table == "members":
                        raise errors.CorruptionError("a value is damaged")
                    return real(table, key)

                inner.get = get
                return inner

            def __exit__(self, *arguments):
                return manager.__exit__(*arguments)

        return Manager()

    monkeypatch.setattr(type(node.store), "transaction", broken)
    from srengine.ha.members import REMOVE, RemoveMember
    from tests.ha.agreed import command, node_id

    with pytest.raises(errors.CorruptionError):
        node.put(command(REMOVE, RemoveMember("n0", node_id(1))))
    monkeypatch.undo()
    assert node.machine.applied_index == 1


@given(st.binary(max_size=200))
def test_decoding_a_command_takes_anything(data):
    """Data of an entry is a command or a FrameError; a command comes back as it was."""
    try:
        found = decode_command(data)
    except errors.FrameError:
        return
    assert decode_command(encode_command(found)) == found


# --- the whole state -------------------------------------------------------------------------------------------------


def grown(node, seed: int = 1, rows: int = 300) -> None:
    random_bytes = random.Random(seed).randbytes
    node.must(bootstrap())
    node.fence()
    for number in range(rows):
        node.must(Command("test.set", random_bytes(number % 900), request=numbered(number)), term=2)


def test_a_state_arrives_whole(node, other, tmp_path):
    """B22: what `export` writes and `install` puts in place is the same state: digest, index, term, outcomes,
    epochs.
    """
    grown(node)
    other.must(bootstrap(2))
    other.must(Command("test.set", b"will be gone"))
    described = node.machine.export(tmp_path / "state")
    installed = other.machine.install(tmp_path / "state", index=node.machine.applied_index)
    assert installed == described == check_file(tmp_path / "state", node.machine.tables)
    assert other.machine.digest() == node.machine.digest() == described.digest
    assert other.machine.applied == node.machine.applied == (302, 2)
    assert other.names() == ["n0", "n1", "n2"]
    for each in (node, other):
        each.must(Command("test.set", b"next"))
        assert each.put(Command("test.set", b"", request=numbered(299))).index == 302
    assert other.machine.digest() == node.machine.digest()


def test_a_large_state_is_not_held_in_memory(node, other, tmp_path):
    """A state of many items goes through a small map that has to grow, and items stay small."""
    for _ in range(12):
        node.must(Command("test.set", b"x" * 3_000_000))
    node.must(Command("test.set", b"y" * 1000))
    node.machine.export(tmp_path / "state")
    sizes = [len(item) for item in read_file(tmp_path / "state")]
    assert len(sizes) == 15
    assert max(sizes) < 3_000_000 + ITEM_BYTES_TARGET
    other.machine.install(tmp_path / "state")
    assert other.machine.digest() == node.machine.digest()


def test_an_older_state_is_refused(node, other, tmp_path):
    """The own state never goes back."""
    grown(node, rows=3)
    node.machine.export(tmp_path / "state")
    for _ in range(9):
        other.must(Command("test.set", b""))
    before = other.machine.digest()
    with pytest.raises(errors.Conflict):
        other.machine.install(tmp_path / "state")
    assert other.machine.digest() == before


def test_a_state_of_another_version_is_refused(node, tmp_path):
    """Tables that are not known here, or another format, are UnsupportedFeature; nothing is changed."""
    with agreed(tmp_path / "newer") as newer:
        machine = MetadataMachine(newer.store, [Setting()])
        node.machine.export(tmp_path / "state")
        with pytest.raises(errors.UnsupportedFeature, match="members"):
            machine.install(tmp_path / "state")
        items = list(read_file(tmp_path / "state"))
        header = msgspec.structs.replace(msgspec.msgpack.decode(items[0][1:], type=Header), format=2)
        write_file(tmp_path / "future", [b"H" + msgspec.msgpack.encode(header), *items[1:]])
        with pytest.raises(errors.UnsupportedFeature, match="format 2"):
            newer.machine.install(tmp_path / "future")


DAMAGES = (
    "nothing",
    "no header",
    "no trailer",
    "an item is missing",
    "an item comes twice",
    "rows are swapped",
    "another index",
    "another digest",
    "something follows",
    "no msgpack",
    "another letter",
    "a table that is not named",
)


def damaged(items: list[bytes]) -> dict[str, list[bytes]]:
    header = msgspec.msgpack.decode(items[0][1:], type=Header)
    rows = msgspec.msgpack.decode(items[1][1:])
    swapped = [rows[1], rows[0], *rows[2:]]
    return {
        "nothing": [],
        "no header": items[1:],
        "no trailer": items[:-1],
        "an item is missing": [items[0], *items[2:]],
        "an item comes twice": [items[0], items[1], *items[1:]],
        "rows are swapped": [items[0], b"R" + msgspec.msgpack.encode(swapped), *items[2:]],
        "another index": [
            b"H" + msgspec.msgpack.encode(msgspec.structs.replace(header, index=header.index + 1)),
            *items[1:],
        ],
        "another digest": [*items[:-1], b"T" + msgspec.msgpack.encode(Trailer(bytes(16)))],
        "something follows": [*items, items[-1]],
        "no msgpack": [items[0], b"R\xff\xff", *items[2:]],
        "another letter": [items[0], b"X" + items[1][1:], *items[2:]],
        "a table that is not named": [
            items[0],
            b"R" + msgspec.msgpack.encode([[99, *rows[0][1:]], *rows[1:]]),
            *items[2:],
        ],
    }


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_changes_nothing(node, other, tmp_path, how):
    """A stream with any break is SnapshotDamaged, and the own state is what it was: all or nothing."""
    grown(node, rows=400)
    node.machine.export(tmp_path / "state")
    other.must(bootstrap(2))
    before = (other.machine.digest(), other.machine.applied)
    write_file(tmp_path / "broken", damaged(list(read_file(tmp_path / "state")))[how])
    with pytest.raises(errors.SnapshotDamaged):
        other.machine.install(tmp_path / "broken")
    assert (other.machine.digest(), other.machine.applied) == before


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_changes_nothing(data, tmp_path_factory):
    """Any changed byte of a state on its way is found before it is used, or changes nothing that counts."""
    path = tmp_path_factory.mktemp("state")
    path.chmod(0o700)
    with agreed(path / "a") as node, agreed(path / "b") as other:
        grown(node, rows=5)
        described = node.machine.export(path / "state")
        content = bytearray((path / "state").read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        (path / "broken").write_bytes(content)
        try:
            installed = other.machine.install(path / "broken", index=described.index, term=described.term)
        except (errors.SnapshotDamaged, errors.UnsupportedFeature, errors.InvalidValue):
            assert other.machine.applied_index == 0
            return
        assert installed == described
        assert other.machine.digest() == described.digest


def test_a_crash_while_installing_leaves_the_old_state(node, tmp_path):
    """A transaction that does not end leaves nothing behind, also when tables were emptied in it."""
    grown(node, rows=20)
    before = node.machine.digest()

    def rows():
        yield "test", b"k", b"v"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node.store.replace_tables(["test", "members"], rows, bytes_expected=0)
    assert node.machine.digest() == before
    node.store.close()
    with MetadataStore(node.store.path) as again:
        assert MetadataMachine(again, [Setting()]).applied_index == node.setting.seen[-1][0]


def test_entries_are_applied_while_the_whole_state_is_read(node, tmp_path):
    """H13, H17, H27: a digest and a copy are of one index; entries go on beside them, and are flushed after them."""
    node.must(bootstrap())
    index = node.machine.applied_index
    before = node.machine.digest()
    assert not node.machine.occupied
    scan, seen = node.store.scan, []

    def go_on():
        position = node.machine.applied_index + 1
        node.machine.show_all([Applying(position, 1, Command("test.set", b"%d" % position))])
        seen.append((node.machine.occupied, node.machine.flush()))

    with ThreadPoolExecutor(1) as thread:

        def watched(*arguments):
            thread.submit(go_on).result()
            return scan(*arguments)

        node.store.scan = watched
        assert node.machine.described() == (index, before)
        assert node.machine.applied_index > index + 5
        shown = node.machine.applied_index
        assert node.machine.export(tmp_path / "copy").index == shown
    assert set(seen) == {(True, False)}
    node.store.scan = scan
    assert not node.machine.occupied
    shown = node.machine.described()
    assert node.machine.flush()
    assert node.machine.described() == shown
