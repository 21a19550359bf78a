"""Shipping between two processes, and everything together: make a snapshot, ship it, apply it."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import Sizes
from benchmarks.race import race
from benchmarks.shipping import Server, Use
from benchmarks.stores import Loaded
from benchmarks.table import Row, at_least, at_most, rate
from srengine import limits
from srengine.snapshot import SnapshotSource

MEMORY_BYTES_MAX = 64 * limits.MIB


@pytest.mark.parametrize("security", ["plain", "CURVE"])
def bench_shipping(benchmark: Any, report: Callable[[Row], None], scratch: Path, sizes: Sizes, security: str) -> None:
    """Ship 1 MiB items to another process: over our stream, and as bare frames of the same size."""
    source = random.Random(1)
    # Not one buffer again and again: it would never leave the cache, which no snapshot does.
    distinct = [source.randbytes(limits.CHUNK_BYTES_TARGET) for _ in range(min(64, sizes.ship_items))]
    count = sizes.ship_items
    seconds: list[float] = []
    raw: list[float] = []
    with (
        Server((distinct * count)[:count], lambda: iter(()), secure=security == "CURVE") as server,
        server.child() as child,
    ):
        race(
            benchmark,
            lambda _: seconds.append(child.ask("ship", count)["seconds"]),
            {"pyzmq": lambda _: raw.append(child.ask("raw", count)["seconds"])},
            rounds=2 * sizes.rounds - 1,
        )
    size = limits.CHUNK_BYTES_TARGET * count
    ratios = sorted(bare / own for own, bare in zip(seconds, raw, strict=True))
    report(
        Row(
            f"shipping between two processes, {security} / raw pyzmq",
            at_least(0.8),
            ratios[len(ratios) // 2],
            rate(size, sorted(seconds)[len(seconds) // 2], "B"),
            rate(size, sorted(raw)[len(raw) // 2], "B"),
        )
    )


@pytest.mark.parametrize("compression", ["none", "auto", "zstd"])
def bench_together(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, loaded: Loaded, sizes: Sizes, compression: str
) -> None:
    """Make, ship and apply a snapshot at the same time, against the slowest of the three alone."""

    def make() -> Any:
        return iter(SnapshotSource(loaded.tablet, compression=compression))

    stages: dict[str, list[float]] = {"write": [], "ship": [], "apply": []}
    together: list[float] = []
    grown: list[float] = []
    processor: list[float] = []

    def write(_: int) -> None:
        start = time.perf_counter()
        for _item in make():
            pass
        stages["write"].append(time.perf_counter() - start)

    def alone(command: str, count: int, directory: Path) -> dict[str, float]:
        # A process of its own each time: what an earlier one left in its heap would hide growth. What it wrote goes at
        # once: otherwise the disk would still be busy with it when the next stage is timed.
        try:
            with server.child() as child:
                return child.ask(command, count, directory, sizes.copy_bytes)
        finally:
            if directory != scratch:
                shutil.rmtree(directory)

    def all_of_it(turn: int) -> None:
        use = Use()
        said = alone("all", 0, scratch / f"all-{turn}")
        here = use.stop()
        together.append(said["seconds"])
        processor.append(said["processor"] + here["processor"])
        grown.append(max(said["memory"], here["memory"]))

    def ship(_: int) -> None:
        stages["ship"].append(alone("ship", len(items), scratch)["seconds"])

    def apply(turn: int) -> None:
        stages["apply"].append(alone("apply", len(items), scratch / f"apply-{turn}")["seconds"])

    items = list(make())
    with Server(items, make, secure=False) as server:
        race(benchmark, all_of_it, {"write": write, "ship": ship, "apply": apply}, rounds=min(5, sizes.rounds))
    slowest = [max(each) for each in zip(*stages.values(), strict=True)]
    ratios = sorted(wall / stage for wall, stage in zip(together, slowest, strict=True))
    middle = len(ratios) // 2
    name = max(stages, key=lambda stage: sorted(stages[stage])[middle])
    processors = os.cpu_count() or 1
    least = sorted(processor)[middle] / processors / sorted(slowest)[middle]
    report(
        Row(
            f"write, ship, apply together, {compression}: wall / slowest stage",
            at_most(1.3),
            ratios[middle],
            f"{sorted(together)[middle]:.2f} s",
            f"{sorted(slowest)[middle]:.2f} s ({name})",
            note=(
                f"{sorted(processor)[middle]:.2f} s of processor time in all, {processors} processors: the ratio cannot"
                f" be less than {least:.2f}."
            ),
        )
    )
    report(
        Row(
            f"write, ship, apply together, {compression}: memory / 64 MiB",
            at_most(1.0),
            max(grown) / MEMORY_BYTES_MAX,
            f"{max(grown) / limits.MIB:.1f} MiB",
            "64 MiB",
            note="Growth of anonymous memory while it runs, of the process that grew more; mapped pages do not count.",
        )
    )
