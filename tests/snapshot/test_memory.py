"""Write, ship and apply in bounded memory, whatever the size of the tablet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from srengine.limits import MIB
from srengine.storage import Store

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = textwrap.dedent(
    """
    import sys, threading
    from srengine.snapshot import SnapshotSink, SnapshotSource, Staged, apply_snapshot, write_snapshot
    from srengine.storage import Store

    def anonymous_kib():
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("RssAnon")).split()[1])

    what, here, there, file = sys.argv[1:]
    compression = "zstd" if what.endswith("zstd") else "none"
    with Store(here) as one, Store(there) as other:
        source = one.tablet("users")
        small = one.tablet("small")
        small.put(b"key", b"value")
        with SnapshotSink(Staged(other, small.id)) as sink:
            for item in SnapshotSource(small):
                sink.accept(item)
            sink.finish()
        before = anonymous_kib()
        peak = [before]
        done = threading.Event()
        def watch():
            while not done.wait(0.001):
                peak.append(max(peak[-1], anonymous_kib()))
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            if what.startswith("write"):
                write_snapshot(source, file, compression=compression)
            elif what.startswith("apply"):
                apply_snapshot(other.tablet("copy"), file)
            else:
                with SnapshotSink(Staged(other, source.id)) as sink:
                    for item in SnapshotSource(source, compression=compression):
                        sink.accept(item)
                    assert sink.finish() == source.position
        finally:
            done.set()
            watcher.join()
        print(peak[-1] - before)
    """
)


def grown_bytes(what: str, tmp_path: Path) -> int:
    """Return how far the anonymous memory of a process rose while it did ``what``."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, *(str(tmp_path / name) for name in ("one", "other", "file"))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.fixture(params=["many records", "large values"])
def tablet(request, tmp_path) -> int:
    """Make a tablet much larger than the bound; return the size of its largest value."""
    with Store(tmp_path / "one") as one:
        source = one.tablet("users")
        if request.param == "many records":
            for start in range(0, 360_000, 40_000):
                source.put_many(
                    [(b"key-%012d" % (n * 7919 % 360_000), b"%0250d" % n) for n in range(start, start + 40_000)]
                )
            return 250
        for number in range(5):
            source.put(b"key-%d" % number, os.urandom(32 * MIB) if number % 2 else bytes(32 * MIB))
        return 32 * MIB


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_memory_stays_bounded(tablet, tmp_path, compression):
    """T13, design §5: at most 64 MiB + twice the largest value to write, apply and ship a tablet of any size."""
    bound = 64 * MIB + 2 * tablet
    for what in ("write", "apply", "ship"):
        grown = grown_bytes(f"{what}-{compression}", tmp_path)
        assert grown <= bound, (what, grown, bound)
