"""The simulator finds bugs: every deliberate breakage of breakages.py is found, most of them within seconds.

RECORDED has for each the seed that found it first when all seeds from 0 were run (docs/testing.md has the table). When
the machine changes, a seed tells another story: then the search goes on with other seeds, and
``python -m tests.simulator --hunt`` makes a new table.
"""

from __future__ import annotations

import itertools

import pytest

from tests.simulator.breakages import BREAKAGES
from tests.simulator.story import Failure, run

RECORDED = {
    "vote twice": 8,
    "skip term checks": 0,
    "follow the past": 0,
    "commit by count": 3,
    "send before persist": 71,
    "no election restriction": 15,
    "no promise": 14,
    "no promise after a start": 3,
    "lease from receipt": 60,
    "read unconfirmed": 0,
    "read before own entry": 753,
    "several voters at once": 0,
    "configure when committed": 0,
    "cut on every append": 87,
    "skip previous term": 2,
    "commit alone": 2,
    "apply what came": 6,
    "count learners": 9,
    "count untrusted": 0,
    "trust restored": 1,
    "trust too early": 9,
    "act unfenced": 2,
    "reuse an epoch": 0,
    "repeat requests": 1,
}
SEARCHED = 1000
"""How many seeds more are tried in the gate."""


@pytest.mark.parametrize("name", BREAKAGES)
def test_breakage_is_found(name: str) -> None:
    """A machine, driver or service that is broken like this breaks a promise that a checker sees."""
    for seed in itertools.chain([RECORDED[name]], range(SEARCHED)):
        try:
            run(seed, breakage=BREAKAGES[name])
        except Failure:
            return
    pytest.fail(f"{name} is not found: python -m tests.simulator --hunt --breakage '{name}' --seeds 1000")


def test_every_breakage_has_its_seed() -> None:
    """The list of breakages and the recorded seeds are of the same names, at least twelve."""
    assert set(RECORDED) == set(BREAKAGES)
    assert len(BREAKAGES) >= 12
