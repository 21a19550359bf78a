"""Every state of a small group is visited: election and fencing."""

from __future__ import annotations

import pytest

from srengine.consensus.entries import EntryKind
from tests.consensus import breakages
from tests.consensus.model import BOUNDS, Broken, Model


@pytest.mark.parametrize("name", ["votes", "terms"])
def test_no_state_of_three_nodes_breaks_a_promise(name):
    """B37: within its bounds no order of events makes two leaders of a term, or two owners of an epoch."""
    model = Model(**BOUNDS[name])
    worlds = model.run()
    assert worlds > 4000
    assert model.leaderships > 200
    assert model.ownerships > 200


@pytest.mark.parametrize(
    ("kind", "bounds", "finding"),
    [
        (breakages.VotesTwice, "terms", "two leaders"),
        (breakages.ForgetsItsVote, "votes", "two leaders|logs do not match"),
        (breakages.WinsWithHalf, "votes", "two leaders"),
        (breakages.VotesForShorterLogs, "terms", "a leader lacks what is decided"),
        (breakages.CommitsWithoutMajority, "terms", "two decisions at one index|a leader lacks what is decided"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_rule_is_found(kind, bounds, finding):
    """B37: the search finds a machine that breaks a rule of elections, and says how one gets there."""
    with pytest.raises(Broken, match=f"({finding}), after: . stands"):
        Model(kind, **BOUNDS[bounds]).run()


def test_an_applier_that_fences_nobody_is_found():
    """B37: when the last to insert an epoch owns it instead of the first, two nodes act for one epoch."""

    def last_wins(applied):
        return {int(e.data.split()[0]): e.data for e in applied if e.kind is EntryKind.COMMAND}

    with pytest.raises(Broken, match="an epoch has two owners"):
        Model(owners_of=last_wins, **BOUNDS["terms"]).run()
