"""Snapshots of real tablets: from store to store, as items and as files, with kill -9 of either side."""

from __future__ import annotations

import random
import textwrap
import threading

import msgspec
import pytest

from srengine import errors, failpoints
from srengine.snapshot import (
    SnapshotSink,
    SnapshotSource,
    Staged,
    apply_snapshot,
    partial_path,
    verify_snapshot,
    write_snapshot,
)
from srengine.snapshot import format as words
from srengine.storage import Batch, Store, encode_puts
from tests.reference import chunk as oracle
from tests.snapshot.test_file import run_killed


@pytest.fixture
def stores(tmp_path):
    with Store(tmp_path / "one") as one, Store(tmp_path / "other") as other:
        yield one, other


def fill(tablet, count=3000, seed=1, size=60):
    chance = random.Random(seed)
    tablet.put_many([(b"key-%06d" % chance.randrange(10**6), chance.randbytes(size)) for _ in range(count)])
    keys = [key for key, _ in tablet.scan(limit=50)]
    tablet.delete_many(keys)
    tablet.put_many([(key, b"again") for key in keys[::2]])
    return tablet


def content(tablet):
    with tablet.view() as view:
        return list(view.records(tombstones=True))


def test_a_full_copy_and_a_delta_equal_their_source(stores, tmp_path):
    """T10: files between real tablets: position, every record, tombstones and the change log of the copy."""
    one, other = stores
    source, copy = fill(one.tablet("users")), other.tablet("copy")
    full = source.write_snapshot(tmp_path / "full")
    assert copy.apply_snapshot(tmp_path / "full") == full == source.position == copy.position
    assert content(copy) == content(source)
    assert copy.seed == source.seed
    fill(source, 200, 2)
    delta = source.write_snapshot(tmp_path / "delta", since=full)
    assert (tmp_path / "delta").stat().st_size < (tmp_path / "full").stat().st_size // 4
    assert copy.apply_snapshot(tmp_path / "delta") == delta == copy.position
    assert content(copy) == content(source)
    assert not copy.verify().damages


def test_the_first_own_write_to_a_copy_begins_a_child_lineage(stores, tmp_path):
    """T10, design §13.6: two histories never share a name; the next delta of the source is refused."""
    one, other = stores
    source, copy = fill(one.tablet("users")), other.tablet("copy")
    full = source.write_snapshot(tmp_path / "full")
    copy.apply_snapshot(tmp_path / "full")
    copy.put(b"own", b"write")
    assert copy.lineage != source.lineage
    source.put(b"other", b"write")
    source.write_snapshot(tmp_path / "delta", since=full)
    with pytest.raises(errors.Diverged):
        copy.apply_snapshot(tmp_path / "delta")
    assert copy.get(b"own") == b"write"
    assert copy.get(b"other") is None


def ship(source, target, items_max=None):
    with SnapshotSink(target) as sink:
        items = iter(source)
        for number, item in enumerate(items):
            if number == items_max:
                items.close()
                return None, sink
            sink.accept(item)
        return sink.finish(), sink


@pytest.mark.parametrize("cut", [1, 2, 5, 9, 14])
def test_a_node_copy_cut_anywhere_goes_on_at_another_replica(stores, tmp_path, cut):
    """T10: staged beside the old tablet, cut, gone on with by a replica at the same sequence, switched when proved."""
    one, other = stores
    source = fill(one.tablet("users"))
    with Store(tmp_path / "third") as third:
        replica = third.create_tablet(source.id, seed=source.seed)
        write_snapshot(source, tmp_path / "full")
        apply_snapshot(replica, tmp_path / "full")
        old = other.create_tablet(source.id)
        old.put(b"old", b"value")
        ship(SnapshotSource(source, chunk_bytes=20_000), Staged(other, source.id, tablet=old), cut)
        assert old.get(b"old") == b"value"
        target = Staged(other, source.id, tablet=old)
        again = SnapshotSource(replica, resume=target.mark(), chunk_bytes=20_000)
        assert again.resumed == (cut > 1)
        position, sink = ship(again, target)
        assert position == source.position
        assert content(sink.tablet) == content(source)
        assert sink.tablet is other.open_tablet(source.id)
        assert old.closed
        assert sink.tablet.lineage == source.lineage


def test_a_source_that_is_written_to_meanwhile_ends_at_one_position(stores):
    """T10: writers go on during the whole copy; the copy is the source at the trailer's position."""
    one, other = stores
    source = fill(one.tablet("users"), 20_000)
    stop = threading.Event()

    def write():
        chance = random.Random(5)
        while not stop.is_set():
            source.put_many([(b"key-%06d" % chance.randrange(10**6), b"new") for _ in range(20)])
            source.delete_many([b"key-%06d" % chance.randrange(10**6) for _ in range(20)])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        position, sink = ship(SnapshotSource(source, chunk_bytes=10_000), Staged(other, source.id))
    finally:
        stop.set()
        writer.join()
    assert sink.tablet.position == position
    assert not sink.tablet.verify().damages
    since = sink.tablet.position
    position, sink = ship(SnapshotSource(source, since=since), Staged(other, source.id, tablet=sink.tablet))
    assert position == source.position
    assert content(sink.tablet) == content(source)


def test_an_unfinished_copy_goes_when_a_delta_made_it_needless(stores):
    """T10: a stage that nobody goes on with neither stays on the disk nor turns the next catch-up into a full copy."""
    one, other = stores
    source = fill(one.tablet("users"))
    _, sink = ship(SnapshotSource(source), Staged(other, source.id))
    copy = sink.tablet
    since = copy.position
    ship(SnapshotSource(source, chunk_bytes=20_000), Staged(other, source.id), 4)
    fill(source, 50, 3)
    target = Staged(other, source.id, tablet=copy)
    assert target.mark() is not None
    with SnapshotSink(target) as sink:
        for item in SnapshotSource(source, since=since):
            sink.accept(item)
        assert sink.finish() == source.position
    assert other.find_stage(source.id) is None
    assert target.mark() is None


def test_requests_and_sessions_travel(stores):
    """T10: a repeated request gets its kept answer from the copy, too."""
    one, other = stores
    source = one.tablet("users")
    session = bytes(range(16))
    source.open_session(session)
    batch = Batch(encode_puts([(b"a", b"1"), (b"b", b"2")]), session, 1)
    first = source.apply([batch])[0]
    _, sink = ship(SnapshotSource(source), Staged(other, source.id))
    repeated = sink.tablet.apply([batch])[0]
    assert repeated.duplicate
    assert repeated.results == first.results


def test_tombstones_purged_at_the_source_go_at_the_copy(stores):
    """T10: the receiver purges to the mark in the trailer before roots are compared."""
    one, other = stores
    source = fill(one.tablet("users"))
    _, sink = ship(SnapshotSource(source), Staged(other, source.id))
    copy = sink.tablet
    since = copy.position
    source.put(b"x", b"y")
    source.purge(since.sequence)
    assert source.count < copy.count
    position, _ = ship(SnapshotSource(source, since=since), Staged(other, source.id, tablet=copy))
    assert position == source.position == copy.position


def test_values_of_every_size_travel(stores):
    """T10, T04: empty values, one larger than a chunk, one larger than a transaction."""
    one, other = stores
    source = one.tablet("users")
    chance = random.Random(1)
    for size in (0, 1, 100_000, 1 << 20, 3 << 20, 17 << 20):
        source.put(b"key-%d" % size, chance.randbytes(size))
    position, sink = ship(SnapshotSource(source), Staged(other, source.id))
    assert position == source.position
    assert content(sink.tablet) == content(source)


WRITER = textwrap.dedent(
    """
    import sys
    from srengine.snapshot import write_snapshot
    from srengine.storage import Store
    with Store(sys.argv[1]) as store:
        write_snapshot(store.tablet("users"), sys.argv[2], chunk_bytes=20000)
    """
)
READER = textwrap.dedent(
    """
    import sys
    import srengine.snapshot.sink
    from srengine.storage import Store
    srengine.snapshot.sink.FILL_BYTES = 40000
    with Store(sys.argv[1]) as store:
        store.tablet("copy").apply_snapshot(sys.argv[2])
    """
)


@pytest.mark.parametrize("point", ["manifest.written", "chunk.written@5", "trailer.written", "synced", "renamed"])
def test_a_killed_writer_is_gone_on_with(tmp_path, point):
    """T10, F02: kill -9 of the writing process; the next one goes on and the copy is the source."""
    with Store(tmp_path / "one") as one:
        fill(one.tablet("users"))
    name, _, number = point.partition("@")
    run_killed(WRITER, f"snapshot.{name}=kill@{number or 1}", tmp_path / "one", tmp_path / "snap")
    with Store(tmp_path / "one") as one, Store(tmp_path / "other") as other:
        source = one.tablet("users")
        left = partial_path(tmp_path / "snap").read_bytes() if name != "renamed" else b""
        source.put(b"after the crash", b"value")
        write_snapshot(source, tmp_path / "snap", chunk_bytes=20_000)
        if name == "chunk.written":
            assert len(left) > 40_000
            assert (tmp_path / "snap").read_bytes().startswith(left)
        copy = other.tablet("copy")
        assert copy.apply_snapshot(tmp_path / "snap") == source.position
        assert content(copy) == content(source)


@pytest.mark.parametrize("point", ["fill.before@2", "fill.after@1", "fill.after@3", "finish.before", "finish.after"])
def test_a_killed_reader_goes_on(tmp_path, point):
    """T10, F02: kill -9 of the applying process anywhere: half a copy serves nothing, the same call finishes it."""
    with Store(tmp_path / "one") as one:
        source = fill(one.tablet("users"))
        write_snapshot(source, tmp_path / "snap", chunk_bytes=20_000)
        expected, records = source.position, content(source)
    name, _, number = point.partition("@")
    run_killed(READER, f"snapshot.{name}=kill@{number or 1}", tmp_path / "other", tmp_path / "snap")
    with Store(tmp_path / "other") as other:
        copy = other.tablet("copy")
        if name != "finish.after":
            assert copy.fill_mark is not None
            with pytest.raises(errors.NotReady):
                copy.get(b"x")
            copy.apply_snapshot(tmp_path / "snap")
        assert copy.position == expected
        assert content(copy) == records


def test_a_killed_node_goes_on_with_its_stage(tmp_path):
    """T10: the store is closed in the middle and opened again: the stage has its mark, the old tablet is whole."""
    with Store(tmp_path / "one") as one, Store(tmp_path / "other") as other:
        source = fill(one.tablet("users"))
        other.create_tablet(source.id).put(b"old", b"value")
        ship(SnapshotSource(source, chunk_bytes=20_000), Staged(other, source.id), 7)
        other.close()
        with Store(tmp_path / "other") as reopened:
            assert reopened.open_tablet(source.id).get(b"old") == b"value"
            target = Staged(reopened, source.id)
            mark = target.mark()
            assert words.decode_mark(mark).chunks >= 5
            again = SnapshotSource(source, resume=mark)
            assert again.resumed
            position, sink = ship(again, target)
            assert position == source.position
            assert content(sink.tablet) == content(source)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_of_the_disk_while_filling_is_named_and_the_copy_goes_on(stores, monkeypatch, failing):
    """F02: what was not durable is sent again; no later mark covers it, and the sink that failed takes nothing more."""
    monkeypatch.setattr("srengine.snapshot.sink.FILL_BYTES", 40_000)
    one, other = stores
    source = fill(one.tablet("users"))
    items = list(SnapshotSource(source, chunk_bytes=20_000))
    sink = SnapshotSink(Staged(other, source.id))
    with failpoints.armed(f"snapshot.fill.before=error@{failing}"), pytest.raises(OSError, match="failpoint"):
        for item in items:
            sink.accept(item)
    with pytest.raises(errors.Closed):
        sink.accept(items[-1])
    sink.close()
    target = Staged(other, source.id)
    again = SnapshotSource(source, resume=target.mark())
    assert again.resumed == (failing > 1)
    position, sink = ship(again, target)
    assert position == source.position
    assert content(sink.tablet) == content(source)


def damaged_files(whole: bytes):
    """Yield (name, bytes) for each way to damage a file."""
    chance = random.Random(3)
    for _ in range(25):
        at = chance.randrange(len(whole))
        yield "flip", whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        yield "cut", whole[: chance.randrange(len(whole))]
    yield "longer", whole + b"x"
    yield "twice", whole + whole
    yield "empty", b""


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_damaged_file_leaves_the_tablet_untouched(stores, tmp_path, kind):
    """T12: flip, truncate, extend: refused by name, the real target is as it was and still takes the right file."""
    one, other = stores
    source, copy = fill(one.tablet("users"), 500), other.tablet("copy")
    full = source.write_snapshot(tmp_path / "snap")
    if kind == "delta":
        copy.apply_snapshot(tmp_path / "snap")
        fill(source, 200, 2)
        source.write_snapshot(tmp_path / "snap", since=full)
    whole = (tmp_path / "snap").read_bytes()
    before, commits = copy.position, copy.counters["commits"]
    for name, damaged in damaged_files(whole):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises((errors.SnapshotDamaged, errors.UnsupportedFeature)):
            copy.apply_snapshot(tmp_path / "damaged")
        assert (copy.position, copy.counters["commits"], copy.fill_mark) == (before, commits, None), name
    assert copy.apply_snapshot(tmp_path / "snap") == source.position


def test_a_trailer_whose_state_row_lies_is_refused_and_nothing_switches(stores, tmp_path):
    """T12, F41: the state row, the meta rows and the root have the last word; the real tablet stays."""
    one, other = stores
    source = fill(one.tablet("users"), 300)
    items = list(SnapshotSource(source, chunk_bytes=5000))
    old = other.create_tablet(source.id)
    old.put(b"old", b"value")
    trailer = words.decode_trailer(items[-1][words.HEAD_BYTES :])
    state = bytearray(trailer.state)
    state[24] ^= 1
    for changes in (
        {"state": b""},
        {"state": bytes(state)},
        {"meta": b"garbage"},
        {"meta": b""},
        {"target": words.StoredPosition(lineage=source.lineage, sequence=source.sequence, root=bytes(16), count=1)},
    ):
        forged = oracle.reseal(items[-1], stored=words.encode_trailer(msgspec.structs.replace(trailer, **changes)))
        with SnapshotSink(Staged(other, source.id, tablet=old)) as sink, pytest.raises(errors.SnapshotDamaged):
            for item in [*items[:-1], forged] if sink.mark is None else [items[0], forged]:
                sink.accept(item)
        assert other.open_tablet(source.id) is old
    assert old.get(b"old") == b"value"


def test_a_consistent_snapshot_with_a_forged_value_is_refused_by_the_root(stores):
    """T12: every digest, count and range is right and one value is not: the root tells, the real tablet stays."""
    one, other = stores
    source = fill(one.tablet("users"), 300)
    old = other.create_tablet(source.id)
    old.put(b"old", b"value")
    with SnapshotSink(Staged(other, source.id, tablet=old)) as sink:
        running = words.NO_DIGEST
        for item in SnapshotSource(source, chunk_bytes=5000, compression="none"):
            head = words.read_head(item)
            forged = item
            if head.ordinal == 2:
                forged = oracle.reseal(item, stored=item[-head.stored_bytes : -1] + bytes([item[-1] ^ 1]))
            elif head.kind == words.Kind.TRAILER:
                trailer = words.decode_trailer(item[words.HEAD_BYTES :])
                body = words.encode_trailer(msgspec.structs.replace(trailer, digest=running))
                forged = oracle.reseal(item, stored=body)
            running = oracle.fold(running, words.read_head(forged).digest)
            if head.kind == words.Kind.TRAILER:
                with pytest.raises(errors.SnapshotDamaged, match="not what its source proved"):
                    sink.accept(forged)
            else:
                sink.accept(forged)
    assert other.open_tablet(source.id) is old
    assert old.get(b"old") == b"value"
    # What could not be proved is not gone on with: the next copy begins again.
    target = Staged(other, source.id, tablet=old)
    assert target.mark() is None
    assert ship(SnapshotSource(source), target)[0] == source.position


def test_a_delta_that_cannot_be_proved_is_followed_by_a_full_copy(stores, monkeypatch):
    """T10, C1: half a delta whose end is wrong is never gone on with, and its tablet serves nothing."""
    monkeypatch.setattr("srengine.snapshot.sink.FILL_BYTES", 10_000)
    one, other = stores
    source = fill(one.tablet("users"))
    _, sink = ship(SnapshotSource(source), Staged(other, source.id))
    copy = sink.tablet
    since = copy.position
    fill(source, 1000, 4)
    items = list(SnapshotSource(source, since=since, chunk_bytes=5000))
    trailer = words.decode_trailer(items[-1][words.HEAD_BYTES :])
    # The state row of another moment, promised honestly.
    source.put(b"one more", b"record")
    with source.view() as view:
        position, state = view.position, view.state
    source_sequence = trailer.target.sequence
    assert position.sequence > source_sequence
    forged = msgspec.structs.replace(trailer, state=state, target=words.StoredPosition.of(position))
    head = words.read_head(items[-1])
    with SnapshotSink(Staged(other, source.id, tablet=copy)) as sink, pytest.raises(errors.SnapshotDamaged):
        for item in items[:-1]:
            sink.accept(item)
        body = words.encode_trailer(forged)
        gap = oracle.seal(
            2,
            0,
            0,
            head.ordinal,
            0,
            0,
            b"",
            b"",
            position.sequence,
            source_sequence,
            position.sequence,
            head.snapshot,
            bytes(16),
            b"",
        )
        sink.accept(gap)
        mark = sink._machine.mark
        forged = msgspec.structs.replace(forged, chunks=mark.chunks, digest=mark.digest)
        body = words.encode_trailer(forged)
        sink.accept(
            oracle.seal(
                3,
                0,
                0,
                head.ordinal + 1,
                len(body),
                0,
                b"",
                b"",
                position.sequence,
                0,
                0,
                head.snapshot,
                bytes(16),
                body,
            )
            + body
        )
    assert copy.fill_mark == words.BROKEN_MARK
    with pytest.raises(errors.NotReady):
        copy.get(b"one more")
    target = Staged(other, source.id, tablet=copy)
    with SnapshotSink(target) as sink:
        assert sink.mark is None
        again = SnapshotSource(source, resume=sink.mark)
        assert again.manifest.kind == "full"
        for item in again:
            sink.accept(item)
        assert sink.finish() == source.position
        assert content(sink.tablet) == content(source)


def test_a_snapshot_of_a_half_filled_tablet_is_refused(stores, tmp_path):
    """T10: half a copy is never a source."""
    one, other = stores
    source = fill(one.tablet("users"))
    ship(SnapshotSource(source, chunk_bytes=20_000), Staged(other, source.id), 5)
    staged = other.find_stage(source.id)
    with pytest.raises(errors.NotReady):
        staged.write_snapshot(tmp_path / "snap")
    with pytest.raises(errors.NotReady):
        list(SnapshotSource(staged))


def test_a_file_written_by_an_uncompressed_writer_is_read(stores, tmp_path):
    one, other = stores
    source = fill(one.tablet("users"))
    write_snapshot(source, tmp_path / "plain", compression="none")
    write_snapshot(source, tmp_path / "packed")
    assert (tmp_path / "packed").stat().st_size < (tmp_path / "plain").stat().st_size
    assert verify_snapshot(tmp_path / "plain").position == verify_snapshot(tmp_path / "packed").position
    assert other.tablet("copy").apply_snapshot(tmp_path / "plain") == source.position
