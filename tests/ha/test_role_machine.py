"""The role machine: the table, the queue, steps and their failures, what is drawn of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from srengine.ha.protocol import Observed, Role
from srengine.ha.role_machine import (
    EVENTS_MAX,
    TRANSITIONS,
    Action,
    Ended,
    Execution,
    OnFailure,
    Policy,
    RoleMachine,
    RoleOptions,
    Step,
    drawn,
)

I, F, L, O, U = Role.INIT, Role.FOLLOWER, Role.LEADER, Role.OBSERVER, Role.UNKNOWN  # noqa: E741  (as in the table)

# semantics: INIT->LEADER promote; INIT->FOLLOWER|OBSERVER non-leader; INIT->UNKNOWN nothing; UNKNOWN->LEADER promote;
# UNKNOWN->FOLLOWER|OBSERVER non-leader; FOLLOWER->LEADER promote; FOLLOWER|OBSERVER->UNKNOWN non-leader;
# LEADER->anything
# demotes in place (there: exit). FOLLOWER<->OBSERVER, OBSERVER->LEADER: ignored. The same again: ignored.
EXPECTED = {
    (I, L): Action.PROMOTE,
    (I, F): Action.NON_LEADER,
    (I, O): Action.NON_LEADER,
    (U, L): Action.PROMOTE,
    (U, F): Action.NON_LEADER,
    (U, O): Action.NON_LEADER,
    (F, L): Action.PROMOTE,
    (F, U): Action.NON_LEADER,
    (O, U): Action.NON_LEADER,
    (L, F): Action.DEMOTE,
    (L, O): Action.DEMOTE,
    (L, U): Action.DEMOTE,
}
PATHS = {I: [], F: [F], L: [L], O: [O], U: [F, U]}
"""Events that lead from the start to a role."""


class Driver:
    """Carries out the steps of a machine: each succeeds at once, unless the test says how it fails or that it hangs."""

    def __init__(self, *executions: Execution, **options) -> None:
        self.machine = RoleMachine(RoleOptions(**options), executions)
        self.now = 0.0
        self.fails: dict[str, str] = {}
        self.hangs: set[str] = set()
        self.steps: list[str] = []
        self.transitions = []
        self.resigned: list[str] = []
        self.exits: list[str] = []
        self.cancelled: list[int] = []
        self.dropped = 0
        self.hanging: int | None = None

    def observe(self, *roles: Role, term: int = 1) -> None:
        for role in roles:
            self.machine.step(Observed(role, "n1" if role in {F, L, O} else None, term, "test"))
            self.turn()

    def turn(self) -> None:
        while True:
            effects = self.machine.drain()
            self.cancelled += effects.cancel
            self.transitions += effects.transitions
            self.dropped += effects.dropped
            if effects.resign is not None:
                self.resigned.append(effects.resign)
            if effects.exit is not None:
                self.exits.append(effects.exit)
            if effects.run is None:
                return
            assert self.hanging is None or self.hanging in self.cancelled, "two steps run"
            name = effects.run.execution or effects.run.step.value
            self.steps.append(name)
            if name in self.hangs:
                self.hanging = effects.run.token
                return
            self.machine.step(Ended(effects.run.token, self.fails.get(name, "")))

    def finish(self, failure: str = "") -> None:
        token, self.hanging = self.hanging, None
        assert token is not None
        self.machine.step(Ended(token, failure))
        self.turn()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.machine.tick(self.now)
        self.turn()


@pytest.mark.parametrize("after", list(Role), ids=lambda role: role.value)
@pytest.mark.parametrize("before", list(Role), ids=lambda role: role.value)
def test_all_pairs_of_roles(before, after):
    """H03: all 5 x 5 pairs do what the table of the semantics says, and LEADER to another demotes in place."""
    driver = Driver(Execution("tell"))
    driver.observe(*PATHS[before])
    assert driver.machine.role is before
    driver.steps.clear()
    driver.observe(after)
    expected = EXPECTED.get((before, after), Action.NOTHING)
    assert TRANSITIONS[before, after] is expected
    assert (
        driver.steps
        == {
            Action.NOTHING: [],
            Action.PROMOTE: ["fence", "replay", "tell", "open"],
            Action.NON_LEADER: ["tell"],
            Action.DEMOTE: ["close", "drain", "tell", "drop"],
        }[expected]
    )
    assert driver.machine.role is (before if expected is Action.NOTHING else after)
    assert driver.machine.admitting is (driver.machine.role is L)
    assert not driver.exits


def test_the_drawn_table_is_the_code():
    """The table in docs/ha.md is the one of the code (tools/draw_transitions.py writes it)."""
    page = Path(__file__).parents[2] / "docs" / "ha.md"
    assert drawn() in page.read_text(encoding="utf-8")


def random_roles(seed: int) -> list[Role]:
    dice = random.Random(seed)
    return [dice.choice([F, L, O, U]) for _ in range(1000)]


def test_a_thousand_random_events():
    """H04: events are handled in order, each that means something once; the same role again is dropped."""
    driver = Driver(Execution("tell"))
    events = random_roles(4)
    role, expected = I, []
    for event in events:
        if TRANSITIONS[role, event] is not Action.NOTHING:
            expected.append((role, event))
            role = event
    driver.observe(*events)
    assert [(each.source, each.target) for each in driver.transitions] == expected
    assert driver.dropped == 1000 - len(expected)
    assert driver.machine.role is role


def test_a_thousand_random_events_while_transitions_take_their_time():
    """H04: one transition at a time, whenever they end: what has ended is a path through the table, in the order of the
    events, and the last word counts.
    """
    dice = random.Random(5)
    driver = Driver(Execution("tell"))
    driver.hangs.add("tell")
    events = [*random_roles(5), U, F]
    for event in events:
        driver.observe(event)
        while driver.machine.going is not None and dice.random() < 0.6:
            driver.finish()
    while driver.machine.going is not None:
        driver.finish()
    made = [(each.source, each.target) for each in driver.transitions if each.source is not each.target]
    assert len(made) > 100
    # A promotion that an event overtook is given up: then source and target are the same.
    assert len(made) < len(driver.transitions)
    for (_, reached), (left, _) in itertools.pairwise(made):
        assert reached is left
    rest = iter(events)
    assert all(target in rest for _, target in made), "in the order of the events"
    assert driver.machine.role is F


def test_events_wait_for_the_running_transition():
    """H04: nothing of the next transition begins before the running one has ended."""
    driver = Driver(Execution("tell"))
    driver.hangs.add("tell")
    driver.observe(F)
    driver.observe(U)
    driver.observe(O)
    assert driver.steps == ["tell"]
    assert driver.machine.waiting == 2
    driver.finish()
    assert (driver.machine.role, driver.machine.waiting) == (F, 1)
    driver.finish()
    driver.finish()
    assert [each.target for each in driver.transitions] == [F, U, O]


@pytest.mark.parametrize(
    ("policy", "steps", "role", "exits"),
    [
        (OnFailure.CONTINUE, ["one", "two", "three"], F, 0),
        (OnFailure.ABORT, ["one", "two"], F, 0),
        (OnFailure.EXIT, ["one", "two"], I, 1),
    ],
)
def test_executions_run_in_order(policy, steps, role, exits):
    """H05: three executions in their order; the second one fails: abort leaves out the rest, continue goes on, exit
    ends the process.
    """
    driver = Driver(Execution("one"), Execution("two", policy), Execution("three"))
    driver.fails["two"] = "ValueError: no"
    driver.observe(F)
    assert driver.steps == steps
    assert driver.machine.role is role
    assert len(driver.exits) == exits
    if not exits:
        assert driver.transitions[0].failure == "two: ValueError: no"


def test_leading_begins_with_fencing():
    """Invariant 2: nothing else of a promotion begins before fencing has succeeded, and admission opens last."""
    driver = Driver(Execution("tell"))
    driver.hangs |= {"fence", "replay", "tell", "open"}
    driver.observe(L)
    for begun in (["fence"], ["fence", "replay"], ["fence", "replay", "tell"], ["fence", "replay", "tell", "open"]):
        assert driver.steps == begun
        assert (driver.machine.role, driver.machine.admitting) == (I, False)
        driver.finish()
    assert (driver.machine.role, driver.machine.admitting) == (L, True)


@pytest.mark.parametrize("failing", ["fence", "replay", "tell", "open"])
def test_a_promotion_that_fails_resigns(failing):
    """Fencing that is false (or any step that fails) gives the leadership up, undoes what was done, and stays alive."""
    driver = Driver(Execution("tell"))
    driver.observe(F)
    driver.steps.clear()
    driver.fails[failing] = "no"
    if failing == "tell":
        # Told the second time that it came to nothing.
        driver.hangs.add("tell")
    driver.observe(L)
    if failing == "tell":
        driver.finish("no")
        assert driver.steps[-1] == "tell"
        driver.finish()
    assert len(driver.resigned) == 1
    assert not driver.exits
    assert (driver.machine.role, driver.machine.admitting) == (F, False)
    undone = ["close", "drain", *(["tell"] if failing in {"tell", "open"} else []), "drop"]
    assert driver.steps[-len(undone) :] == undone
    assert driver.transitions[-1].failure
    driver.fails.clear()
    driver.hangs.clear()
    driver.observe(L, term=2)
    assert driver.machine.role is L


@pytest.mark.parametrize("step", ["fence", "replay", "open"])
def test_a_promotion_that_fails_exits_by_option(step):
    """H19: with the policy exit the process ends instead; nothing is run behind it."""
    driver = Driver(promotion=Policy.EXIT)
    driver.fails[step] = "no"
    driver.observe(L, F, U, L)
    assert len(driver.exits) == 1
    assert driver.steps[-1] == step
    assert not driver.resigned


@pytest.mark.parametrize(("step", "seconds"), [("fence", 3.0), ("replay", 4.0), ("open", 5.0)])
def test_a_promotion_that_overruns_resigns(step, seconds):
    """H19: each step of a promotion has its own time; one that overruns counts as failed, and its late end as
    nothing.
    """
    driver = Driver(fence_s=3.0, replay_s=4.0, open_s=5.0)
    driver.hangs.add(step)
    driver.observe(L)
    assert driver.machine.next_deadline == seconds
    driver.pass_time(seconds - 0.1)
    assert not driver.resigned
    driver.pass_time(0.1)
    assert len(driver.resigned) == 1
    assert driver.cancelled == [driver.hanging]
    driver.finish()
    assert driver.machine.role is I
    assert driver.machine.next_deadline is None


@pytest.mark.parametrize("step", ["close", "drain", "drop", "tell"])
@pytest.mark.parametrize("how", ["fails", "overruns"])
def test_a_demotion_that_fails_exits(step, how):
    """A leader that cannot be demoted in time ends its process: it must not go on half a leader."""
    driver = Driver(Execution("tell", timeout_s=5.0))
    driver.observe(L)
    if how == "fails":
        driver.fails[step] = "no"
    else:
        driver.hangs.add(step)
    driver.observe(F)
    driver.pass_time(60.0)
    assert len(driver.exits) == 1
    assert not driver.machine.admitting


def test_admission_is_closed_from_the_first_moment():
    """A demotion admits nothing while its steps run, also while closing takes its time."""
    driver = Driver()
    driver.observe(L)
    driver.hangs.add("close")
    driver.observe(U)
    assert (driver.machine.role, driver.machine.admitting) == (L, False)
    driver.finish()
    assert driver.machine.role is U


def test_demotion_exits_by_option():
    """H07: by option a leader that leads no more ends its process at once."""
    driver = Driver(demotion=Policy.EXIT)
    driver.observe(F, L, F)
    assert len(driver.exits) == 1
    assert driver.steps == ["fence", "replay", "open"]


def test_an_event_overtakes_a_promotion():
    """Invariant 3: a node that hears during its promotion that it leads no more gives it up at once, and does not
    resign (it has nothing to give up).
    """
    driver = Driver(Execution("tell"))
    driver.observe(F)
    driver.hangs.add("replay")
    driver.observe(L, term=2)
    driver.observe(F, term=3)
    assert driver.cancelled == [driver.hanging]
    assert driver.steps[-3:] == ["close", "drain", "drop"]
    assert (driver.machine.role, driver.resigned, driver.exits) == (F, [], [])
    driver.hangs.clear()
    driver.observe(L, term=4)
    assert (driver.machine.role, driver.machine.term) == (L, 4)


def test_a_later_term_overtakes_a_promotion():
    """Invariant 2: elected again in a later term while it promotes itself, the node begins anew: the epoch is for the
    term that it leads now.
    """
    driver = Driver()
    driver.hangs.add("replay")
    driver.observe(L, term=2)
    driver.observe(L, term=3)
    assert len(driver.cancelled) == 1
    assert driver.steps == ["fence", "replay", "close", "drain", "drop", "fence", "replay"]
    driver.finish()
    assert (driver.machine.role, driver.machine.term) == (L, 3)
    assert not driver.resigned


def test_the_late_end_of_a_cancelled_step_ends_nothing():
    """A step that was given up may end all the same: that says nothing about the one that runs now."""
    driver = Driver()
    driver.observe(F)
    driver.hangs |= {"fence", "close"}
    driver.observe(L, term=2)
    fencing = driver.hanging
    driver.observe(F, term=3)
    assert driver.steps[-1] == "close"
    driver.machine.step(Ended(fencing))
    driver.turn()
    assert driver.steps[-1] == "close"
    assert driver.machine.going == (Step.CLOSE, "")
    driver.finish()
    assert driver.steps[-2:] == ["drain", "drop"]


def test_leading_in_another_term_is_another_leadership():
    """Invariant 1: elected again without a word in between, the node is demoted and fences anew."""
    driver = Driver()
    driver.observe(L, term=2)
    driver.steps.clear()
    driver.observe(L, term=2)
    assert driver.steps == []
    driver.observe(L, term=5)
    assert driver.steps == ["close", "drain", "drop", "fence", "replay", "open"]
    assert (driver.machine.role, driver.machine.term) == (L, 5)
    assert [(each.source, each.target) for each in driver.transitions] == [(I, L), (L, F), (F, L)]


def test_a_transition_waits_for_its_delay():
    """H19: with a delay nothing begins before what the election says has stood for so long; demotions never wait."""
    driver = Driver(delay_s=2.0)
    driver.observe(L)
    driver.pass_time(1.0)
    driver.observe(L)
    driver.pass_time(0.9)
    assert driver.steps == []
    driver.pass_time(0.1)
    assert (driver.steps, driver.machine.role) == (["fence", "replay", "open"], L)
    driver.observe(F)
    assert driver.machine.role is F


def test_what_does_not_last_for_the_delay_is_no_transition():
    """H19: an election that is taken back within the delay leaves no trace."""
    driver = Driver(Execution("tell"), delay_s=2.0)
    driver.observe(F)
    driver.pass_time(2.0)
    driver.steps.clear()
    driver.observe(L, term=2)
    driver.pass_time(1.0)
    driver.observe(F, term=3)
    driver.pass_time(5.0)
    assert driver.steps == []
    assert (driver.machine.role, driver.resigned, driver.cancelled) == (F, [], [])
    driver.observe(L, term=4)
    driver.pass_time(2.0)
    assert (driver.machine.role, driver.machine.term) == (L, 4)


def test_the_queue_is_bounded():
    """Flapping while a transition hangs fills no memory: the last word counts, by way of UNKNOWN."""
    driver = Driver(Execution("tell"))
    driver.hangs.add("tell")
    driver.observe(F)
    for term in range(EVENTS_MAX * 2):
        driver.observe(U if term % 2 else O, term=term)
    driver.observe(O, term=99_999)
    assert driver.machine.waiting <= EVENTS_MAX
    driver.hangs.clear()
    driver.finish()
    assert driver.machine.role is O


def test_transitions_are_timed():
    """H21: a transition knows from, to, term, reason and how long it took."""
    driver = Driver()
    driver.hangs.add("fence")
    driver.observe(L, term=7)
    driver.pass_time(1.5)
    driver.finish()
    (made,) = driver.transitions
    assert (made.source, made.target, made.term, made.reason, made.seconds) == (I, L, 7, "test", 1.5)
    assert Step.FENCE.value == "fence"
