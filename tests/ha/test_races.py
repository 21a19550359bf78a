"""Orders of events that once broke a group: found by loss stories on a busy machine."""

from __future__ import annotations

from srengine.ha import follower_machine as fm
from srengine.ha import leader_machine as lm
from srengine.types import Position

LINEAGE = "a" * 32


def at(sequence: int) -> Position:
    return Position(LINEAGE, sequence, sequence.to_bytes(16, "little"), sequence)


def test_a_kick_withdraws_the_question_that_nobody_fetched():
    """K01: time for a question and news of a new leader come together: one question leaves, not two."""
    machine = fm.FollowerMachine(own=at(3), filling=False, created=False, now=0.0)
    machine.tick(1.0)
    machine.step(fm.Kick())
    assert machine.drain().ask is None
    machine.tick(1.0)
    asked = machine.drain().ask
    assert asked is not None
    assert isinstance(machine.state, fm.Asking)
    assert machine.state.number == asked.number
    machine.tick(2.0)
    assert machine.drain().ask is None


def test_a_leader_that_starts_says_up_to_where_answers_may_exist():
    """P1: right after its start a leader's committed sequence is behind what may have been acknowledged before."""
    machine = lm.LeaderMachine(
        name="node-1",
        others=["node-2", "node-3"],
        own=at(2),
        own_trusted=False,
        root_at=lambda sequence: at(sequence).root,
        now=0.0,
    )
    machine.step(lm.Pulled("node-2", lm.Claim(at(7)), 1))
    machine.step(lm.Pulled("node-3", lm.Claim(at(4)), 2))
    recover = machine.drain().recover
    assert recover is not None
    assert recover.target == at(7)
    machine.step(lm.Recovered(at(7)))
    assert machine.serving
    assert machine.served_from == 7
