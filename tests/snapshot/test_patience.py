"""Compression that is worth its time: chunks shrink while whoever takes them is slower than they are made."""

from __future__ import annotations

import pytest

from srengine.snapshot import SnapshotSink, SnapshotSource, Staged
from srengine.snapshot import format as words
from srengine.snapshot.compression import _WORTHWHILE_CHUNKS, Compressor
from tests.reference.snapshot_tablet import PlainStore
from tests.snapshot.shipping import made_tablet

ROWS = bytes(5000)


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("srengine.snapshot.source.time", made)
    monkeypatch.setattr("srengine.snapshot.compression.time", made)
    return made


def test_a_patient_compressor_stops_when_nobody_lets_it_wait(clock):
    """It begins with a try, and compresses again for a while each time it was waited for."""
    compressor = Compressor(active=True, patient=True)

    def encodings(count):
        return [compressor.encode(ROWS)[0] for _ in range(count)]

    assert encodings(2 * _WORTHWHILE_CHUNKS) == [1] * _WORTHWHILE_CHUNKS + [0] * _WORTHWHILE_CHUNKS
    compressor.taken(0.001)
    assert encodings(2 * _WORTHWHILE_CHUNKS) == [1] * _WORTHWHILE_CHUNKS + [0] * _WORTHWHILE_CHUNKS


def test_a_wait_counts_against_what_compression_takes(monkeypatch):
    """Half of the time that a chunk takes to compress is nothing to speak of."""
    times = iter([0.0, 0.010] * _WORTHWHILE_CHUNKS + [1.0, 1.010])
    monkeypatch.setattr("srengine.snapshot.compression.time.perf_counter", lambda: next(times))
    compressor = Compressor(active=True, patient=True)
    for _ in range(_WORTHWHILE_CHUNKS):
        assert compressor.encode(ROWS)[0] == 1
    compressor.taken(0.005)
    assert compressor.encode(ROWS)[0] == 0
    compressor.taken(0.006)
    assert compressor.encode(ROWS)[0] == 1


def test_an_impatient_one_always_compresses(clock):
    """What a file is made of is as small as it can be, however quickly it is taken."""
    compressor = Compressor(active=True)
    assert {compressor.encode(ROWS)[0] for _ in range(4 * _WORTHWHILE_CHUNKS)} == {1}


@pytest.mark.parametrize("slow", [False, True])
def test_a_source_hears_whether_its_taker_keeps_up(clock, slow):
    """T10: with "auto" a taker that asks at once gets plain chunks after the first, one that takes its time small ones;
    the copy is the same.
    """
    tablet = made_tablet(count=600)
    encodings, store = [], PlainStore()
    with SnapshotSink(Staged(store, "t1")) as sink:
        for item in SnapshotSource(tablet, compression="auto", chunk_bytes=400):
            head = words.read_head(item)
            if head.kind == words.Kind.CHUNK:
                encodings.append(head.encoding)
            sink.accept(item)
            clock.now += float(slow)
        assert sink.finish() == tablet.position
    assert sink.tablet.records == tablet.records
    assert len(encodings) > 4 * _WORTHWHILE_CHUNKS
    assert set(encodings[:_WORTHWHILE_CHUNKS]) == {1}
    assert set(encodings[_WORTHWHILE_CHUNKS:]) == {int(slow)}
