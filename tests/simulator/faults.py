"""What goes wrong, when, and for how long: drawn with the weights of the regime.

Each fault is a method that begins it and schedules its end. `Faults.end` ends all. Disks are harmed (damaged, put back,
wiped) only while a majority of every group keeps what it promised: losing more loses data whatever the machine does.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from srengine.consensus.effects import Hint, StepDown
from srengine.consensus.entries import Configuration
from tests.simulator.disk import Health
from tests.simulator.host import Host
from tests.simulator.membership import propose_change

if TYPE_CHECKING:
    from tests.simulator.world import World

STAGES = ("stepped", "written", "sent", "applying", "applied", "installing")


class Faults:
    """``counts``: how often each was done."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source = random.Random(f"{world.seed} faults")
        self.counts: Counter[str] = Counter()
        self._over = False
        self._names = [name for name, weight in world.regime.weights if weight]
        self._weights = [weight for _, weight in world.regime.weights if weight]

    def begin(self) -> None:
        """Start to break things."""
        if self._names:
            self._next()

    def end(self) -> None:
        """Break nothing more."""
        self._over = True

    def _next(self) -> None:
        every_s = self.world.regime.fault_every_s
        self.world.schedule.after(every_s * 2 * self.source.random(), self._strike)

    def _strike(self) -> None:
        if self._over:
            return
        name = self.source.choices(self._names, self._weights)[0]
        if getattr(self, "_" + name.replace(" ", "_"))() is not False:
            self.counts[name] += 1
        self._next()

    def _later(self, action) -> None:
        """End a fault after a while, unless all were ended."""
        lasts_s = self.world.regime.fault_lasts_s * 2 * self.source.random()
        self.world.schedule.after(lasts_s, lambda: None if self._over else action())

    def _any(self, *, running: bool = True) -> Host | None:
        """Return any host; leaders are met more often, for there it hurts."""
        hosts = [host for host in self.world.hosts.values() if not running or host.running]
        leader = self._leader()
        if leader in hosts and self.source.random() < 0.4:
            return leader
        return self.source.choice(hosts) if hosts else None

    def _note(self, text: str) -> None:
        self.world.trace.note(f"fault: {text}")

    # --- processes ---------------------------------------------------------------------------------------------------

    def _crash(self) -> bool | None:
        host = self._any()
        if host is None:
            return False
        self._note(f"crash {host.id}")
        host.crash()
        self._later(host.start)
        return None

    def _crash_all(self) -> None:
        """The power fails everywhere."""
        self._note("crash all")
        for host in self.world.hosts.values():
            host.crash()

    def _leader(self) -> Host | None:
        leading = [
            host
            for host in self.world.hosts.values()
            if host.process is not None and any(run.leading_term for run in host.process.runs.values())
        ]
        return self.source.choice(leading) if leading else None

    def _crash_others(self) -> bool | None:
        """Everybody but a leader starts anew at once, and perhaps does not hear it for a while."""
        leader = self._leader()
        if leader is None:
            return False
        self._note(f"crash all but {leader.id}")
        others = [host for host in self.world.hosts.values() if host is not leader]
        if self.source.random() < 0.5:
            self._cut([*self._around(leader), *self._sides([leader], others)])
        for host in others:
            host.crash()
            self.world.schedule.after(0.01 + 0.05 * self.source.random(), host.start)
        return None

    def _soon_s(self) -> float:
        """Return after how long a leader has hardly begun."""
        step_s = self.world.regime.weather.delay_s_max + self.world.regime.disk_s[1]
        return step_s * self.source.choice((1, 3, 8)) * self.source.random()

    def _young_leader(self) -> None:
        """The next leader of any group ends, or is cut off, when it has hardly begun."""
        after_s = self._soon_s()
        crashes = self.source.random() < 0.6

        def strike(host: Host) -> None:
            if self._over:
                return
            self._note(f"young leader {host.id} {'ends' if crashes else 'is cut off'}")
            if crashes:
                host.crash()
            else:
                self._cut_off(host)

        self.world.on_leader = lambda host: self.world.schedule.after(after_s, lambda: strike(host))

    def _crash_between(self) -> bool | None:
        """The process ends between two of the driver's duties, whenever it gets there."""
        host = self._any()
        if host is None:
            return False
        host.crash_stage = self.source.choice(STAGES)
        self._note(f"{host.id} will end when {host.crash_stage}")
        return None

    def _pause(self) -> bool | None:
        host = self._any()
        if host is None or host.process is None:
            return False
        process = host.process
        self._note(f"stop {host.id}")
        process.stop()
        self._later(process.go_on)
        return None

    def _freeze(self) -> bool | None:
        """F21: a leader is stopped and cut off; when it goes on it does not know what happened meanwhile."""
        leader = self._leader()
        if leader is None or leader.process is None or leader.process.paused:
            return False
        process = leader.process
        self._note(f"freeze {leader.id}")
        self._cut_off(leader)
        process.stop()
        self._later(process.go_on)
        return None

    # --- the network -------------------------------------------------------------------------------------------------

    def _cut(self, pairs: list[tuple[str, str]]) -> None:
        cut = self.world.network.cut
        fresh = [pair for pair in pairs if pair not in cut]
        cut.update(fresh)
        self._later(lambda: cut.difference_update(fresh))
        if self.source.random() < 0.6:
            self._close(fresh)

    def _close(self, pairs: list[tuple[str, str]]) -> None:
        """Connections that are cut both ways are seen to close, as by a router that says so."""
        hosts = self.world.hosts
        for here, there in pairs:
            process = hosts[here].process if here in hosts else None
            if process is not None and there in hosts and (there, here) in pairs:
                gone = hosts[there].id
                process.later(0.002 * self.source.random(), lambda process=process, gone=gone: process.hint(gone))

    def _everybody(self) -> list[str]:
        return [*self.world.hosts, *(f"c{number}" for number in range(self.world.regime.clients))]

    def _isolate(self) -> bool | None:
        host = self._any(running=False)
        if host is None:
            return False
        self._note(f"isolate {host.name}")
        self._cut_off(host)
        return None

    def _cut_off(self, host: Host) -> None:
        """Other nodes do not hear it, nor it them; clients do."""
        self._cut(self._around(host))

    def _around(self, host: Host) -> list[tuple[str, str]]:
        """Return every link between this host and another."""
        return self._links([host.name], [name for name in self.world.hosts if name != host.name])

    def _links(self, ones: list[str], others: list[str]) -> list[tuple[str, str]]:
        """Return the links between the two, both ways."""
        return [pair for one in ones for other in others for pair in ((one, other), (other, one))]

    def _sides(self, ones: list[Host], others: list[Host]) -> list[tuple[str, str]]:
        """Let each client take sides: it does not reach the other one. Return the links that it loses."""
        lost: list[tuple[str, str]] = []
        for number in range(self.world.regime.clients):
            far = self.source.choice((ones, others))
            lost += self._links([f"c{number}"], [host.name for host in far])
        return lost

    def _camps(self) -> bool | None:
        """F24: a leader and a rival do not hear each other, everybody else hears both; each client has its camp."""
        leader = self._leader()
        rivals = [host for host in self.world.hosts.values() if host.running and host is not leader]
        if leader is None or not rivals:
            return False
        rival = self.source.choice(rivals)
        self._note(f"camps of {leader.id} and {rival.id}")
        self._cut([*self._links([leader.name], [rival.name]), *self._sides([leader], [rival])])
        return None

    def _split(self) -> None:
        """Two sides; clients are on either."""
        names = self._everybody()
        side = {name for name in names if self.source.random() < 0.5}
        self._note(f"split {sorted(side)}")
        self._cut([(one, other) for one in names for other in names if (one in side) != (other in side)])

    def _one_way(self) -> bool | None:
        """What one host says reaches nobody, or one other does not hear it."""
        if len(self.world.hosts) < 2:
            return False
        host = self._any(running=False)
        assert host is not None
        others = [name for name in self.world.hosts if name != host.name]
        if self.source.random() < 0.5:
            others = [self.source.choice(others)]
        if self.source.random() < 0.5:
            pairs = [(host.name, other) for other in others]
        else:
            pairs = [(other, host.name) for other in others]
        self._note(f"one way {pairs}")
        self._cut(pairs)
        return None

    def _bridge(self) -> bool | None:
        """F25: two halves that only one host connects, or a ring."""
        names = list(self.world.hosts)
        if len(names) < 3:
            return False
        self.source.shuffle(names)
        if self.source.random() < 0.5:
            ring = {(names[place], names[(place + 1) % len(names)]) for place in range(len(names))}
            good = ring | {(other, one) for one, other in ring}
        else:
            half = set(names[1 : 1 + len(names) // 2])
            good = {(one, other) for one in names for other in names if names[0] in {one, other}}
            good |= {(one, other) for one in names[1:] for other in names[1:] if (one in half) == (other in half)}
        self._note(f"bridge {names}")
        self._cut([(one, other) for one in names for other in names if one != other and (one, other) not in good])
        return None

    def _flap(self) -> bool | None:
        """F29: a link comes and goes; each time both ends see a closed connection."""
        names = list(self.world.hosts)
        if len(names) < 2:
            return False
        one, other = self.source.sample(names, 2)
        pairs = {(one, other), (other, one)}
        self._note(f"flap {one} {other}")

        def turn(left: int) -> None:
            if self._over:
                return
            self.world.network.cut ^= pairs
            for here, there in ((one, other), (other, one)):
                process = self.world.hosts[here].process
                if process is not None:
                    process.guarded(lambda p=process, peer=self.world.hosts[there].id: p.hint(peer))
            if left:
                self.world.schedule.after(0.02 + 0.3 * self.source.random(), lambda: turn(left - 1))
            else:
                self.world.network.cut -= pairs

        turn(2 * self.source.randint(1, 6))
        return None

    def _storm(self) -> None:
        """Much is lost, repeated and late for a while."""
        weather = self.world.network.weather
        usual = self.world.regime.weather
        weather.loss = self.source.choice((0.1, 0.3, 0.6))
        weather.duplicate = self.source.choice((0.0, 0.3))
        weather.late = self.source.choice((0.0, 0.05))
        weather.delay_s_max = self.source.choice((usual.delay_s_max, 0.3, 1.0))
        weather.in_order = False
        self._note(f"storm {weather}")

        def over() -> None:
            for name in ("loss", "duplicate", "late", "delay_s_max", "in_order"):
                setattr(weather, name, getattr(usual, name))

        self._later(over)

    def _replay(self) -> None:
        """F27: frames of long ago arrive again."""
        kept = self.world.network.kept
        for target, frame, deliver in self.source.sample(kept, min(len(kept), 4)):
            deliver(target, frame)
        self._note("replay")

    def _swing(self) -> bool | None:
        """F27: a leader hands over and gets it back; then it is cut off, and hears again what it was told before."""
        leader = self._leader()
        if leader is None or leader.process is None or len(self.world.hosts) < 2:
            return False
        group = next(run.group for run in leader.process.runs.values() if run.leading_term)
        self._note(f"swing {leader.id} {group}")
        echo = [one for (_, target), said in self.world.network.said.items() if target == leader.name for one in said]

        def back(other: Host) -> None:
            if not self._over and other.process is not None:
                other.process.transfer(group, leader.id)
                self.world.on_leader = lambda _host: self._later(alone)

        def alone() -> None:
            self._cut_off(leader)
            for frame, deliver in echo:
                after_s = 4 * self.world.regime.timing.lease_s * self.source.random()
                self.world.schedule.after(after_s, partial(deliver, leader.name, frame))

        self.world.on_leader = back
        leader.process.transfer(group, None)
        return None

    # --- disks -------------------------------------------------------------------------------------------------------

    def _ail(self, health: Health) -> bool | None:
        host = self._any(running=False)
        if host is None or host.disk.health is not Health.GOOD:
            return False
        self._note(f"disk of {host.id} is {health.value}")
        host.disk.health = health
        host.disk.slow_s = self.source.choice((0.2, 1.0, 4.0))
        self._later(host.disk.heal)
        return None

    def _slow_disk(self) -> bool | None:
        return self._ail(Health.SLOW)

    def _hung_disk(self) -> bool | None:
        return self._ail(Health.HUNG)

    def _failing_disk(self) -> bool | None:
        return self._ail(Health.FAILING)

    def _full_disk(self) -> bool | None:
        return self._ail(Health.FULL)

    def _damage(self) -> bool | None:
        """The node ends, and the tail of its log is damaged."""
        host = self._any(running=False)
        if host is None or not self.world.may_harm(host):
            return False
        host.crash()
        group = self.source.choice(self.world.groups)
        count = self.source.choice((1, 2, 5, 30))
        self._note(f"damage the last {count} of {host.id} {group}")
        host.damage(group, count)
        self._later(host.start)
        return None

    def _restore(self) -> bool | None:
        """A copy of the disk is taken, or an older one is put back."""
        host = self._any(running=False)
        if host is None:
            return False
        if host.backup is None or self.source.random() < 0.3:
            host.keep_backup()
            return False
        if not self.world.may_harm(host):
            return False
        host.crash()
        host.restore()
        self._later(host.start)
        return None

    def _amnesia(self) -> bool | None:
        """F14: a leader is cut off; soon after there is another a voter is put back to before; it hears the old one."""
        old = self._leader()
        if old is None or len(self.world.hosts) < 3:
            return False
        for host in self.world.hosts.values():
            host.keep_backup()
        cut = self.world.network.cut
        around = self._around(old)
        cut.update(around)
        self._close(around)
        self._later(lambda: cut.difference_update(around))
        self._note(f"amnesia: {old.id} is cut off")

        def strike(new: Host) -> None:
            voters = [host for host in self.world.hosts.values() if host not in {old, new} and host.backup is not None]
            if self._over or new is old or not voters:
                return
            host = self.source.choice(voters)
            if not self.world.may_harm(host):
                return
            self._note(f"amnesia of {host.id}")
            host.crash()
            host.restore()
            self.world.schedule.after(0.01, host.start)
            cut.difference_update(self._links([old.name], [host.name]))
            self._cut(self._around(new))

        after_s = self._soon_s()
        self.world.on_leader = lambda host: self.world.schedule.after(after_s, lambda: strike(host))
        return None

    def _wipe(self) -> bool | None:
        """The disk is lost; the machine comes back as another node."""
        host = self._any(running=False)
        if host is None or not self.world.may_harm(host):
            return False
        self._note(f"wipe {host.id}")
        host.crash()
        host.wipe()
        self._later(host.start)
        return None

    # --- clocks ------------------------------------------------------------------------------------------------------

    def _clock(self) -> None:
        host = self._any(running=False)
        assert host is not None
        spread = self.world.regime.clock_drift * 0.49
        # NB: a jump of one clock alone is drift without bound: leases cannot survive it, read index does.
        ahead_s = self.source.choice((0.0, 0.5, 5.0, 3600.0)) if not self.world.regime.timing.lease_reads else 0.0
        host.clock.change(rate=1.0 + self.source.uniform(-spread, spread), ahead_s=ahead_s)
        self._note(f"clock of {host.id}: {host.clock.rate:.4f}, {ahead_s:g} s ahead")

    # --- what people and services do ---------------------------------------------------------------------------------

    def _hint(self) -> bool | None:
        """A closed connection that means nothing."""
        host = self._any()
        if host is None or host.process is None:
            return False
        for run in host.process.runs.values():
            if run.leader is not None:
                host.process.post(run.group, Hint(run.leader))
        self._note(f"hint to {host.id}")
        return None

    def _member(self) -> bool:
        return propose_change(self.world, self.source)

    def _leap(self) -> bool | None:
        """Two voters are replaced at once, which must be refused, and cut off from those who would replace them."""
        group = self.source.choice(self.world.groups)
        leader = next((host for host in self.world.hosts.values() if host.epoch(group)), None)
        if leader is None or leader.process is None:
            return False
        now = leader.newest_configuration(group)
        name = f"leap.{self.world.schedule.moment()}".encode()
        if len(now.learners) < 2:
            strangers = [host.id for host in self.world.hosts.values() if host.id not in now.nodes]
            changed = Configuration(now.voters, tuple(sorted({*now.learners, *strangers})))
            if not strangers or not self.world.may_become(group, changed):
                return False
            leader.process.change(group, changed, name)
            return None
        changed = Configuration(tuple(sorted({leader.id, *now.learners[:2]})), now.learners[2:])
        if not self.world.may_become(group, changed):
            return False
        self._note(f"{leader.id} {group} leaps to {changed.voters}")
        leader.process.change(group, changed, name)
        before = [host.name for host in self.world.hosts.values() if host.id in set(now.voters) - {leader.id}]
        after = [host.name for host in self.world.hosts.values() if host.id in changed.voters]
        self._cut(self._links(before, after))
        return None

    def _transfer(self) -> bool | None:
        host = self._any()
        if host is None or host.process is None:
            return False
        group = self.source.choice(self.world.groups)
        others = [*host.newest_configuration(group).nodes, None]
        target = self.source.choice(others)
        self._note(f"{host.id} {group} transfers to {target}")
        host.process.transfer(group, target)
        return None

    def _step_down(self) -> bool | None:
        host = self._any()
        if host is None or host.process is None:
            return False
        group = self.source.choice(self.world.groups)
        self._note(f"{host.id} {group} steps down")
        host.process.post(group, StepDown("asked"))
        return None
