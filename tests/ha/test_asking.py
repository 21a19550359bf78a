"""Whom a node asks that hears no leader."""

from __future__ import annotations

from collections import Counter

from srengine.ha.backends.raft_standing import whom_to_ask
from srengine.ha.members import Member
from srengine.types import NodeId


def test_many_observers_do_not_all_ask_each_other() -> None:
    """B29: without a leader each of 40 observers asks the five voters and one other node at a time, in turn, so that
    nobody is left out and not everybody connects to everybody.
    """
    voters = {NodeId(f"v{number}"): Member(f"v{number}", "", number) for number in range(5)}
    observers = {NodeId(f"o{number}"): Member(f"o{number}", "", number, role="observer") for number in range(40)}
    learner = {NodeId("l"): Member("l", "", 50, stable=False)}
    members = voters | observers | learner
    asked = [whom_to_ask(members, NodeId("o7"), turn) for turn in range(40)]
    assert all(set(voters) <= set(each) and len(each) == 6 for each in asked)
    others = Counter(node for each in asked for node in each if node not in voters)
    assert others == dict.fromkeys((observers | learner).keys() - {"o7"}, 1)


def test_a_voter_does_not_ask_itself() -> None:
    """The asking node is left out; without others only voters are asked."""
    members = {NodeId(name): Member(name, "", 0) for name in ("a", "b", "c")}
    assert whom_to_ask(members, NodeId("b"), 3) == ["a", "c"]
    assert whom_to_ask({}, NodeId("b"), 0) == []
