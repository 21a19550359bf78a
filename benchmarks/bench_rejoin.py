"""What a replica that was away has to be sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from benchmarks.data import KEY_BYTES, VALUE_BYTES, Data
from benchmarks.stores import Loaded
from benchmarks.table import Row, at_most

ROW_BYTES = 24
"""What a shipped row needs beside its key and value (docs/formats.md)."""
DELTA_BYTES_MAX = 1 << 30


def bench_rejoin_bytes(benchmark: Any, report: Callable[[Row], None], loaded: Loaded, data: Data) -> None:
    """Change 1 % of the records, some of them several times, and count the bytes of the delta since then."""
    tablet = loaded.tablet
    before = tablet.position.sequence
    order = random.Random(9)
    numbers = order.sample(range(data.count), data.count // 100)
    for turn, part in enumerate((numbers, numbers[: len(numbers) // 3])):
        tablet.put_many(data.changed(part, seed=5000 + turn))
    delta = benchmark.pedantic(
        tablet.delta_since, args=(before,), kwargs={"bytes_max": DELTA_BYTES_MAX}, rounds=3, iterations=1
    )
    assert delta is not None, "more than a GiB of changes"
    sent = len(delta.rows) + len(delta.meta) + len(delta.state)
    least = len(numbers) * (KEY_BYTES + VALUE_BYTES + ROW_BYTES)
    report(
        Row(
            "rejoin after 1 % changed: bytes / (records + 24 B each)",
            at_most(1.1),
            sent / least,
            f"{sent} B",
            f"{least} B",
            note="Bytes of the delta that a replica pulls; it comes from the change log, no record outside it is read.",
        )
    )
