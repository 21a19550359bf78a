"""A slice of each long story; ``make soak`` runs them for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import stories

pytestmark = pytest.mark.processes


def test_no_acknowledged_entry_is_lost_over_kills(tmp_path: Path) -> None:
    """H11: ten kills of random nodes under a writer: every acknowledged journal entry is on every node."""
    assert stories.kills(tmp_path, 10, seed=11) > 10


@pytest.mark.parametrize("load", [False, True])
def test_nobody_is_elected_without_a_reason(tmp_path: Path, load: bool) -> None:
    """B18: while nothing fails the term stays, idle and under data load."""
    before, after = stories.calm(tmp_path, 5.0, load=load)
    assert after == before


def test_observers_join_and_disturb_nobody(tmp_path: Path) -> None:
    """B29, B30: observers join, apply what is acknowledged, and the leader stays; when it dies they follow the next."""
    seen = stories.observers(tmp_path, 2, 2.0)
    assert seen.terms[0] == seen.terms[1], seen


@pytest.mark.requires_root
@pytest.mark.requires_tool("ip")
def test_two_places_far_from_each_other(tmp_path: Path) -> None:
    """B31: 80 ms of round trip between a leader and its followers: nobody else is elected, and a write that needs them
    makes one round trip.
    """
    seen = stories.distant(tmp_path, 5.0)
    assert seen.terms[0] == seen.terms[1], seen
    assert seen.round_trip_s >= 2 * stories.ONE_WAY_S, seen
    assert min(seen.far_s) >= 2 * stories.ONE_WAY_S, seen
    assert round(seen.round_trips) == 1, seen


def test_one_of_many_contenders_wins_each_epoch(tmp_path: Path) -> None:
    """B04: 16 processes claim the epoch behind the newest one, 20 times: exactly one is told that it has it, and that
    one stands in the record; epochs grow by one.
    """
    assert stories.contend(tmp_path, 16, 20) >= 18


def test_a_joiner_counts_once_it_has_everything(tmp_path: Path) -> None:
    """H13: a node joins a cluster with 30 MiB of agreed state and no log that reaches back: while it has not put that
    in place it is no voter, and writes go on; then it becomes one by itself and holds all of it.
    """
    seen = stories.join(tmp_path, 30)
    assert len(seen.held_s) >= 50
    assert len(seen.joining_s) >= 50
