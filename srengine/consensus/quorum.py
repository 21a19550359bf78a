"""Majorities of voters: what they agree on, and how a vote stands.

Any two majorities of one configuration have a voter in common, and so have a majority of one configuration and a
majority of another that differs by one voter: all of Raft's safety is built on that.

>>> agreed([7, 3, 5])
5
>>> vote(("a", "b", "c"), {"a": True, "b": True}), vote(("a", "b", "c"), {"a": True, "b": False})
(<Outcome.WON: 'won'>, <Outcome.OPEN: 'open'>)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TypeVar

from srengine.types import NodeId

Value = TypeVar("Value", int, float)


class Outcome(enum.Enum):
    """How a vote stands."""

    WON = "won"
    LOST = "lost"
    OPEN = "open"


def majority(voters: int) -> int:
    """Return how many of so many voters are a majority."""
    return voters // 2 + 1


def agreed(reached: Sequence[Value]) -> Value:
    """Return the largest value that a majority has reached, of what each of the voters has ``reached``."""
    assert reached, "a group without voters agrees on nothing"
    return sorted(reached)[(len(reached) - 1) // 2]


def vote(voters: Sequence[NodeId], votes: Mapping[NodeId, bool]) -> Outcome:
    """Return how the vote stands; answers of others than the voters do not count."""
    needed = majority(len(voters))
    answers = [votes[voter] for voter in voters if voter in votes]
    if sum(answers) >= needed:
        return Outcome.WON
    refusals = len(answers) - sum(answers)
    return Outcome.LOST if len(voters) - refusals < needed else Outcome.OPEN
