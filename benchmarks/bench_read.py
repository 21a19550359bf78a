"""Reads of warm data: single gets against py-lmdb, the checked scan against a C cursor loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from benchmarks.data import KEY_BYTES, VALUE_BYTES, Data, Sizes
from benchmarks.race import race
from benchmarks.stores import Loaded
from benchmarks.table import Row, at_least


def bench_get(benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data, sizes: Sizes) -> None:
    """Get single records at random: py-lmdb begins a transaction for each, as its users do; ours verifies each."""
    order = random.Random(8)
    keys = [data.key(order.randrange(data.count)) for _ in range(sizes.gets)]
    get = loaded.tablet.get
    environment, records = loaded.pylmdb.environment, loaded.pylmdb.records

    def ours(_: int) -> None:
        for key in keys:
            get(key)

    def theirs(_: int) -> None:
        begin = environment.begin
        for key in keys:
            with begin() as transaction:
                transaction.get(key, db=records)

    ours(0)
    theirs(0)
    times = race(benchmark, ours, {"py-lmdb": theirs}, rounds=sizes.rounds)
    report(
        Row(
            "get, warm / py-lmdb begin + get",
            at_least(1.2),
            times.ratio("py-lmdb"),
            f"{times.ours_s / sizes.gets * 1e9:.0f} ns",
            f"{times.reference_s('py-lmdb') / sizes.gets * 1e9:.0f} ns",
        )
    )


def bench_scan_checked(benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data, sizes: Sizes) -> None:
    """Verify header check and content checksum of every record, against a loop that copies keys and values."""

    def ours(_: int) -> int:
        with loaded.tablet.view() as view:
            return int(view.check_all()[0])

    assert ours(0) == data.count
    assert loaded.reference.scan_copy() == (data.count, data.count * (KEY_BYTES + VALUE_BYTES))
    times = race(benchmark, ours, {"C loop": lambda _: loaded.reference.scan_copy()}, rounds=sizes.rounds)
    report(
        Row(
            "scan verifying every checksum / C cursor loop",
            at_least(0.85),
            times.ratio("C loop"),
            f"{times.ours_s / data.count * 1e9:.0f} ns/rec",
            f"{times.reference_s('C loop') / data.count * 1e9:.0f} ns/rec",
        )
    )
