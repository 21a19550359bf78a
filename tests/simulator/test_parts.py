"""The simulated world itself: time, clocks, network and disks do what the faults count on."""

from __future__ import annotations

import random

import pytest

from srengine.consensus.effects import Persist
from srengine.consensus.entries import Entry, EntryKind, Floor, HardState
from tests.simulator.checkers.matching import START, LogMatching
from tests.simulator.checkers.violation import Violation
from tests.simulator.clock import Clock
from tests.simulator.disk import Disk, GroupLog, Health
from tests.simulator.network import SAID_MAX, Network, Weather
from tests.simulator.registers import Command, Registers, Result, Verb, encode
from tests.simulator.schedule import Schedule


def entry(index: int, term: int = 1, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.COMMAND, data)


# --- time ------------------------------------------------------------------------------------------------------------


def test_schedule_keeps_order() -> None:
    """Actions run in order of time, those of one time in the order of asking, cancelled ones not."""
    schedule, done = Schedule(), []
    schedule.at(2.0, lambda: done.append("late"))
    schedule.at(1.0, lambda: done.append("first"))
    schedule.at(1.0, lambda: schedule.after(0.5, lambda: done.append("asked on the way")))
    schedule.at(1.0, lambda: done.append("cancelled")).cancel()
    schedule.run_until(1.9)
    assert done == ["first", "asked on the way"]
    assert schedule.now_s == 1.9
    schedule.run_until(3.0)
    assert done[-1] == "late"
    assert schedule.moment() < schedule.moment()


def test_clock_drifts_and_jumps_ahead() -> None:
    """F22: a clock runs at its rate, jumps ahead, never back, and says when it will show a time."""
    schedule = Schedule()
    clock = Clock(schedule, 100.0, 2.0)
    schedule.run_until(3.0)
    assert clock.now_s() == pytest.approx(106.0)
    assert clock.when_s(108.0) == pytest.approx(4.0)
    clock.change(rate=0.5, ahead_s=10.0)
    assert clock.now_s() == pytest.approx(116.0)
    schedule.run_until(5.0)
    assert clock.now_s() == pytest.approx(117.0)


# --- the network -----------------------------------------------------------------------------------------------------


def sent(weather: Weather, count: int = 400, cut: tuple[tuple[str, str], ...] = ()) -> list[int]:
    """What arrives of numbered frames."""
    schedule = Schedule()
    network = Network(schedule, random.Random(3), weather, set(cut))
    arrived: list[int] = []
    for number in range(count):
        network.send("a", "b", (number,), lambda _target, frame: arrived.append(frame[0]))
    schedule.run_until(1000.0)
    return arrived


def test_good_network_delivers_all_in_order() -> None:
    """Without faults everything arrives once, in order."""
    assert sent(Weather()) == list(range(400))


def test_network_loses_repeats_and_reorders() -> None:
    """F26, F27: frames are lost, repeated, overtaken and late as often as the weather says."""
    assert 200 < len(sent(Weather(loss=0.3))) < 360
    assert 420 < len(sent(Weather(duplicate=0.2))) < 560
    reordered = sent(Weather(in_order=False))
    assert reordered != sorted(reordered)
    assert sorted(reordered) == list(range(400))
    late = sent(Weather(late=0.1))
    assert late != sorted(late)


def test_cut_is_one_way() -> None:
    """F24: nothing goes through a cut pair, and its other direction is open."""
    assert sent(Weather(), cut=(("a", "b"),)) == []
    assert len(sent(Weather(), cut=(("b", "a"),))) == 400


def test_network_remembers_what_was_said_last() -> None:
    """F27: the last frames of a pair, lost ones apart, can be heard again; there is a bound to it."""
    network = Network(Schedule(), random.Random(3), Weather(), {("b", "a")})
    for number in range(SAID_MAX + 5):
        network.send("a", "b", (number,), lambda _target, _frame: None)
        network.send("b", "a", (number,), lambda _target, _frame: None)
    assert [frame for frame, _ in network.said["a", "b"]] == [(number,) for number in range(5, SAID_MAX + 5)]
    assert not network.said["b", "a"]


# --- disks -----------------------------------------------------------------------------------------------------------


def written(disk: Disk, schedule: Schedule, seconds: float) -> list[bool]:
    """What a write was answered within a time."""
    answers: list[bool] = []
    disk.write([("g", Persist(HardState(1, "a"), (entry(1),)))], answers.append)
    schedule.run_until(schedule.now_s + seconds)
    return answers


@pytest.mark.parametrize(
    ("health", "answers"),
    [(Health.GOOD, [True]), (Health.FAILING, [False]), (Health.FULL, [False]), (Health.HUNG, [])],
)
def test_disk_answers_by_its_health(health: Health, answers: list[bool]) -> None:
    """F17, H26: a failing or full disk says so, a hung one says nothing."""
    schedule = Schedule()
    disk = Disk(schedule, random.Random(1), (0.001, 0.002))
    disk.health = health
    assert written(disk, schedule, 0.1) == answers


def test_hung_disk_goes_on_when_healed() -> None:
    """F17: what hung is written once the disk answers again."""
    schedule, answers = Schedule(), []
    disk = Disk(schedule, random.Random(1), (0.001, 0.002))
    disk.health = Health.HUNG
    disk.write([], answers.append)
    disk.when_it_answers(lambda: answers.append("applied"))
    schedule.run_until(1.0)
    assert answers == []
    disk.heal()
    schedule.run_until(2.0)
    assert sorted(map(str, answers)) == ["True", "applied"]


def test_power_cut_leaves_what_was_under_way_to_chance() -> None:
    """A transaction that was under way is handed back, and is never answered."""
    schedule = Schedule()
    disk = Disk(schedule, random.Random(1), (0.5, 0.6))
    assert written(disk, schedule, 0.1) == []
    transaction = disk.power_cut()
    assert transaction is not None
    assert transaction[0][0] == "g"
    schedule.run_until(2.0)
    assert disk.power_cut() is None


def test_log_cuts_appends_and_trims() -> None:
    """A log drops what is replaced, keeps terms and chains, and refuses to replace what was applied."""
    log, matching = GroupLog(), LogMatching()
    log.write(Persist(HardState(1, ""), tuple(entry(index) for index in range(1, 6))), "a", "g", matching, 0)
    chain = log.chain_at(3)
    log.write(Persist(None, (entry(4, 2),)), "a", "g", matching, 3)
    assert (log.last_index, log.term_at(4), log.term_at(5)) == (4, 2, None)
    floor = log.trim(3)
    assert (floor.index, floor.term, log.floor_chain) == (3, 1, chain)
    assert log.entries(4, 5, 1) == (entry(4, 2),)
    with pytest.raises(Violation, match="cuts its log at 4, applied 4"):
        log.write(Persist(None, (entry(4, 3),)), "a", "g", matching, 4)


def test_log_is_reset_to_a_state() -> None:
    """Behind an installed state entries stay if they match it, and go if they do not."""
    for term, left in ((1, 5), (2, 3)):
        log = GroupLog()
        log.write(Persist(None, tuple(entry(index) for index in range(1, 6))), "a", "g", LogMatching(), 0)
        log.reset(Floor(3, term, log.floor.configuration), START)
        assert log.last_index == left
        assert log.floor.term == term


# --- the state machine -----------------------------------------------------------------------------------------------


def apply(state: Registers, verb: Verb, epoch: int, request: bytes = b"", **given) -> Result:
    command = Command(verb, epoch, "a", request, "x", given.get("expected"), given.get("value"))
    decided = state.apply(entry(state.index + 1, 1, encode(command)))
    assert decided is not None
    return decided[1].result


def test_registers_are_fenced_by_epochs() -> None:
    """B06: an entry of another epoch than the newest changes nothing, and a request takes effect once."""
    state = Registers()
    assert apply(state, Verb.WRITE, 1, b"0", value=1) is Result.STALE_EPOCH
    assert apply(state, Verb.FENCE, 1) is Result.DONE
    assert apply(state, Verb.FENCE, 1) is Result.KEY_EXISTS
    assert apply(state, Verb.WRITE, 1, b"1", value=1) is Result.DONE
    assert apply(state, Verb.FENCE, 2) is Result.DONE
    assert apply(state, Verb.WRITE, 1, b"2", value=2) is Result.STALE_EPOCH
    assert state.values == {"x": 1}
    assert apply(state, Verb.WRITE, 2, b"2", value=2) is Result.DONE
    assert apply(state, Verb.WRITE, 2, b"3", value=3) is Result.DONE
    assert apply(state, Verb.WRITE, 2, b"2", value=2) is Result.DONE
    assert state.values == {"x": 3}
    apply(state, Verb.COMPARE, 2, b"4", expected=2, value=4)
    assert state.values == {"x": 3}
    apply(state, Verb.COMPARE, 2, b"5", expected=3, value=5)
    assert state.values == {"x": 5}
    assert state.copy().values == state.values
