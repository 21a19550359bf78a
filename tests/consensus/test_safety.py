"""Storms over a group: what must hold, holds; and the storm is wild enough to find what is broken."""

from __future__ import annotations

import pytest

from tests.consensus import breakages
from tests.consensus.storm import weather


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_storm_breaks_no_promise(first):
    """F21, F23, F24, F27, F29: ten storms of faults: safe all the time, and at work again afterwards."""
    decided = terms = 0
    for seed in range(first, first + 10):
        storm = weather(seed)
        decided += storm.committed
        terms += len(storm.leaders_of)
    assert decided > 50
    assert terms > 10


@pytest.mark.parametrize(
    "kind",
    [
        breakages.VotesTwice,
        breakages.VotesForShorterLogs,
        breakages.CommitsWithoutMajority,
        breakages.WinsWithHalf,
        breakages.DoesNotCheckThePlaceBefore,
        breakages.BelievesEveryCommitIndex,
        breakages.TrustsItself,
    ],
)
def test_storm_finds_a_broken_rule(kind):
    """A machine that breaks one rule does not get through 150 storms: a promise is broken, or an assertion stops it."""
    with pytest.raises(AssertionError):
        for seed in range(150):
            weather(seed, kind)
