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


@pytest.fixture(scope="module")
def log_recording(tmp_path_factory):
    return images.record_workload(tmp_path_factory.mktemp("log"), BATCHES, "log")


def settles(recording):
    """Return the events that put an LMDB transaction of the log in force after the first acknowledgement."""
    number = file_named(recording, "data.mdb")
    return [
        at
        for at, event in enumerate(record.read_events(recording.events_path))
        if at > recording.first and event.file == number and event.kind == record.WRITE and event.synchronous
    ]


def file_named(recording, name):
    (number,) = [number for number, found in recording.files.items() if found == name]
    return number


def test_images_of_a_log(log_recording, tmp_path):
    """H28, F04: whatever a loss of power leaves of a node's log, its write-ahead log and LMDB's file in one moment,
    opens sound: every acknowledged turn is there for all groups, no half one, and it goes on, over another crash, too.
    """
    chosen = images.choose(log_recording, IMAGES, SEED)
    assert len(chosen) == IMAGES
    findings = images.check_images(log_recording, chosen, tmp_path, SEED)
    assert not findings, f"seed {SEED}: {len(findings)} of {len(chosen)} images are wrong, first {findings[0]}"


def test_images_of_a_log_while_it_settles(log_recording, tmp_path):
    """H28, F04: every event of a settle and of the first turns of the generation behind it, every kind of loss."""
    events = record.read_events(log_recording.events_path)
    wal = file_named(log_recording, "wal")
    found = settles(log_recording)
    begun_again = [at for at, event in enumerate(events) if event.kind == record.WRITE and event.file == wal]
    begun_again = [at for at in begun_again if events[at].offset == 0 and at > found[0]]
    assert len(found) >= 3, "the workload fills its write-ahead log again and again"
    assert begun_again, "and begins it again"
    settle = max(at for at in found if at < begun_again[0])
    acknowledged = [at for at, event in enumerate(events) if event.kind == record.ACKNOWLEDGE]
    start = max(at for at in acknowledged if at < settle)
    stop = [at for at in acknowledged if at > begun_again[0]][:2][-1]
    chosen = [(number, mode) for number in range(start, stop + 1) for mode in record.MODES]
    assert {events[number].file for number, _ in chosen} >= {wal, file_named(log_recording, "data.mdb")}
    assert not images.check_images(log_recording, chosen, tmp_path, SEED)


@pytest.mark.parametrize("name", ["wal", "data.mdb"])
def test_the_check_notices_a_missing_sync_of_a_log(log_recording, tmp_path, name):
    """H28: were a turn not synced, or LMDB's pages not before its meta page, the images would show it."""
    events = record.read_events(log_recording.events_path)
    file, begin = file_named(log_recording, name), log_recording.first
    left = [
        event
        for number, event in enumerate(events)
        if number < begin or event.kind != record.SYNC or event.file != file
    ]
    unsynced = log_recording._replace(events_path=tmp_path / "unsynced", count=len(left))
    record.write_events(unsynced.events_path, left)
    chosen = [
        (number, "dropped") for number, event in enumerate(left) if number > begin and event.kind == record.ACKNOWLEDGE
    ]
    findings = images.check_images(unsynced, chosen, tmp_path, SEED)
    if name == "wal":
        assert any("were acknowledged" in finding.why for finding in findings), findings
    assert findings


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
