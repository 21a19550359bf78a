"""A peer whose window is full, and whose next entries are trimmed meanwhile."""

from __future__ import annotations

import pytest

from srengine import limits
from srengine.consensus import effects as fx
from srengine.consensus.messages import Append, Install
from tests.consensus.groups import Group


def test_trimming_past_a_full_window_offers_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """B22: a leader that may not send more to a peer, and trims past it, says nothing about places that it no longer
    has, and offers the state with its next heartbeat.
    """
    monkeypatch.setattr(limits, "IN_FLIGHT_MESSAGES_MAX", 1)
    group = Group(("a", "b", "c"))
    group.elect("a")
    group.propose("a", b"1")
    group.flow()
    group.cut = {("a", "b")}
    group.propose("a", b"2")  # on its way to b for ever: its window is full
    group.flow()
    group.propose("a", b"3")
    group.flow()
    machine = group["a"]
    floor = machine.floor_at(machine.applied_index)
    group.nodes["a"].log.trim(floor)
    group.step("a", fx.Trimmed(floor, b"here"))
    group.propose("a", b"4")
    group.flow()
    assert machine.commit_index == floor.index + 1
    machine.tick(group.now + group.timing.heartbeat_s)
    group.settle("a")
    said = [out.message for out in group.on_way if out.target == "b"]
    assert [type(message) for message in said] == [Install], said
    assert not any(isinstance(message, Append) for message in said)
