"""The process whose power is cut: batches that change a small world, each acknowledged when the call returned.

Run as ``python -m tests.crash.workload KIND DIRECTORY BATCHES ACK_FD``; the kinds are a tablet that applies batches,
one that follows another by deltas, and one that is filled as a copy of another; and a node's log of two groups. What
must be in the tablet after ``n`` batches is `world(n)`, in the log after ``n`` turns `logs(n)`, so that a checker needs
nothing but the number that it finds.

A batch puts new records, overwrites a common set in full (half a batch would show as two generations), deletes some
of an earlier batch, and counts itself in the record ``batch``. Sizes go from nothing to several pages.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srengine.consensus.entries import Entry
    from srengine.consensus.log import NodeLog
    from srengine.storage import Tablet

TABLET = "c" * 32
CHUNKS = "chunks"
COUNTER = b"batch"
SHARED = 12
NEW = 25
_SIZES = (0, 1, 30, 128, 128, 300, 1500, 5000, 9000)


def operations(batch: int) -> list[tuple[bytes, bytes | None]]:
    """Return (key, value) of a batch in order; None deletes. Batches are numbered from 1."""
    random_ = random.Random(batch)
    changes: list[tuple[bytes, bytes | None]] = [(COUNTER, str(batch).encode())]
    changes += [(b"shared-%02d" % i, b"%d:" % batch + random_.randbytes(random_.choice(_SIZES))) for i in range(SHARED)]
    changes += [(b"new-%06d-%02d" % (batch, i), random_.randbytes(random_.choice(_SIZES))) for i in range(NEW)]
    if batch > 3:
        changes += [(b"new-%06d-%02d" % (batch - 3, i), None) for i in range(0, NEW, 2)]
    random_.shuffle(changes)
    return changes


def world(batches: int) -> dict[bytes, bytes]:
    """Return the live records after ``batches`` batches."""
    records: dict[bytes, bytes] = {}
    for batch in range(1, batches + 1):
        for key, value in operations(batch):
            if value is None:
                records.pop(key, None)
            else:
                records[key] = value
    return records


def encode(batch: int) -> bytes:
    """Return a batch as `Tablet.apply` takes it."""
    from srengine import storage

    return storage.encode_operations(
        [(1, key, None, 0, 0) if value is None else (0, key, value, 0, 0) for key, value in operations(batch)]
    )


def write_batches(directory: Path, count: int, acknowledge: Callable[[], None]) -> None:
    """Apply batches to one tablet: a leader, or embedded use."""
    from srengine import storage

    with storage.Store(directory, map_bytes=1 << 18) as store:
        tablet = store.create_tablet(TABLET)
        acknowledge()
        for batch in range(1, count + 1):
            tablet.apply([storage.Batch(encode(batch))])
            acknowledge()


def follow(directory: Path, count: int, acknowledge: Callable[[], None]) -> None:
    """Apply the same batches as deltas of another tablet: a replica."""
    from srengine import storage

    with storage.Store(directory.parent / "source") as sources, storage.Store(directory, map_bytes=1 << 18) as store:
        source = sources.tablet("source")
        tablet = store.create_tablet(TABLET, lineage=source.lineage, seed=source.seed)
        acknowledge()
        for batch in range(1, count + 1):
            base = source.sequence
            source.apply([storage.Batch(encode(batch))])
            delta = source.delta_since(base, bytes_max=1 << 30)
            assert delta is not None
            tablet.apply_delta(delta)
            acknowledge()


def copy(directory: Path, count: int, acknowledge: Callable[[], None]) -> None:
    """Fill a tablet chunk by chunk from another one, each marked, and finish: a new replica.

    The chunks are kept beside, so that the checker can go on with what a crash left (`goes_on`).
    """
    from srengine import storage

    with storage.Store(directory.parent / "source") as sources, storage.Store(directory, map_bytes=1 << 18) as store:
        source = sources.tablet("source")
        for batch in range(1, count + 1):
            source.apply([storage.Batch(encode(batch))])
        tablet = store.create_tablet(TABLET, lineage=source.lineage, seed=source.seed)
        chunks = directory / CHUNKS
        chunks.mkdir()
        with source.view() as view:
            after = None
            while True:
                rows = view.rows_by_key(after, bytes_max=20_000)
                (chunks / f"rows-{len(list(chunks.iterdir())):04d}").write_bytes(rows.rows)
                after = rows.last
                if rows.done:
                    break
            (chunks / "meta").write_bytes(view.meta_rows(0))
            (chunks / "state").write_bytes(view.state)
        acknowledge()
        for number, path in enumerate(sorted(chunks.glob("rows-*")), 1):
            tablet.fill(path.read_bytes(), b"%d" % number)
            acknowledge()
        tablet.finish_fill((chunks / "meta").read_bytes(), (chunks / "state").read_bytes())
        acknowledge()


def goes_on(tablet: Tablet, chunks: Path, acknowledged: int) -> str | None:
    """Finish a copy that was cut off; return what is wrong with what was there, or None."""
    paths = sorted(chunks.glob("rows-*"))
    mark = tablet.fill_mark
    if mark is None and tablet.sequence == 0:
        done = 0
    elif mark is None:
        done = len(paths) + 1
    else:
        done = int(mark)
    if not acknowledged <= done <= acknowledged + 1:
        return f"{done} chunks are there, {acknowledged} were acknowledged"
    if done <= len(paths):
        for number in range(done, len(paths)):
            tablet.fill(paths[number].read_bytes(), b"%d" % (number + 1))
        # Raises unless root and count are the source's.
        tablet.finish_fill((chunks / "meta").read_bytes(), (chunks / "state").read_bytes())
    return None


LOG = "log"
GROUPS = ("journal", "tablet")
TRIM_EVERY = 4
WAL_BYTES = 20 * 1024
"""Some turns fit: the log is settled again and again; a large one goes past it."""


def turn(number: int, group: str, last: int) -> list[Entry]:
    """Return the entries that a turn appends to a group whose log ends at ``last``; some cut a suffix off."""
    from srengine.consensus.entries import Configuration, Entry, EntryKind

    random_ = random.Random(f"{number}/{group}")
    first = max(last + 1 - (random_.randrange(4) if number % 3 == 0 else 0), 1)
    found = []
    for index in range(first, first + random_.randrange(1, 6)):
        data = random_.randbytes(random_.choice(_SIZES))
        if index % 7 == 0:
            found.append(Entry(index, number, EntryKind.CONFIGURATION, data, Configuration((f"{number:032x}",))))
        else:
            found.append(Entry(index, number, EntryKind.COMMAND, data))
    return found


def logs(turns: int) -> dict[str, dict[int, Entry]]:
    """Return the entries of each group after so many turns, as if nothing was ever trimmed."""
    found: dict[str, dict[int, Entry]] = {group: {} for group in GROUPS}
    for number in range(1, turns + 1):
        for group, entries in found.items():
            added = turn(number, group, max(entries, default=0))
            for index in [index for index in entries if index >= added[0].index]:
                del entries[index]
            entries.update((entry.index, entry) for entry in added)
    return found


def write_log(directory: Path, count: int, acknowledge: Callable[[], None]) -> None:
    """Write turns of two groups to one log, cut suffixes, trim, and settle whenever its write-ahead log is full."""
    from srengine.consensus.effects import Persist
    from srengine.consensus.entries import HardState
    from srengine.consensus.log import NodeLog

    directory.mkdir(mode=0o700)
    with NodeLog.open(directory / LOG, cache_bytes=5000, wal_bytes=WAL_BYTES) as log:
        for name in GROUPS:
            log.bootstrap(name)
        acknowledge()
        for number in range(1, count + 1):
            log.append(
                {
                    name: Persist(HardState(number, "v" * 32), tuple(turn(number, name, log.group(name).last_index)))
                    for name in GROUPS
                }
            )
            acknowledge()
            if number % TRIM_EVERY == 0:
                for name in GROUPS:
                    group = log.group(name)
                    # What later turns may cut off stays.
                    log.trim(name, group.floor_at(max(group.floor.index, group.last_index - 12)))


def check_log(log: NodeLog, acknowledged: int) -> str | None:
    """Return what is wrong with a log that a crash left, or None."""
    turns = {log.group(name).hard_state.term for name in log.groups()}
    if log.groups() != sorted(GROUPS) or len(turns) != 1:
        return f"turns {turns} of {log.groups()}"
    (done,) = turns
    if not acknowledged <= done <= acknowledged + 1:
        return f"{done} turns are there, {acknowledged} were acknowledged"
    wanted = logs(done)
    for name in GROUPS:
        group = log.group(name)
        if group.damage is not None:
            return f"{name}: {group.damage}"
        found = {entry.index: entry for entry in group.entries(group.floor.index + 1, group.last_index + 1, 1 << 30)}
        if found != {index: entry for index, entry in wanted[name].items() if index > group.floor.index}:
            return f"the entries of {name} are not those after {done} turns"
        if group.last_index != max(wanted[name], default=0):
            return f"{name} ends at {group.last_index}"
    return None


KINDS = {"batches": write_batches, "follow": follow, "copy": copy, LOG: write_log}


def main() -> None:
    kind, directory, count, fd = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    KINDS[kind](directory, count, lambda: os.write(fd, b"acknowledged\n") and None)


if __name__ == "__main__":
    main()
