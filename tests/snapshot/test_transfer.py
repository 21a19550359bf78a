"""Copies from tablet to tablet: whole, cut, resumed, from another replica, while the source changes."""

from __future__ import annotations

import random

import pytest

from srengine import errors
from srengine.snapshot import InPlace, SnapshotSink, SnapshotSource, Staged
from srengine.snapshot import format as words
from tests.reference.snapshot_tablet import PlainStore, PlainTablet
from tests.snapshot.shipping import change, made_tablet, ship


@pytest.mark.parametrize("compression", ["none", "zstd", "auto"])
@pytest.mark.parametrize("count", [0, 1, 400])
def test_a_full_copy_equals_its_source(compression, count):
    """T10: root and count equal the source at the trailer's position."""
    source = made_tablet(count=count)
    store = PlainStore()
    position, tablet, _ = ship(SnapshotSource(source, compression=compression, chunk_bytes=600), store)
    assert position == source.position
    assert tablet.records == source.records
    assert store.tablets["t1"] is tablet
    assert source.views == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_full_copy_of_a_tablet_that_changes_ends_at_one_position(seed):
    """T10: the scan sees many states, the closing delta brings them to one; purges in between do not disturb."""
    chance = random.Random(seed)
    source = made_tablet(seed)
    states = {}

    def work():
        if chance.random() < 0.5 and len(states) < 60:
            change(source, chance, 3)
        states[source.sequence] = dict(source.records)

    source.on_read = work
    maker = SnapshotSource(source, chunk_bytes=500)
    position, tablet, _ = ship(maker, PlainStore())
    assert position == maker.position
    assert tablet.records == states.get(position.sequence, source.records)
    assert position.sequence > maker.manifest.scan_base


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_copy_cut_at_every_item_and_resumed_is_the_same(kind):
    """T10: cut at every chunk and resumed: same root and count, and nothing is sent twice but the manifest."""
    source = made_tablet(count=150)
    base = source.copy()
    change(source, random.Random(5), 60)
    since = base.position if kind == "delta" else None
    whole = list(SnapshotSource(source, since=since, chunk_bytes=700))
    for cut in range(1, len(whole)):
        store, target = PlainStore(), base.copy()
        _, _, sink = ship(SnapshotSource(source, since=since, chunk_bytes=700), store, tablet=target, items_max=cut)
        mark = sink.resume_mark
        again = SnapshotSource(source, since=since, resume=mark, chunk_bytes=700)
        assert again.resumed == (mark is not None)
        items = list(again)
        assert len(items) == len(whole) - (cut - 1), cut
        with SnapshotSink(Staged(store, "t1", tablet=target)) as sink:
            assert sink.mark == mark
            for item in items:
                sink.accept(item)
            assert sink.finish() == source.position
            assert sink.tablet.records == source.records


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_another_replica_goes_on_with_a_copy(kind):
    """T10: a replica at or past every view used continues with the next chunk; the source may have changed since."""
    chance = random.Random(9)
    one = made_tablet(count=200)
    base = one.copy()
    change(one, chance, 50)
    since = base.position if kind == "delta" else None
    parts = len(list(SnapshotSource(one, since=since, chunk_bytes=700)))
    for cut in range(2, parts):
        store, target = PlainStore(), base.copy()
        _, _, sink = ship(SnapshotSource(one, since=since, chunk_bytes=700), store, tablet=target, items_max=cut)
        other = one.copy()
        change(other, chance, 30)
        again = SnapshotSource(other, resume=sink.resume_mark, node=b"n" * 16)
        assert again.resumed, again.reason
        position, tablet, _ = ship(again, store, tablet=target)
        assert position == other.position
        assert tablet.records == other.records


def test_a_replica_behind_the_copy_does_not_go_on():
    """T10: a view older than one used before would lose what was deleted between; a full copy begins again instead."""
    source = made_tablet()
    behind = source.copy()
    change(source, random.Random(2), 5)
    store = PlainStore()
    _, _, sink = ship(SnapshotSource(source, chunk_bytes=600), store, items_max=4)
    again = SnapshotSource(behind, resume=sink.resume_mark)
    assert not again.resumed
    assert "this replica is at" in again.reason
    position, tablet, _ = ship(again, store)
    assert position == behind.position
    assert tablet.records == behind.records


def test_a_purge_past_the_scans_beginning_starts_the_copy_again():
    """T10: below the purge mark "what changed since" is not exact: the resume repeats the check and begins again."""
    source = made_tablet()
    store = PlainStore()
    _, _, sink = ship(SnapshotSource(source, chunk_bytes=600), store, items_max=4)
    change(source, random.Random(2), 50)
    source.purge(source.sequence)
    again = SnapshotSource(source, resume=sink.resume_mark)
    assert not again.resumed
    assert "change log" in again.reason
    position, tablet, _ = ship(again, store)
    assert (position, tablet.records) == (source.position, source.records)


def test_a_purge_during_the_scan_is_named_and_what_was_filled_is_no_tablet():
    """T10: the source refuses to close a scan whose change log was purged under it; the stage stays a stage."""
    source = made_tablet()
    store = PlainStore()
    maker = SnapshotSource(source, chunk_bytes=600)
    change(source, random.Random(2), 50)
    source.purge(source.sequence)
    with pytest.raises(errors.BelowPurgeMark):
        ship(maker, store)
    assert store.tablets == {}
    assert store.stages["t1"].fill_mark is not None


def test_an_expired_view_is_replaced_by_the_next():
    """T09: a scan longer than a view may live goes on with a new one."""
    source = made_tablet()
    source.view_calls_max = 3
    position, tablet, _ = ship(SnapshotSource(source, chunk_bytes=300), PlainStore())
    assert (position, tablet.records) == (source.position, source.records)
    assert source.views == 0


def test_a_large_delta_marks_the_tablet_and_a_small_one_is_one_transaction():
    """T10: what is half applied is marked; what fits one transaction is never half applied."""
    source = made_tablet()
    target = source.copy()
    since = target.position
    change(source, random.Random(3), 40)
    position, _, _ = ship(SnapshotSource(source, since=since), PlainStore(), tablet=target)
    assert position == source.position == target.position
    assert target.fills == []


def test_filling_runs_beside_receiving(monkeypatch):
    """T18: transactions are written by a thread of their own, while the next rows are taken."""
    monkeypatch.setattr("srengine.snapshot.sink.FILL_BYTES", 4000)
    source = made_tablet(count=2000)
    store = PlainStore()
    _, tablet, _ = ship(SnapshotSource(source, chunk_bytes=1000), store)
    assert len(tablet.fills) > 2
    assert all("snapshot-fill" in name for name in tablet.fill_threads)
    assert max(tablet.fills) <= 4000


def test_a_full_copy_does_not_touch_the_tablet_it_will_replace():
    """T10: the stage is switched only when proved; a failing proof leaves the old tablet and names the cause."""
    source = made_tablet()
    items = list(SnapshotSource(source, chunk_bytes=600))
    store = PlainStore()
    old = store.tablets["t1"] = made_tablet(7)
    before = dict(old.records)
    liar = PlainTablet(lineage="l1")
    liar.records = dict(source.records)
    liar.records.pop(next(iter(liar.records)))
    liar.sequence = source.sequence
    liar_items = list(SnapshotSource(liar, chunk_bytes=600))
    with SnapshotSink(Staged(store, "t1")) as sink:
        for item in liar_items[:-1]:
            sink.accept(item)
        trailer = words.decode_trailer(items[-1][words.HEAD_BYTES :])
        honest = sink._machine.mark
        from srengine.snapshot import items as sealing

        forged = sealing.seal_trailer(
            words.Trailer(
                target=trailer.target,
                chunks=honest.chunks,
                rows=honest.rows + 0,
                raw_bytes=honest.raw_bytes,
                digest=honest.digest,
                meta=trailer.meta,
                state=trailer.state,
            ),
            honest.chunks + 1,
            honest.manifest.snapshot,
            bytes(16),
        ).joined()
        with pytest.raises(errors.SnapshotDamaged):
            sink.accept(forged)
    assert store.tablets["t1"] is old
    assert old.records == before


def test_a_delta_for_another_base_is_refused_before_anything_is_written():
    """T10, C1: a delta checks the base root before it writes."""
    source = made_tablet()
    since = source.position
    change(source, random.Random(3), 10)
    items = list(SnapshotSource(source, since=since))
    other = made_tablet(4)
    other.sequence = since.sequence
    with SnapshotSink(InPlace(other)) as sink, pytest.raises(errors.Diverged, match="the delta starts at"):
        sink.accept(items[0])
    assert (other.fills, other.fill_mark) == ([], None)


def test_a_full_snapshot_onto_data_or_another_seed_is_refused():
    source = made_tablet()
    first = next(iter(SnapshotSource(source)))
    with SnapshotSink(InPlace(made_tablet(3))) as sink, pytest.raises(errors.Conflict, match="needs an empty tablet"):
        sink.accept(first)
    first = next(iter(SnapshotSource(source, share_seed=False)))
    with SnapshotSink(InPlace(PlainTablet(seed=b"otherone"))) as sink, pytest.raises(errors.ForeignData):
        sink.accept(first)


def test_a_source_refuses_a_base_that_is_not_of_its_history():
    source = made_tablet()
    here = source.position
    for since in (
        here._replace(lineage="elsewhere"),
        here._replace(sequence=here.sequence + 1),
        here._replace(root=bytes(16)),
    ):
        with pytest.raises(errors.Diverged):
            SnapshotSource(source, since=since)


def test_the_seed_travels_only_when_asked_to():
    """T10: backups and jobs carry the seed's id only, and a replica cannot be made of one."""
    source = made_tablet()
    maker = SnapshotSource(source, share_seed=False)
    items = list(maker)
    assert source.seed not in b"".join(items[:1])
    assert maker.manifest.seed is None
    with SnapshotSink(Staged(PlainStore(), "t1")) as sink, pytest.raises(errors.SnapshotDamaged, match="seed"):
        sink.accept(items[0])


def test_a_mark_that_names_another_seed_gets_none():
    """A receiver's mark comes from outside: what it says of the seed is compared, never echoed."""
    source = made_tablet()
    _, _, sink = ship(SnapshotSource(source, chunk_bytes=600), PlainStore(), items_max=3)
    mark = words.decode_mark(sink.resume_mark)
    import msgspec

    forged = msgspec.structs.replace(mark, manifest=msgspec.structs.replace(mark.manifest, seed=b"forged!!"))
    again = SnapshotSource(source, resume=words.encode_mark(forged))
    assert not again.resumed
