"""Counters and gauges: what is added, counted and shown is one number."""

from __future__ import annotations

import pytest

from srengine.metrics import Metrics

FRAMES = "srengine_transport_frames_sent_total"


def test_what_is_counted_and_what_is_added_is_one_number():
    """A counter and `add` of the same name and labels add up; other labels are another number."""
    metrics = Metrics()
    counter = metrics.counter(FRAMES, port="peer")
    assert metrics.value(FRAMES, port="peer") == 0
    counter.value += 2
    metrics.add(FRAMES, 3, port="peer")
    metrics.counter(FRAMES, port="peer").value += 1
    metrics.counter(FRAMES, port="bulk").value += 10
    metrics.set("srengine_ha_members", 4)
    assert metrics.value(FRAMES, port="peer") == 6
    assert metrics.value(FRAMES, port="client") == 0
    assert metrics.snapshot() == {
        "srengine_ha_members": {(): 4},
        FRAMES: {(("port", "peer"),): 6, (("port", "bulk"),): 10},
    }


def test_a_snapshot_is_of_its_moment():
    """What is counted afterwards does not show in it, and nothing that is done to it shows here."""
    metrics = Metrics()
    counter = metrics.counter(FRAMES)
    before = metrics.snapshot()
    counter.value += 1
    assert before[FRAMES] == {(): 0}
    before[FRAMES][()] = 100
    assert metrics.value(FRAMES) == 1


def test_names_have_one_form():
    """A name that no scrape would take is a mistake of ours."""
    for wrong in ("frames", "srengine_", "srengine_Frames", "srengine_a b"):
        with pytest.raises(AssertionError):
            Metrics().counter(wrong)
