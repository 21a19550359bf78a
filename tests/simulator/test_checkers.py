"""The checkers of safety and progress, against what they must accept and what they must find."""

from __future__ import annotations

import pytest

from tests.simulator.checkers.acknowledged import Acknowledged
from tests.simulator.checkers.application import StateMachineSafety
from tests.simulator.checkers.completeness import LeaderCompleteness
from tests.simulator.checkers.election import ElectionSafety
from tests.simulator.checkers.epochs import Epochs
from tests.simulator.checkers.matching import START, LogMatching, chained
from tests.simulator.checkers.progress import Progress
from tests.simulator.checkers.violation import Violation


def test_one_leader_a_term() -> None:
    """A node may lead many terms and a group many leaders, but a term of a group only one."""
    checker = ElectionSafety()
    checker.leads("g", 1, "a")
    checker.leads("g", 1, "a")
    checker.leads("g", 2, "b")
    checker.leads("h", 1, "c")
    assert checker.elections == 3
    with pytest.raises(Violation, match=r"election safety.*term 2: both b and a"):
        checker.leads("g", 2, "a")


def test_logs_that_match() -> None:
    """Logs with the same index and term are equal before it; with different terms they may differ."""
    checker = LogMatching()
    first = chained(START, 1, 1, b"x")
    second = chained(first, 2, 1, b"y")
    checker.appended("g", "a", 1, 1, first)
    checker.appended("g", "a", 2, 1, second)
    checker.appended("g", "b", 1, 1, first)
    checker.appended("g", "b", 2, 2, chained(first, 2, 2, b"z"))
    checker.appended("h", "b", 2, 1, chained(first, 2, 1, b"another group"))
    with pytest.raises(Violation, match="log matching"):
        checker.appended("g", "c", 2, 1, chained(first, 2, 1, b"another entry"))


def test_logs_that_differ_below_an_equal_entry() -> None:
    """An entry that was appended after another history is found, though it is itself equal."""
    checker = LogMatching()
    checker.appended("g", "a", 3, 4, chained(chained(START, 2, 2, b"x"), 3, 4, b"same"))
    with pytest.raises(Violation, match="log matching"):
        checker.appended("g", "b", 3, 4, chained(chained(START, 2, 3, b"x"), 3, 4, b"same"))


def test_leader_has_what_was_committed_before_its_term() -> None:
    """A leader that lacks an entry committed in an earlier term, or has another, is found."""
    checker = LeaderCompleteness()
    checker.committed("g", 1, 1, 1)
    checker.committed("g", 2, 1, 2)
    checker.leads("g", "a", 3, 0, {1: 1, 2: 1, 3: 1}.get)
    checker.leads("g", "b", 3, 2, {}.get)
    checker.leads("h", "b", 3, 0, {}.get)
    with pytest.raises(Violation, match=r"leader completeness.*b leads term 3 and has None at 2"):
        checker.leads("g", "b", 3, 1, {}.get)
    with pytest.raises(Violation, match=r"leader completeness.*has 2 at 2"):
        checker.leads("g", "b", 3, 0, {1: 1, 2: 2}.get)


def test_leader_of_a_term_that_is_past_is_not_accused() -> None:
    """A leader elected late for an old term need not hold what was committed in later ones."""
    checker = LeaderCompleteness()
    checker.committed("g", 1, 1, 1)
    checker.committed("g", 2, 5, 5)
    checker.leads("g", "a", 4, 0, {1: 1}.get)
    checker.leads("g", "a", 5, 0, {1: 1}.get)


def test_everybody_applies_the_same() -> None:
    """Who applies another entry at an index than the first did is found."""
    checker = StateMachineSafety()
    assert checker.applied("g", "a", 0, 1, 1, 11)
    assert checker.applied("g", "a", 1, 2, 1, 22)
    assert not checker.applied("g", "b", 0, 1, 1, 11)
    assert checker.applied("h", "b", 0, 1, 2, 33)
    assert checker.newest == {"g": 2, "h": 1}
    assert checker.term_at("g", 2) == 1
    assert checker.term_at("g", 3) is None
    with pytest.raises(Violation, match=r"state machine safety.*at 2 a applied"):
        checker.applied("g", "b", 1, 2, 2, 22)
    with pytest.raises(Violation, match="state machine safety"):
        checker.applied("g", "b", 1, 2, 1, 23)


@pytest.mark.parametrize("index", [1, 2, 4])
def test_nobody_leaves_out_or_repeats(index: int) -> None:
    """An entry that is applied twice, too early or after a gap is found."""
    checker = StateMachineSafety()
    with pytest.raises(Violation, match=f"applied {index} after 2"):
        checker.applied("g", "a", 2, index, 1, 0)


def test_states_at_one_index_are_equal() -> None:
    """H27: two states at one index that differ are found."""
    checker = StateMachineSafety()
    checker.state("g", "a", 5, 1)
    checker.state("g", "b", 5, 1)
    checker.state("g", "b", 6, 2)
    with pytest.raises(Violation, match="the states of a and c differ at 5"):
        checker.state("g", "c", 5, 2)


def test_epochs_rise_by_one_and_have_one_owner() -> None:
    """B04: an epoch that is given twice, left out or goes back is found."""
    checker = Epochs()
    checker.given("g", 2, 1, "a")
    checker.given("g", 9, 2, "b")
    checker.given("g", 2, 1, "a")
    checker.given("h", 2, 1, "b")
    with pytest.raises(Violation, match="epoch 2 was given to b at 9 and to a at 12"):
        checker.given("g", 12, 2, "a")
    with pytest.raises(Violation, match="epoch 4 at 13 follows 2"):
        checker.given("g", 13, 4, "a")


def test_same_owner_twice_is_twice() -> None:
    """B04: an epoch that the same node gets at two indexes is found too."""
    checker = Epochs()
    checker.given("g", 2, 1, "a")
    with pytest.raises(Violation, match="given to a at 2 and to a at 3"):
        checker.given("g", 3, 1, "a")


def test_only_the_owner_of_the_newest_epoch_acts() -> None:
    """B06: an effect for an epoch of another, of none, or that is past, is found."""
    checker = Epochs()
    checker.given("g", 2, 1, "a")
    checker.given("g", 9, 2, "b")
    checker.acted("g", 3, 1, "a")
    checker.acted("g", 10, 2, "b")
    for index, epoch, proposer in ((4, 1, "b"), (10, 1, "a"), (11, 3, "b"), (8, 2, "b")):
        with pytest.raises(Violation, match="acted at"):
            checker.acted("g", index, epoch, proposer)


def test_acknowledged_entries_are_kept() -> None:
    """H11: what was acknowledged and has no effect, or is not among what a node applied, is found."""
    checker = Acknowledged()
    checker.effect("g", b"1", 5)
    checker.effect("g", b"1", 5)
    checker.acknowledged("g", b"1", 5)
    checker.kept("g", "a", 5)
    with pytest.raises(Violation, match="is not among the 4 of a"):
        checker.kept("g", "a", 4)
    checker.acknowledged("g", b"2", 6)
    assert checker.count == 2
    assert (checker.newest("g"), checker.newest("h")) == (6, 0)
    with pytest.raises(Violation, match="is not among the 9 of a"):
        checker.kept("g", "a", 9)
    checker.kept("h", "a", 0)


def test_requests_take_effect_once() -> None:
    """F27: a request that took effect at two indexes, or was acknowledged at two, is found."""
    checker = Acknowledged()
    checker.effect("g", b"1", 5)
    with pytest.raises(Violation, match="took effect at 5 and at 7"):
        checker.effect("g", b"1", 7)
    checker.acknowledged("g", b"1", 5)
    with pytest.raises(Violation, match="acknowledged at 5 and at 7"):
        checker.acknowledged("g", b"1", 7)


def test_progress_is_demanded_only_after_the_heal() -> None:
    """Before the heal nothing is late; after it whatever is missing at the bound is."""
    checker = Progress(10.0)
    checker.look(1e9)
    assert not checker.done
    checker.healed(100.0, ["leader of g", "write to g"])
    checker.look(110.0)
    assert checker.reached("leader of g", 103.0) == 3.0
    with pytest.raises(Violation, match=r"progress: 10 s after everything was healed there is no write to g$"):
        checker.look(110.1)
    checker.reached("write to g", 110.2)
    assert checker.done
    checker.look(1e9)
