"""The process whose power is cut: batches that change a small world, each acknowledged when `Tablet.apply` returned.

Run as ``python -m tests.crash.workload DIRECTORY BATCHES ACK_FD``. What must be in the tablet after ``n`` batches is
`world(n)`, so that a checker needs nothing but the number of batches that it finds.

A batch puts new records, overwrites a common set in full (half a batch would show as two generations), deletes some
of an earlier batch, and counts itself in the record ``batch``. Sizes go from nothing to several pages.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

TABLET = "crash"
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


def main() -> None:
    from srengine import storage

    directory, batches, acknowledge_fd = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with storage.Store(directory, map_bytes=1 << 20) as store:
        tablet = store.tablet(TABLET)
        os.write(acknowledge_fd, b"open\n")
        for batch in range(1, batches + 1):
            encoded = storage.encode_operations(
                [(1, key, b"", 0, 0) if value is None else (0, key, value, 0, 0) for key, value in operations(batch)]
            )
            tablet.apply([storage.Batch(encoded)])
            os.write(acknowledge_fd, b"%d\n" % batch)


if __name__ == "__main__":
    main()
