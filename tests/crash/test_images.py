"""What a loss of power can leave opens, with every acknowledged batch whole and no half batch."""

from __future__ import annotations

import os
import random

import pytest

from tests.crash import images, record

pytestmark = pytest.mark.crash

IMAGES = int(os.environ.get("SRENGINE_CRASH_IMAGES", "60"))
BATCHES = 12 if IMAGES <= 200 else 40
SEED = int(os.environ.get("SRENGINE_SEED", "1"))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return images.record_workload(tmp_path_factory.mktemp("recorded"), BATCHES)


@pytest.mark.parametrize("kind", ["follow", "copy"])
def test_images_of_a_replica(tmp_path, kind):
    """T03, F04, P3: a replica that applies deltas holds every delta that it acknowledged, whole; one that is being
    filled as a copy is marked as half applied and goes on from its mark to the root of the source, or is whole.
    """
    recording = images.record_workload(tmp_path, BATCHES, kind)
    chosen = images.choose(recording, max(IMAGES // 3, 20), SEED)
    findings = images.check_images(recording, chosen, tmp_path, SEED)
    assert not findings, f"seed {SEED}: {len(findings)} of {len(chosen)} images are wrong, first {findings[0]}"


def test_images_of_a_log(tmp_path):
    """H28, F04: whatever a loss of power leaves of a node's log opens sound: every acknowledged turn is there for all
    groups, no half one, and it goes on.
    """
    recording = images.record_workload(tmp_path, BATCHES, "log")
    chosen = images.choose(recording, IMAGES, SEED)
    findings = images.check_images(recording, chosen, tmp_path, SEED)
    assert not findings, f"seed {SEED}: {len(findings)} of {len(chosen)} images are wrong, first {findings[0]}"
    events = [event for event in record.read_events(recording.events_path) if event.kind != record.SYNC]
    unsynced = recording._replace(events_path=tmp_path / "unsynced", count=len(events))
    record.write_events(unsynced.events_path, events)
    last = [number for number, event in enumerate(events) if event.kind == record.ACKNOWLEDGE][-1]
    assert images.check_images(unsynced, [(last, "dropped")], tmp_path, SEED), "the check can fail"


def test_images_at_every_prefix_of_the_writes(recording, tmp_path):
    """T03, F04: with unsynced writes dropped, kept, torn at 512 bytes or a random part of them there, each prefix of
    the recorded writes and syncs opens and holds every acknowledged batch whole, and no half one.
    """
    chosen = images.choose(recording, IMAGES, SEED)
    assert len(chosen) == IMAGES, f"the workload has only {len(chosen)} images"
    findings = images.check_images(recording, chosen, tmp_path, SEED)
    assert not findings, f"seed {SEED}: {len(findings)} of {len(chosen)} images are wrong, first {findings[0]}"


def test_every_image_of_one_batch(recording, tmp_path):
    """T03, F04: of one batch, nothing is left out: every event, every kind of loss."""
    events = record.read_events(recording.events_path)
    ends = [number for number, event in enumerate(events) if event.kind == record.ACKNOWLEDGE]
    start = ends[-3]
    chosen = [(number, mode) for number in range(start, ends[-2] + 1) for mode in record.MODES]
    assert len(chosen) >= 12
    assert not images.check_images(recording, chosen, tmp_path, SEED)


def test_the_check_notices_a_missing_sync(recording, tmp_path):
    """T03: were the data pages not synced before the meta page, the images would show it: the check can fail."""
    events = [event for event in record.read_events(recording.events_path) if event.kind != record.SYNC]
    path = tmp_path / "unsynced"
    record.write_events(path, events)
    unsynced = recording._replace(events_path=path, count=len(events))
    last = [number for number, event in enumerate(events) if event.kind == record.ACKNOWLEDGE][-1]
    assert images.check_images(unsynced, [(last, "dropped")], tmp_path, SEED)


def test_a_torn_write_is_torn_at_sectors():
    """T03: an image holds whole sectors of an unsynced write, and the certain bytes untouched."""
    disk = record.Disk()
    disk.take(record.Event(record.WRITE, 1, False, 0, 0, b"a" * 2048))
    disk.take(record.Event(record.SYNC, 1, False, 0, 0, b""))
    disk.take(record.Event(record.WRITE, 1, False, 0, 512, b"b" * 3000))
    seen = set()
    for seed in range(50):
        content = disk.image("random", random.Random(seed))
        assert content[:512] == b"a" * 512
        for start in range(512, 2048, 512):
            assert content[start : start + 512] in {b"a" * 512, b"b" * 512}
        seen.add(content)
    assert len(seen) > 10
    assert disk.image("dropped", random.Random(0)) == b"a" * 2048
    assert disk.image("kept", random.Random(0)) == b"a" * 512 + b"b" * 3000


def test_a_synchronous_write_is_certain_at_once():
    """T03: bytes written through an O_DSYNC descriptor are there without a sync; others of the file are not."""
    disk = record.Disk()
    disk.take(record.Event(record.WRITE, 1, False, 0, 0, b"a" * 512))
    disk.take(record.Event(record.WRITE, 1, True, 0, 512, b"m" * 512))
    assert disk.image("dropped", random.Random(0)) == bytes(512) + b"m" * 512
