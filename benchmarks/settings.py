"""What a run is told by its environment: ``python -m benchmarks`` sets it, and so does the smoke test.

``SRENGINE_BENCH_SIZE``       full (1 000 000 records, the default), quick (100 000) or tiny (a smoke test)
``SRENGINE_BENCH_DIRECTORY``  where the stores are made; default: build/ of the working copy, because a directory for
                              temporary files is often memory, which makes every fsync free and every ratio a fiction
``SRENGINE_BENCH_JSON``       also write the table as JSON to this file
``SRENGINE_BENCH_MARKDOWN``   also write the table and the machine as markdown to this file
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.data import SIZES, Sizes

ROOT = Path(__file__).resolve().parent.parent
MAP_BYTES = 8 << 30
"""Address space of a reference store; only what is written costs disk."""


def sizes() -> Sizes:
    """Return the sizes of this run."""
    name = os.environ.get("SRENGINE_BENCH_SIZE", "full")
    if name not in SIZES:
        raise SystemExit(f"SRENGINE_BENCH_SIZE is {name!r}; it is one of {', '.join(SIZES)}")
    return SIZES[name]


def directory() -> Path:
    """Return the directory below which the stores are made."""
    named = os.environ.get("SRENGINE_BENCH_DIRECTORY")
    return Path(named) if named else ROOT / "build"


def output(kind: str) -> Path | None:
    """Return where to write the table as "JSON" or "MARKDOWN", if anywhere."""
    named = os.environ.get(f"SRENGINE_BENCH_{kind}")
    return Path(named) if named else None
