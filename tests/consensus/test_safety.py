"""Storms over a group: what must hold, holds; and the storm is wild enough to find what is broken."""

from __future__ import annotations

import pytest

from tests.consensus import breakages
from tests.consensus.storm import Violation, weather


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_storm_breaks_no_promise(first):
    """F21, F23, F24, F27, F29: ten storms of faults: safe all the time, and at work again afterwards."""
    for seed in range(first, first + 10):
        weather(seed)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (breakages.VotesTwice, None),
        (breakages.VotesForShorterLogs, None),
        (breakages.CommitsWithoutMajority, None),
        (breakages.WinsWithHalf, None),
        (breakages.DoesNotCheckThePlaceBefore, None),
        (breakages.BelievesEveryCommitIndex, None),
        (breakages.ReadsWithoutAsking, None),
        (breakages.ReadsBeforeTheTermIsSettled, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_storm_finds_a_broken_rule(kind, seed):
    """A machine that breaks one rule does not get through."""
    with pytest.raises((Violation, AssertionError)):
        for number in range(150) if seed is None else [seed]:
            weather(number, kind)
