"""A seed from its beginning to the verdict.

First safety, then liveness, as TigerBeetle's VOPR has it: faults and clients go on for ``Regime.length_s``, every judge
looking at every step; then all is healed, and within `HEAL_S` each group must have a leader that owns an epoch, commit
a new write and bring every member to one state. At the end the history of all clients must be linearizable.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srengine.consensus.entries import Configuration
from tests.simulator.breakages import NONE, Breakage
from tests.simulator.checkers.linearizability import Kind, check
from tests.simulator.checkers.progress import Progress
from tests.simulator.checkers.violation import Violation
from tests.simulator.client import Call, Client
from tests.simulator.faults import Faults
from tests.simulator.host import Host
from tests.simulator.network import Weather
from tests.simulator.regime import Regime, regime_of, shrunk
from tests.simulator.world import World

HEAL_S: Final = 20.0
"""Bound of virtual time for progress after the heal: a few elections of at most 2 s each, a catch-up, an install."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a seed. ``healed_s``: how long it took until all progress was made after the heal."""

    seed: int
    digest: str
    steps: int
    elections: int
    applied: int
    acknowledged: int
    answered: int
    healed_s: float
    faults: tuple[tuple[str, int], ...]


class Failure(AssertionError):
    """A seed that failed: the rule, the last lines of the trace."""

    def __init__(self, seed: int, rule: str, text: str, last: list[str]) -> None:
        super().__init__(text)
        self.seed = seed
        self.rule = rule
        self.last = last

    def __reduce__(self) -> tuple[type, tuple[int, str, str, list[str]]]:
        """Survive the way between two processes."""
        return Failure, (self.seed, self.rule, str(self), self.last)


def run(
    seed: int,
    *,
    breakage: Breakage = NONE,
    regime: Regime | None = None,
    show: Callable[[str], object] | None = None,
) -> Report:
    """Run one seed; raise a `Failure` when a promise is broken or a machine's own assertion fails."""
    regime = breakage.narrowed(regime or regime_of(seed))
    story = Story(World(seed, breakage=breakage, regime=regime, show=show))
    try:
        with shrunk(story.world.regime):
            return story.tell()
    except Violation as error:
        raise Failure(seed, error.rule, str(error), list(story.world.trace.last)) from error
    except Exception as error:
        # A machine that fails by itself is a finding like any other: its assertions are judges too.
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}, {where.name})"
        raise Failure(seed, "assertion", text, list(story.world.trace.last)) from error


class Story:
    """Clients and faults of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clients: list[Client] = []
        self.faults = Faults(world)
        self.progress = Progress(HEAL_S)
        self._probes: dict[str, Call] = {}

    def tell(self) -> Report:
        """Trouble, heal, verdict."""
        world, schedule = self.world, self.world.schedule
        for host in world.hosts.values():
            host.start()
        self.clients = [Client(world, f"c{number}") for number in range(world.regime.clients)]
        self.faults.begin()
        schedule.run_until(world.regime.length_s)
        healed_s = self._heal()
        self._verdict()
        judges = world.judges
        return Report(
            world.seed,
            world.trace.digest,
            schedule.steps,
            judges.election.elections,
            sum(judges.application.newest.values()),
            judges.acknowledged.count,
            sum(call.returned is not None for client in self.clients for call in client.calls),
            healed_s,
            tuple(sorted(self.faults.counts.items())),
        )

    def _heal(self) -> float:
        """End all faults, and wait until everything is well."""
        world, schedule = self.world, self.world.schedule
        self.faults.end()
        for client in self.clients:
            client.stopped = True
        world.network.heal(Weather())
        for host in world.hosts.values():
            host.heal()
        began = schedule.now_s
        wanted = [f"{what} in {group}" for group in world.groups for what in ("leader", "new write", "equal state")]
        self.progress.healed(began, wanted)
        while not self.progress.done:
            # What a client still tried may be acknowledged meanwhile: "equal" is of one moment, for all groups.
            self.progress.healed(began, wanted)
            schedule.run_until(schedule.now_s + 0.1)
            for group in world.groups:
                self._look(group)
            self.progress.look(schedule.now_s)
        return schedule.now_s - began

    def _look(self, group: str) -> None:
        leader = self._leader(group)
        if leader is None:
            return
        now = self.world.schedule.now_s
        self.progress.reached(f"leader in {group}", now)
        probe = self._probes.get(group)
        if probe is None:
            client = Client(self.world, f"probe.{group}.{len(self.clients)}")
            client.stopped = True
            client.leaders[group] = leader.name
            self.clients.append(client)
            self._probes[group] = client.call(group, "probe", Kind.WRITE)
        elif probe.returned is not None:
            self.progress.reached(f"new write in {group}", now)
            if self._equal(group, leader, max(probe.index, self.world.judges.acknowledged.newest(group))):
                self.progress.reached(f"equal state in {group}", now)
        elif probe.given_up or now > probe.asked_s + 3:
            del self._probes[group]  # its client's patience is over

    def _leader(self, group: str) -> Host | None:
        return next((host for host in self.world.hosts.values() if host.epoch(group)), None)

    def _members(self, group: str, leader: Host) -> list[Host]:
        configuration: Configuration = leader.state(group).configuration
        hosts = [self.world.host_of(node) for node in configuration.nodes]
        return [host for host in hosts if host is not None]

    def _equal(self, group: str, leader: Host, index: int) -> bool:
        """Whether every member has applied the same, ``index`` included, and counts in full."""
        state = leader.state(group)
        for host in self._members(group, leader):
            other = host.state(group)
            if other.index < index or (other.index, other.digest) != (state.index, state.digest):
                return False
            if host.log(group).suspect or host.process is None:
                return False
        return True

    def _verdict(self) -> None:
        world = self.world
        for group in world.groups:
            leader = self._leader(group)
            assert leader is not None, group
            for host in self._members(group, leader):
                world.judges.acknowledged.kept(group, host.id, host.state(group).index)
        check(call.operation(client.name) for client in self.clients for call in client.calls)
