"""The role service: what it calls, logs and counts, around an election that the test makes."""

from __future__ import annotations

import asyncio
import logging

import pytest

from srengine import errors
from srengine.ha.protocol import Observed, Role
from srengine.ha.role_machine import Execution, OnFailure, Policy, RoleOptions
from srengine.ha.roles import Registered, RoleService
from srengine.metrics import Metrics
from tests.ha.contract.clusters import Admission, until

I, F, L, O, U = Role.INIT, Role.FOLLOWER, Role.LEADER, Role.OBSERVER, Role.UNKNOWN  # noqa: E741


class Clock:
    """Time that the test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def boottime_s(self) -> float:
        return self.now

    monotonic_s = boottime_s

    def wall_ms(self) -> int:
        raise AssertionError("no wall clock in roles")


class Election:
    """As much of an `HAProtocol` as the service uses."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Observed] = asyncio.Queue()
        self.epoch = 0
        self.wins = True
        self.hang = False
        self.resigned: list[str] = []
        self.asked: list[str] = []

    def say(self, role: Role, term: int = 1, leader: str | None = "n1") -> None:
        self.events.put_nowait(Observed(role, None if role in {U, I} else leader, term, "test"))

    async def observe(self):
        while True:
            yield await self.events.get()

    async def fencing(self) -> bool:
        self.asked.append("fencing")
        if self.hang:
            await asyncio.Event().wait()
        self.epoch += self.wins
        return self.wins

    async def read_barrier(self, *, timeout_s: float) -> int:
        self.asked.append("read_barrier")
        return 7

    async def resign(self, reason: str) -> None:
        self.resigned.append(reason)


class World:
    def __init__(self, *executions: Registered, **options) -> None:
        self.election = Election()
        self.admission = Admission()
        self.clock = Clock()
        self.metrics = Metrics()
        self.exits: list[errors.Error] = []
        self.service = RoleService(
            self.election,
            self.admission,
            clock=self.clock,
            metrics=self.metrics,
            on_exit=self.exits.append,
            options=RoleOptions(**options),
            executions=executions,
        )

    async def reaches(self, role: Role) -> None:
        await until(lambda: self.service.role is role)


def run(scenario, *executions: Registered, **options) -> None:
    async def all_of_it() -> None:
        world = World(*executions, **options)
        task = asyncio.ensure_future(world.service.run())
        try:
            await scenario(world)
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()

    asyncio.run(all_of_it())


def test_a_leader_is_made_and_unmade(caplog):
    """H07, H21: fencing, a barrier, then admission under the epoch; and back in place. One line each with from, to,
    term, reason, ms.
    """
    caplog.set_level(logging.INFO, logger="srengine.ha.roles")

    async def scenario(world):
        world.election.say(F, 1)
        await world.reaches(F)
        world.election.say(L, 2)
        await world.reaches(L)
        assert world.election.asked == ["fencing", "read_barrier"]
        assert (world.admission.epoch, world.service.admitting) == (1, True)
        world.election.say(F, 3)
        await world.reaches(F)
        assert world.admission.told == ["open 1", "close", "drain", "drop"]
        assert (world.service.admitting, world.exits) == (False, [])

    run(scenario)
    lines = [(getattr(line, "from"), line.to, line.term, line.reason) for line in caplog.records]
    assert lines == [
        ("INIT", "FOLLOWER", 1, "test"),
        ("FOLLOWER", "LEADER", 2, "test"),
        ("LEADER", "FOLLOWER", 3, "test"),
    ]
    assert all(line.event == "transition" and line.ms >= 0 for line in caplog.records)


def test_executions_are_told_what_changes():
    """H05: each registered execution gets the roles, the term and the epoch; an exception of any kind is its
    failure.
    """
    told = []

    async def good(changing):
        told.append(("good", changing.source, changing.target, changing.term, changing.epoch))

    async def bad(changing):
        told.append(("bad",))
        raise ValueError("not ours")

    async def scenario(world):
        world.election.say(L, 2)
        await world.reaches(L)
        assert told == [("bad",), ("good", I, L, 2, 1)]

    run(scenario, Registered(Execution("bad", OnFailure.CONTINUE), bad), Registered(Execution("good"), good))


def test_lost_fencing_resigns():
    """B02, B04: a node that is told to lead and finds the epoch taken gives the leadership up and admits nothing."""

    async def scenario(world):
        world.election.say(F, 1)
        await world.reaches(F)
        world.election.wins = False
        world.election.say(L, 2)
        await until(lambda: world.election.resigned)
        await until(lambda: world.metrics.value("srengine_ha_promotions_failed_total") == 1)
        assert (world.service.role, world.service.admitting) == (F, False)
        assert not any(told.startswith("open") for told in world.admission.told)

    run(scenario)


def test_lost_fencing_exits_by_option():
    """H19: with the policy exit the process is told to end instead."""

    async def scenario(world):
        world.election.wins = False
        world.election.say(L, 2)
        await until(lambda: world.exits)
        assert not world.election.resigned

    run(scenario, promotion=Policy.EXIT)


def test_a_step_that_hangs_is_given_up():
    """H19: fencing that overruns its time is cancelled, and the node resigns."""

    async def scenario(world):
        world.election.hang = True
        world.election.say(L, 2)
        await until(lambda: world.election.asked == ["fencing"])
        world.clock.now += 31.0
        world.service._tick()
        await until(lambda: len(world.election.resigned) == 1)
        assert "overran" in world.election.resigned[0]
        world.election.hang = False
        world.election.say(U, 3)
        world.election.say(L, 4)
        await world.reaches(L)

    run(scenario, fence_s=30.0)


def test_an_epoch_that_is_lost_on_the_way_opens_nothing():
    """H06: the leadership that ended between fencing and the end of the promotion does not open admission."""

    async def scenario(world):
        async def lose(*, timeout_s: float) -> int:
            world.election.epoch = 0
            return 7

        world.election.read_barrier = lose
        world.election.say(L, 2)
        await until(lambda: world.election.resigned)
        assert not any(told.startswith("open") for told in world.admission.told)

    run(scenario)


def test_metrics_are_those_of_the_clock():
    """H20, B25: elections, leaders, availability and transitions are counted by the clock, exactly."""

    async def scenario(world):
        value = world.metrics.value

        async def seen(role: Role, term: int, leader: str | None = "n1") -> None:
            before = world.election.events.qsize()
            world.election.say(role, term, leader)
            await until(lambda: world.election.events.qsize() == before and world.service.machine.going is None)
            await asyncio.sleep(0)

        world.clock.now += 2.0
        await seen(F, 1)
        assert value("srengine_ha_election_seconds") == 2.0
        world.clock.now += 6.0
        await seen(U, 2)
        world.clock.now += 1.5
        await seen(F, 3, "n2")
        assert value("srengine_ha_election_seconds") == 1.5
        assert value("srengine_ha_election_seconds_total") == 3.5
        assert value("srengine_ha_elections_total") == 2
        assert value("srengine_ha_leader_changes_total") == 2
        world.clock.now += 2.5
        world.service.measure()
        assert value("srengine_ha_observed_seconds_total") == 12.0
        assert value("srengine_ha_available_seconds_total") == 8.5
        assert value("srengine_ha_availability_percent") == pytest.approx(100 * 8.5 / 12.0)
        assert value("srengine_ha_transitions_total", source="FOLLOWER", target="UNKNOWN") == 1

    run(scenario)


def test_transition_durations_are_measured():
    """H20: the time of a transition is that of the clock, in the metric and in the log."""

    async def scenario(world):
        opened = asyncio.Event()

        async def slow(epoch: int) -> None:
            await opened.wait()

        world.admission.open = slow
        world.election.say(L, 2)
        await until(lambda: world.election.asked == ["fencing", "read_barrier"])
        world.clock.now += 3.25
        opened.set()
        await world.reaches(L)
        labels = {"source": "INIT", "target": "LEADER"}
        assert world.metrics.value("srengine_ha_transition_seconds", **labels) == 3.25
        assert world.metrics.value("srengine_ha_transition_seconds_total", **labels) == 3.25

    run(scenario)
