"""Rebuild crash images of a recorded workload and open every one of them with the real engine.

`record_workload` runs the workload under the recorder; `choose` picks images over all its events; `check_images` opens
them in a child process, so that a crash of the engine is a finding with the image's name and not the end of the test.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.crash import record, workload

ROOT = Path(__file__).resolve().parents[2]


class Recording(NamedTuple):
    """A finished workload: its directory, the events, and the files that are rebuilt from them."""

    directory: Path
    events_path: Path
    files: dict[int, str]
    """The names of those that it wrote to, by their number in the events."""
    first: int
    count: int


def record_workload(scratch: Path, batches: int, kind: str = "batches") -> Recording:
    """Run a workload under the recorder to its end."""
    library = record.build_recorder(scratch)
    directory = scratch / "data"
    events_path = scratch / "events"
    with Path(os.devnull).open("wb") as sink:
        fd = sink.fileno()
        # Only the tablet's own files are followed, not those of the source that it is fed from.
        # A log is built under another name and renamed, its write-ahead log, too; they are the only ones here.
        tracked = "data.mdb:wal" if kind == workload.LOG else f"{workload.TABLET}/data.mdb"
        environment = record.recording_environment(library, record=events_path, ack_fd=fd, track=tracked)
        command = [sys.executable, "-m", "tests.crash.workload", kind, str(directory), str(batches), str(fd)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, pass_fds=[fd])
    events = record.read_events(events_path)
    # Before the first acknowledgement the tablet is not one that anybody was promised.
    first = next(number for number, event in enumerate(events) if event.kind == record.ACKNOWLEDGE)
    written = {event.file for event in events[first:] if event.kind == record.WRITE}
    names = {number: Path(path).name for number, path in record.paths(events).items() if number in written}
    assert len(set(names.values())) == len(written), names
    return Recording(directory, events_path, names, first, len(events))


def choose(recording: Recording, count: int, seed: int) -> list[tuple[int, str]]:
    """Return ``count`` images spread over all events, every mode and every event in turn where there are enough."""
    random_ = random.Random(seed)
    everything = [(number, mode) for number in range(recording.first + 1, recording.count) for mode in record.MODES]
    if count >= len(everything):
        return everything
    return sorted(random_.sample(everything, count))


class Finding(NamedTuple):
    """One image that did not open with what it must hold."""

    event: int
    mode: str
    why: str


def check_images(recording: Recording, chosen: list[tuple[int, str]], scratch: Path, seed: int) -> list[Finding]:
    """Open every chosen image in a child process and return what is wrong with which."""
    findings: list[Finding] = []
    rest = list(chosen)
    while rest:
        done = 0
        for line in _child(recording, rest, scratch, seed):
            told = json.loads(line)
            if "why" not in told:
                done += 1
            elif told["why"] is not None:
                findings.append(Finding(told["event"], told["mode"], told["why"]))
        if done and done == len(rest):
            break
        event, mode = rest[max(done - 1, 0)]
        findings.append(Finding(event, mode, "the process that opened it died"))
        rest = rest[max(done, 1) :]
    return findings


def _child(recording: Recording, chosen: list[tuple[int, str]], scratch: Path, seed: int) -> Iterator[str]:
    plan = scratch / "plan.json"
    plan.write_text(
        json.dumps(
            [sorted(recording.files.items()), str(recording.directory), str(recording.events_path), seed, chosen]
        )
    )
    command = [sys.executable, "-m", "tests.crash.images", str(plan), str(scratch)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = list(child.stdout)
    complete = [line for line in lines if line.endswith("\n")]
    if child.returncode == 0:
        assert sum("why" not in json.loads(line) for line in complete) == len(chosen), lines[-3:]
        return iter(complete)
    # The last image was begun and not ended: it is the one that killed the child.
    return iter(complete)


def _main() -> None:
    plan, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    files, directory, events_path, seed, chosen = json.loads(plan.read_text())
    names: dict[int, str] = dict(files)
    wanted = {(number, mode) for number, mode in chosen}
    worlds: dict[int, dict[bytes, bytes]] = {}
    for image in record.images(record.read_events(Path(events_path)), names, wanted, seed):
        _tell({"event": image.event, "mode": image.mode})
        left = {names[number]: content for number, content in image.contents.items()}
        why = _check(image.acknowledged, left, Path(directory), scratch / "image", worlds)
        _tell({"event": image.event, "mode": image.mode, "why": why})


def _tell(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _check(
    acknowledged: int, left: dict[str, bytes], directory: Path, place: Path, worlds: dict[int, dict[bytes, bytes]]
) -> str | None:
    """Return what is wrong with what was left of the files, or None."""
    from srengine import errors, storage

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(directory, place)
    acknowledged -= 1  # the first says that the tablet or the log is there
    (home,) = [place / workload.LOG] if (place / workload.LOG).exists() else place.glob("tablets/*")
    for name, content in left.items():
        assert (home / name).exists(), name
        (home / name).write_bytes(content)
    if home.name == workload.LOG:
        return _check_log(home, acknowledged)
    chunks = directory / workload.CHUNKS
    try:
        with storage.Store(place) as store:
            tablet = store.open_tablet(workload.TABLET)
            if chunks.exists():
                why = workload.goes_on(tablet, chunks, acknowledged)
                if why is not None:
                    return why
            batches = int(tablet.get(workload.COUNTER) or b"0")
            if not chunks.exists() and not acknowledged <= batches <= acknowledged + 1:
                return f"{batches} batches are there, {acknowledged} were acknowledged"
            if batches not in worlds:
                worlds[batches] = workload.world(batches)
            if dict(tablet.scan()) != worlds[batches]:
                return f"the records are not those after {batches} batches"
            report = tablet.verify()
            if report.damages:
                return f"verify: {report.damages[0]}"
            tablet.put(b"afterwards", b"still writable")
        with storage.Store(place) as store:
            if store.open_tablet(workload.TABLET).get(b"afterwards") != b"still writable":
                return "a write after the crash is not there"
    except errors.Error as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_log(place: Path, acknowledged: int) -> str | None:
    from srengine import errors
    from srengine.consensus.effects import Persist
    from srengine.consensus.entries import HardState
    from srengine.consensus.log import NodeLog

    try:
        with NodeLog.open(place) as log:
            why = workload.check_log(log, acknowledged)
            if why is not None:
                return why
            done = log.group(workload.GROUPS[0]).hard_state.term
            for name in workload.GROUPS:
                entries = tuple(workload.turn(done + 1, name, log.group(name).last_index))
                log.append({name: Persist(HardState(done + 1), entries)})
            # As it is now, over what the first loss of power left: a process that dies here closes nothing.
            again = place.with_name("again")
            shutil.rmtree(again, ignore_errors=True)
            shutil.copytree(place, again)
        for path in (again, place):
            with NodeLog.open(path) as log:
                why = workload.check_log(log, done + 1)
                if why is not None:
                    return f"afterwards, {path.name}: {why}"
        return None
    except errors.Error as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _main()
