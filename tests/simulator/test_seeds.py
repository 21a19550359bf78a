"""The seeds of the gate: nodes of the real machines keep every promise under faults, and make progress after them."""

from __future__ import annotations

import pytest

from tests.simulator.story import Report, run

BLOCK = 20


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_seeds_keep_every_promise(first: int) -> None:
    """F21, F23 to F27, F29, F32, H06, H09, H11, H28, B20: no seed breaks a promise, and after the heal all goes on."""
    reports = [run(seed) for seed in range(first, first + BLOCK)]
    assert sum(report.acknowledged for report in reports) > 20 * BLOCK
    assert sum(report.answered for report in reports) > 40 * BLOCK


def total(reports: list[Report], fault: str) -> int:
    return sum(dict(report.faults).get(fault, 0) for report in reports)
