"""Compression that is worth its time: chunks shrink while whoever takes them is much slower than they are made."""

from __future__ import annotations

import itertools
import os

import pytest

from srengine.snapshot import SnapshotSink, SnapshotSource, Staged
from srengine.snapshot import format as words
from srengine.snapshot.compression import Compressor, Patience
from tests.reference.snapshot_tablet import PlainStore
from tests.snapshot.shipping import made_tablet

COST_S = 0.010


def told(patience: Patience, waits: list[float]) -> str:
    """Have chunks taken, each waited for so long; return what was wanted: C compressed, p plain."""
    said = ""
    for waited_s in waits:
        if patience.wanted():
            patience.took(COST_S)
            said += "C"
        else:
            said += "p"
        patience.taken(waited_s)
    return said


def test_a_taker_that_keeps_up_gets_plain_chunks():
    """After one that tells what compression takes, nothing is compressed while the waits are short."""
    assert told(Patience(), [COST_S] * 200) == "C" + "p" * 199


def test_a_slow_taker_gets_small_chunks_and_is_tried_again():
    """Four plain ones that are waited for, then a run, then four again; runs double up to a bound."""
    said = told(Patience(), [4 * COST_S] * 4000)
    runs = [len(list(group)) for _, group in itertools.groupby(said)]
    assert said[0] == "C"
    assert runs[:12] == [1, 4, 32, 4, 64, 4, 128, 4, 256, 4, 512, 4]
    assert max(runs) == 1024
    assert runs.count(1024) > 1


def test_the_mean_of_the_plain_ones_decides():
    """They are taken several at a time, so one is waited for and the others are not; what the last compressed one was
    waited for does not count.
    """
    enough, short = 3.0 * COST_S * 4, 2.9 * COST_S * 4
    assert told(Patience(), [9.0, 0, 0, 0, enough, 0])[5] == "C"
    assert told(Patience(), [9.0, 0, 0, 0, short, 0])[5] == "p"
    assert told(Patience(), [0, 0, enough, 0, 0, 0])[5] == "C"


def test_a_taker_that_becomes_quick_gets_plain_chunks_again():
    """The next try notices, and runs begin short again."""
    patience = Patience()
    assert told(patience, [4 * COST_S] * (1 + 4 + 32 + 4 + 64)).endswith("C" * 64)
    assert told(patience, [0.0] * 20) == "p" * 20
    assert "C" * 33 not in told(patience, [4 * COST_S] * 50)


def test_who_has_no_patience_always_compresses():
    """What a file is made of is as small as it can be, however quickly it is taken."""
    compressor = Compressor(active=True)
    assert {compressor.encode(bytes(5000))[0] for _ in range(100)} == {1}


def test_what_does_not_shrink_is_tried_less_all_the_same():
    """A slow taker changes nothing of data that cannot be compressed."""
    patience = Patience()
    compressor = Compressor(active=True, patience=patience)
    hard = os.urandom(5000)
    for _ in range(100):
        assert compressor.encode(hard)[0] == 0
        patience.taken(1.0)


@pytest.mark.parametrize("slow", [False, True])
def test_a_source_hears_whether_its_taker_keeps_up(monkeypatch, slow):
    """T10: with "auto" a taker that asks at once gets plain chunks, one that takes its time small ones; the copy is the
    same.
    """
    now = [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    monkeypatch.setattr("srengine.snapshot.source.time", Clock)
    tablet, store = made_tablet(count=600), PlainStore()
    encodings = []
    with SnapshotSink(Staged(store, "t1")) as sink:
        for item in SnapshotSource(tablet, compression="auto", chunk_bytes=400):
            head = words.read_head(item)
            if head.kind == words.Kind.CHUNK:
                encodings.append(int(head.encoding))
            sink.accept(item)
            now[0] += float(slow)
        assert sink.finish() == tablet.position
    assert sink.tablet.records == tablet.records
    assert len(encodings) > 40
    assert encodings[:5] == [1, 0, 0, 0, 0]
    assert set(encodings[5:37]) == {int(slow)}
