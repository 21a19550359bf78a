"""Record the writes of a process and rebuild what a power loss could have left of its files.

`build_recorder` compiles recorder.c, `recording_environment` says how it makes a process record, die or meet errors.
`read_events` reads what it recorded; `images` walks through it and yields the followed files of one moment as they
may look after a loss of power::

    write A   write B   sync   write C   write D   meta (O_DSYNC)   "acknowledged"   write E ...
                          |       '--------'----- may be there or not, each sector of 512 bytes for itself
                          '- A and B are there for certain

What the model promises to the engine is what Linux promises: a write is durable after a later successful fsync or
fdatasync of the same file, or at once when made through an O_DSYNC descriptor (its own bytes only). Until then any
subset of its 512-byte sectors may be on the disk, and the file may have its new length already, with zeros, or not.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
WRITE, SYNC, TRUNCATE, ACKNOWLEDGE, OPEN = 1, 2, 3, 4, 5
BREAK_ANY, BREAK_WRITE, BREAK_SYNC, BREAK_META = 0, 1, 2, 3
_EVENT = struct.Struct("<IIIIQQ")


class Event(NamedTuple):
    """One call on a followed file (or an acknowledgement, or the path of one that was opened): see recorder.c."""

    kind: int
    file: int
    synchronous: bool
    error: int
    offset: int
    data: bytes


class Image(NamedTuple):
    """What one loss of power left. ``acknowledged`` counts acknowledgements before it, ``event`` the events."""

    event: int
    mode: str
    acknowledged: int
    contents: dict[int, bytes]
    """By the number of the file."""


def build_recorder(directory: Path) -> Path:
    """Compile recorder.c into ``directory`` and return the library."""
    library = directory / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        compiler = "cc"
    command = [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source), "-lpthread"]
    subprocess.run(command, check=True)
    return library


def plain_environment(**settings: object) -> dict[str, str]:
    """Return this process's environment without settings of ours, and with ``settings`` as SRENGINE_<NAME>."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SRENGINE_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.update({f"SRENGINE_{name.upper()}": str(value) for name, value in settings.items()})
    return environment


def recording_environment(library: Path, **settings: object) -> dict[str, str]:
    """Return the environment that preloads the recorder; ``settings`` become SRENGINE_<NAME>."""
    environment = plain_environment(**{"track": "data.mdb", **settings})
    preloaded = environment.get("LD_PRELOAD")
    environment["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else str(library)
    return environment


def read_events(path: Path) -> list[Event]:
    """Return the events of a recording in order."""
    raw = path.read_bytes()
    events = []
    at = 0
    while at + _EVENT.size <= len(raw):
        kind, file, synchronous, error, offset, length = _EVENT.unpack_from(raw, at)
        at += _EVENT.size
        has_bytes = kind in {WRITE, ACKNOWLEDGE, OPEN}
        data = raw[at : at + length] if has_bytes else b""
        at += len(data)
        events.append(Event(kind, file, bool(synchronous), error, offset, data))
    assert at == len(raw), (at, len(raw))
    return events


class Disk:
    """The bytes of one file that are certain, and the writes since that are not."""

    def __init__(self) -> None:
        self.certain = bytearray()
        self.open: list[Event] = []

    def take(self, event: Event) -> None:
        """Let one event happen."""
        if event.error:
            return
        if event.kind == SYNC:
            for earlier in self.open:
                _apply(self.certain, earlier, None)
            self.open.clear()
        elif event.kind in {WRITE, TRUNCATE}:
            self.open.append(event)

    def image(self, mode: str, random_: random.Random, flying: Event | None = None) -> bytes:
        """Return the file after a loss of power now, while ``flying`` was on its way."""
        content = bytearray(self.certain)
        uncertain = [event for event in self.open if not (event.kind == WRITE and event.synchronous)]
        last = flying if flying is not None else (uncertain[-1] if uncertain else None)
        share = random_.choice((0.1, 0.5, 0.9))
        length = len(content)
        for event in [*self.open, *([flying] if flying is not None else [])]:
            if event.kind == WRITE:
                length = max(length, event.offset + len(event.data))
            certain = event.kind == WRITE and event.synchronous and event is not flying
            if certain or mode == "kept":
                _apply(content, event, None)
            elif mode == "torn":
                torn = random_.randrange(_sectors(event) + 1)
                _apply(content, event, set(range(torn)) if event is last else None)
            elif mode == "random":
                _apply(content, event, {i for i in range(_sectors(event)) if random_.random() < share})
            else:
                assert mode == "dropped", mode
        if mode == "random" and random_.random() < 0.5 and len(content) < length:
            content.extend(bytes(length - len(content)))
        return bytes(content)


MODES = ("dropped", "random", "torn", "kept")


def _sectors(event: Event) -> int:
    if event.kind != WRITE or not event.data:
        return 1
    return (event.offset + len(event.data) - 1) // SECTOR - event.offset // SECTOR + 1


def _apply(content: bytearray, event: Event, sectors: set[int] | None) -> None:
    """Write an event's bytes, or those of some of its sectors (numbered from its first)."""
    if event.kind == TRUNCATE:
        if sectors is None or 0 in sectors:
            del content[event.offset :]
            content.extend(bytes(event.offset - len(content)))
        return
    end = event.offset + len(event.data)
    first = event.offset // SECTOR
    for sector in range(_sectors(event)) if sectors is None else sorted(sectors):
        start = max(event.offset, (first + sector) * SECTOR)
        stop = min(end, (first + sector + 1) * SECTOR)
        if stop <= start:
            continue
        if len(content) < stop:
            content.extend(bytes(stop - len(content)))
        content[start:stop] = event.data[start - event.offset : stop - event.offset]


def paths(events: list[Event]) -> dict[int, str]:
    """Return the path with which each followed file was opened last, by its number."""
    return {event.file: os.fsdecode(event.data) for event in events if event.kind == OPEN}


def images(events: list[Event], files: Collection[int], wanted: set[tuple[int, str]], seed: int) -> Iterator[Image]:
    """Yield the wanted images of some files, each named by (events before it, mode), in the order of the events."""
    disks = {file: Disk() for file in sorted(files)}
    acknowledged = 0
    for number, event in enumerate(events):
        flying = event if event.kind in {WRITE, TRUNCATE} and not event.error else None
        for mode in MODES:
            if (number, mode) in wanted:
                random_ = random.Random(f"{seed}/{number}/{mode}")
                contents = {
                    file: disk.image(mode, random_, flying if event.file == file else None)
                    for file, disk in disks.items()
                }
                yield Image(number, mode, acknowledged, contents)
        if event.kind == ACKNOWLEDGE:
            acknowledged += 1
        elif event.file in disks:
            disks[event.file].take(event)


def write_events(path: Path, events: list[Event]) -> None:
    """Write events as the recorder does."""
    with path.open("wb") as file:
        for event in events:
            length = len(event.data)
            file.write(_EVENT.pack(event.kind, event.file, event.synchronous, event.error, event.offset, length))
            file.write(event.data)
