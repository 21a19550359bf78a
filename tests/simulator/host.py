"""A machine that a node runs on: disk, clock, the running process if there is one, and who the node is."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from srengine.consensus.entries import Configuration
from srengine.types import NodeId
from tests.simulator.clock import Clock
from tests.simulator.disk import Disk, GroupLog, Image, Transaction
from tests.simulator.process import Process
from tests.simulator.registers import Registers

if TYPE_CHECKING:
    from tests.simulator.world import World


class Host:
    """``id``: of the node, another one after its disk was wiped. ``crash_stage``: where its process is made to end."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self._lives = 0
        self._source = random.Random(f"{world.seed} host {name}")
        self.id = self._new_id()
        regime = world.regime
        self.disk = Disk(world.schedule, random.Random(f"{world.seed} disk {name}"), regime.disk_s)
        spread = regime.clock_drift * 0.49
        self.clock = Clock(world.schedule, self._source.uniform(1.0, 1e6), 1.0 + self._source.uniform(-spread, spread))
        self.process: Process | None = None
        self.crash_stage: str | None = None
        self.backup: Image | None = None
        self.empty()

    def _new_id(self) -> NodeId:
        self._lives += 1
        return NodeId(f"{self.name}{self._lives}")

    def empty(self) -> None:
        """The disk holds nothing."""
        self.disk.image = Image(
            0,
            {group: GroupLog() for group in self.world.groups},
            {group: self.world.new_state() for group in self.world.groups},
        )
        self.backup = None

    def log(self, group: str) -> GroupLog:
        return self.disk.image.logs[group]

    def state(self, group: str) -> Registers:
        return self.disk.image.states[group]

    @property
    def running(self) -> bool:
        """Whether there is a process that is not stopped."""
        return self.process is not None and not self.process.paused

    def epoch(self, group: str) -> int:
        """Return the epoch that the process here acts for; 0 when it owns none, or does not run."""
        return self.process.runs[group].epoch if self.process is not None else 0

    def newest_configuration(self, group: str) -> Configuration:
        log = self.log(group)
        return log.configuration_at(log.last_index)

    # --- what befalls it ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a process, if there is none."""
        if self.process is not None:
            return
        self.crash_stage = None
        image = self.disk.image
        image.boot += 1
        for group in self.world.groups:
            self._open(group)
        self.world.trace.note(f"{self.id} starts {image.boot}")
        self.process = Process(self, self.world)

    def _open(self, group: str) -> None:
        """What a start does with a log that does not reach the applied state: the state stands in for it."""
        log, state = self.log(group), self.state(group)
        if state.index and log.term_at(state.index) != state.term and state.index > log.floor.index:
            self.world.trace.note(f"{self.id} {group}: log ends at {log.last_index}, state is at {state.index}")
            log.reset(self.world.floor_of(state), state.chain)

    def crash(self) -> None:
        """The process ends at once, wherever it is; what it was writing is there, or not, or torn."""
        process = self.process
        if process is None:
            return
        process.gone = True
        self.process = None
        self.crash_stage = None
        under_way = self.disk.power_cut()
        fate = "nothing"
        if under_way is not None:
            fate = self._source.choice(("lost", "whole"))
            if self._source.random() < self.world.regime.torn and self.world.may_harm(self):
                fate = "torn"
            if fate == "whole":
                self.keep(under_way)
            elif fate == "torn":
                self._tear(under_way)
        self.world.trace.note(f"{self.id} ends; under way: {fate}")
        self.world.hints(self)
        # Whoever watches over processes starts it again; a fault that keeps it down for long crashes it again.
        longest_s = self._source.choice((0.05, 0.3, 2.0))
        self.world.schedule.after(0.01 + longest_s * self._source.random(), self.start)

    def keep(self, transaction: Transaction) -> None:
        """The transaction is durable."""
        for group, persist in transaction:
            applied = self.state(group).index
            self.log(group).write(persist, self.id, group, self.world.judges.matching, applied)

    def _tear(self, transaction: Transaction) -> None:
        self.keep(transaction)
        for group, persist in transaction:
            if persist.entries:
                self.damage(group, self._source.randint(1, len(persist.entries)))

    def damage(self, group: str, count: int) -> None:
        """The last ``count`` entries of the log are found to be damaged at the next start."""
        log = self.log(group)
        log.cut(max(log.floor.index, log.last_index - count) + 1)
        log.suspect = True

    def keep_backup(self) -> None:
        """Copy the disk aside."""
        self.backup = self.disk.image.copy()

    def restore(self) -> None:
        """Put the copy back (the process does not run). Nothing on the disk shows it."""
        assert self.process is None
        assert self.backup is not None
        self.disk.image = self.backup.copy()
        for log in self.disk.image.logs.values():
            log.suspect = True
        self.world.trace.note(f"{self.id} was put back to boot {self.disk.image.boot}")

    def wipe(self) -> None:
        """The disk is lost; another node starts on an empty one."""
        assert self.process is None
        self.world.forget(self)
        self.id = self._new_id()
        self.empty()
        self.world.welcome(self)

    def heal(self) -> None:
        """Everything here works again; the clock keeps what it shows."""
        self.crash_stage = None
        self.disk.heal()
        self.clock.change(rate=1.0)
        if self.process is None:
            self.start()
        elif self.process.paused:
            self.process.go_on()

    def suspect(self, group: str) -> bool:
        """Whether its peers or its log know that it may have lost what it promised."""
        return self.log(group).suspect

    def notice_trust(self, group: str, machine: Any) -> None:
        """A machine that is trusted again has nothing to make up for."""
        log = self.log(group)
        if log.suspect and machine.trusted:
            log.suspect = False
            self.world.trace.note(f"{self.id} {group} is trusted again")
