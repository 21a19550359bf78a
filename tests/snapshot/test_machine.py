"""The transfer machines, step by step: transcripts that teach them."""

from __future__ import annotations

import pytest

from srengine import errors
from srengine.snapshot import format as words
from srengine.snapshot.format import Head, Kind, Manifest, StoredPosition, Trailer
from srengine.snapshot.transfer_machine import (
    STALL_S_MAX,
    Ask,
    BatchRead,
    Begin,
    ChunkRead,
    Close,
    Complete,
    Fill,
    Finish,
    ManifestRead,
    ReadKeys,
    ReadSequences,
    ReceiveMachine,
    SendMachine,
    TrailerRead,
    first_mark,
)

SNAPSHOT = b"s" * 16
MANIFEST = Manifest(format=1, snapshot=SNAPSHOT, tablet="t", kind="full", lineage="l", scan_base=40)


def head(kind: Kind, ordinal: int, **fields: object) -> Head:
    values = dict.fromkeys(Head._fields, 0) | {"after_key": b"", "last_key": b"", "digest": bytes([ordinal]) * 16}
    values |= {"kind": kind, "ordinal": ordinal, "snapshot": SNAPSHOT, "source": bytes(16)}
    return Head(**values | fields)


def by_key(ordinal: int, after: bytes, last: bytes, view: int, *, ends: bool = False) -> Head:
    flags = words.FLAG_BY_KEY | (words.FLAG_KEYS_END if ends else 0)
    facts = {"flags": flags, "after_key": after, "last_key": last, "view_sequence": view}
    return head(Kind.CHUNK, ordinal, row_count=1, raw_bytes=30, **facts)


def by_sequence(ordinal: int, after: int, last: int, view: int) -> Head:
    facts = {"after_sequence": after, "last_sequence": last, "view_sequence": view}
    return head(Kind.CHUNK, ordinal, row_count=1, raw_bytes=30, **facts)


def begun() -> ReceiveMachine:
    machine = ReceiveMachine()
    machine.step(ManifestRead(head(Kind.MANIFEST, 0), MANIFEST))
    assert machine.drain().apply == (Begin(MANIFEST, resumed=False),)
    return machine


def received() -> ReceiveMachine:
    """The picture of the module: three chunks by key at 40, 47, 52, one by sequence, all but the trailer."""
    machine = begun()
    chunks = (
        by_key(1, b"", b"f", 40),
        by_key(2, b"f", b"q", 47),
        by_key(3, b"q", b"x", 52, ends=True),
        by_sequence(4, 40, 55, 55),
    )
    for chunk in chunks:
        machine.step(ChunkRead(chunk))
        effects = machine.drain()
        assert effects.apply == (Fill(chunk),)
        assert effects.persist == machine.mark
    return machine


def trailer_of(machine: ReceiveMachine, sequence: int) -> TrailerRead:
    mark = machine.mark
    target = StoredPosition(lineage="l", sequence=sequence, root=bytes(16), count=2)
    facts = {"chunks": mark.chunks, "rows": mark.rows, "raw_bytes": mark.raw_bytes, "digest": mark.digest}
    return TrailerRead(head(Kind.TRAILER, mark.chunks + 1, view_sequence=sequence), Trailer(target=target, **facts))


def test_a_full_copy_step_by_step():
    machine = received()
    assert (machine.mark.keys_done, machine.mark.key, machine.mark.sequence) == (True, b"x", 55)
    last = trailer_of(machine, 55)
    machine.step(last)
    assert machine.drain().apply == (Finish(last.trailer),)
    assert isinstance(machine.state, Complete)


def test_a_resumed_copy_starts_behind_its_mark():
    mark = received().mark
    machine = ReceiveMachine(mark)
    machine.step(ManifestRead(head(Kind.MANIFEST, 0), MANIFEST))
    assert machine.drain().apply == (Begin(MANIFEST, resumed=True),)
    machine.step(ChunkRead(by_sequence(5, 55, 60, 60)))
    machine.step(trailer_of(machine, 60))
    assert isinstance(machine.state, Complete)


def test_another_snapshot_begins_again():
    other = Manifest(format=1, snapshot=b"o" * 16, tablet="t", kind="full", lineage="l", scan_base=70)
    machine = ReceiveMachine(received().mark)
    machine.step(ManifestRead(head(Kind.MANIFEST, 0, snapshot=b"o" * 16), other))
    assert machine.drain().apply == (Begin(other, resumed=False),)
    assert machine.mark.chunks == 0


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (by_key(2, b"f", b"q", 39), "a view at 39 after one at 40"),
        (by_key(2, b"g", b"q", 47), "does not start at the key"),
        (by_key(2, b"f", b"f", 47), "range of keys is empty"),
        (by_sequence(2, 40, 47, 47), "before the scan ended"),
        (by_key(3, b"f", b"q", 47), "item 3 comes where 2 was due"),
        (by_key(1, b"", b"f", 40), "item 1 comes again where 2 was due"),
        (by_key(2, b"f", b"q", 47)._replace(snapshot=b"o" * 16), "an item of snapshot"),
        (by_key(2, b"f", b"q", 47)._replace(raw_bytes=2**21, row_count=2), "larger than the manifest says"),
        (by_key(2, b"f", b"q", 47)._replace(encoding=1), "compressed chunk"),
        (by_key(2, b"f", b"f", 47)._replace(row_count=0), "chunk by key is empty"),
    ],
)
def test_a_chunk_that_breaks_a_rule_is_refused_and_the_state_stays(wrong, name):
    machine = begun()
    machine.step(ChunkRead(by_key(1, b"", b"f", 40)))
    before = machine.mark
    with pytest.raises(errors.SnapshotDamaged, match=name):
        machine.step(ChunkRead(wrong))
    assert machine.mark == before
    machine.step(ChunkRead(by_key(2, b"f", b"q", 47)))


def test_a_source_that_went_quiet_is_replaced():
    """A receiver asks again with its mark after a while without items, and not before."""
    machine = begun()
    machine.tick(100.0)
    machine.tick(100.0 + STALL_S_MAX - 1)
    assert machine.drain().send == ()
    machine.tick(100.0 + STALL_S_MAX)
    assert machine.drain().send == (Ask(machine.mark),)
    machine.step(ChunkRead(by_key(1, b"", b"f", 40)))
    machine.tick(200.0)
    machine.tick(201.0)
    assert machine.drain().send == ()


def test_a_sender_reads_by_key_then_by_sequence_then_closes():
    sender = SendMachine(first_mark(MANIFEST, bytes(16)))
    assert sender.drain().apply == ReadKeys(None)
    sender.step(BatchRead(2, 60, b"f", done=False, view_sequence=40))
    effects = sender.drain()
    assert (effects.send.after_key, effects.send.last_key, effects.apply) == (b"", b"f", ReadKeys(b"f"))
    sender.step(BatchRead(1, 30, b"q", done=True, view_sequence=47))
    effects = sender.drain()
    assert effects.send.flags == words.FLAG_BY_KEY | words.FLAG_KEYS_END
    assert effects.apply == ReadSequences(40)
    sender.step(BatchRead(1, 30, 44, done=False, view_sequence=47))
    effects = sender.drain()
    assert (effects.send.after_sequence, effects.send.last_sequence) == (40, 44)
    assert effects.apply == ReadSequences(44)
    sender.step(BatchRead(0, 0, None, done=True, view_sequence=55))
    effects = sender.drain()
    assert (effects.send.after_sequence, effects.send.last_sequence) == (44, 55)
    assert effects.apply == Close()


def test_a_sender_with_nothing_new_closes_without_a_chunk():
    """An empty table is one empty chunk by key; nothing since the scan began is none by sequence."""
    sender = SendMachine(first_mark(MANIFEST, bytes(16)))
    sender.step(BatchRead(0, 0, None, done=True, view_sequence=40))
    effects = sender.drain()
    assert (effects.send.row_count, effects.send.flags) == (0, words.FLAG_BY_KEY | words.FLAG_KEYS_END)
    sender.step(BatchRead(0, 0, None, done=True, view_sequence=40))
    effects = sender.drain()
    assert (effects.send, effects.apply) == (None, Close())


def test_a_sender_goes_on_behind_a_mark():
    sender = SendMachine(received().mark)
    assert (sender.ordinal, sender.drain().apply) == (5, ReadSequences(55))
