"""A storm over one group: everything that may happen to it, from one seed, and the promises that hold all the same.

Faults: messages lost, repeated, reordered and late; cuts in one direction; clocks that run differently within what
`Timing.drift` allows; crashes; directories put back to an older state (the node is not trusted then); disks that do not
answer; trimmed logs; state that cannot be fetched. With them proposals, reads, changes of membership, transfers, hints.

Promises (see machine.py): election safety, log matching, leader completeness, state machine safety, leases,
linearizable read indexes, and progress once the storm is over.
"""

from __future__ import annotations

import random

from srengine.consensus import effects as fx
from srengine.consensus.entries import Configuration, Entry
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import TimeoutNow
from tests.consensus.groups import Group, MemoryLog, Node

NAMES = ("a", "b", "c", "d", "e")


class Violation(AssertionError):
    """A promise was broken."""


class Storm(Group):
    """``voters``: how many of NAMES begin as voters; the others wait to be added."""

    def __init__(self, seed: int, machine_type: type[RaftMachine] = RaftMachine, *, voters: int | None = None) -> None:
        self.dice = random.Random(seed)
        count = voters or self.dice.choice((1, 2, 3, 3, 3, 4, 5))
        self.rates = {name: 1 + self.dice.uniform(-0.5, 0.5) * 0.009 for name in NAMES}
        super().__init__(
            names=NAMES[:count],
            seed=seed,
            timing=fx.Timing(lease_reads=self.dice.random() < 0.5),
            machine_type=machine_type,
        )
        self.first = Configuration(NAMES[:count])
        for name in NAMES[count:]:
            self.add(name, MemoryLog())
        self.leaders_of: dict[int, str] = {}
        self.entry_at: dict[tuple[int, int], tuple[Entry, int]] = {}
        self.decided: dict[int, tuple[Entry, int]] = {}
        """index -> (entry, term of the machine that first called it committed)."""
        self.committed = 0
        self.asked: dict[int, int] = {}
        self.backups: dict[str, list[tuple]] = {name: [] for name in NAMES}

    # --- clocks ------------------------------------------------------------------------------------------------------

    def clock(self, name: str) -> float:
        return self.now * self.rates[name]

    def step(self, name: str, given: fx.Input) -> None:
        if name in self.held:
            return
        machine = self.nodes[name].machine
        machine.tick(self.clock(name))
        machine.step(given)
        self.settle(name)

    def settle(self, name: str) -> bool:
        said = super().settle(name)
        if said:
            self.check(name)
        return said

    def _machine(self, name, log, hard_state, applied_index, *, trusted):
        now, self.now = self.now, self.clock(name)
        made = super()._machine(name, log, hard_state, applied_index, trusted=trusted)
        self.now = now
        return made

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self, name: str) -> None:
        node, machine = self.nodes[name], self.nodes[name].machine
        for change in node.roles:
            if change.role is fx.Role.LEADER:
                self.check_elected(name, change.term)
        node.roles.clear()
        self.check_log(name)
        self.check_decided(name)
        for token, index in node.reads.items():
            if index and index < self.asked.pop(token, 0):
                raise Violation(f"stale read: {name} says {index} to read {token}")
        node.reads.clear()
        for other in self.nodes.values():
            until = other.machine.lease_until
            if until > self.clock(other.name) and other.machine.commit_index < self.committed:
                raise Violation(f"lease: {other.name} has one but not what is committed at {self.committed}")
        for fault in ("malformed", "second leader", "contradicts committed"):
            if machine.dropped.get(fault):
                raise Violation(f"{name} dropped a message: {fault}")

    def check_elected(self, name: str, term: int) -> None:
        if self.leaders_of.setdefault(term, name) != name:
            raise Violation(f"election safety: {name} and {self.leaders_of[term]} lead term {term}")
        machine = self.nodes[name].machine
        for index, (entry, decided_in) in self.decided.items():
            if decided_in < term and index > machine.view.floor.index and machine.view.term_at(index) != entry.term:
                raise Violation(f"leader completeness: {name} leads {term} without entry {index}")

    def check_log(self, name: str) -> None:
        log = self.nodes[name].log
        before = log.floor.term
        for entry in log.all:
            known = self.entry_at.setdefault((entry.index, entry.term), (entry, before))
            if known != (entry, before):
                raise Violation(f"log matching: {name} has {entry} after term {before}, not {known}")
            before = entry.term

    def check_decided(self, name: str) -> None:
        node = self.nodes[name]
        machine = node.machine
        for entry in (
            machine.view.entries(machine.view.floor.index + 1, machine.commit_index + 1, 1 << 30)
            if (machine.commit_index > machine.view.floor.index)
            else ()
        ):
            if entry.index > machine.commit_index:
                break
            known = self.decided.setdefault(entry.index, (entry, machine.term))
            if known[0] != entry:
                raise Violation(f"state machine safety: {name} decided {entry}, another {known[0]}")
        self.committed = max(self.committed, machine.commit_index)
        for entry in node.applied[-3:]:
            if entry.index in self.decided and self.decided[entry.index][0] != entry:
                raise Violation(f"state machine safety: {name} applied {entry}")

    # --- what happens ------------------------------------------------------------------------------------------------

    def blow(self, steps: int) -> None:
        """Let the storm rage."""
        acts = {
            self.let_arrive: 60,
            self.let_time_pass: 25,
            self.write: 10,
            self.ask: 6,
            self.lose: 3,
            self.repeat: 3,
            self.cut_or_mend: 2,
            self.crash: 1,
            self.put_back: 0.6,
            self.hang_or_wake: 1,
            self.trim: 1,
            self.fetch: 3,
            self.change_membership: 1.5,
            self.hand_over: 0.5,
            self.hint: 2,
            self.resign: 0.3,
            self.lose_power: 0.4,
            self.isolate_leader: 0.8,
            self.hand_over_slowly: 0.4,
        }
        for _ in range(steps):
            self.dice.choices(list(acts), list(acts.values()))[0]()

    def anyone(self) -> Node:
        return self.nodes[self.dice.choice(NAMES)]

    def victim(self) -> str:
        return self.some_leader() if self.dice.random() < 0.5 else self.anyone().name

    def let_arrive(self) -> None:
        if self.on_way:
            # Mostly in order, sometimes anything.
            position = 0 if self.dice.random() < 0.8 else self.dice.randrange(len(self.on_way))
            self.deliver(self.on_way.pop(position))

    def let_time_pass(self) -> None:
        self.now += self.dice.choice((0.001, 0.01, 0.05, 0.1, 0.3, 1.0)) * self.dice.random()
        for name in NAMES:
            if self.dice.random() < 0.9:
                self.nodes[name].machine.tick(self.clock(name))
                self.settle(name)

    def some_leader(self) -> str:
        leaders = self.leaders
        return self.dice.choice(leaders) if leaders else self.anyone().name

    def write(self) -> None:
        self.propose(self.some_leader(), b"%d" % self.tokens)

    def ask(self) -> None:
        self.tokens += 1
        self.asked[self.tokens] = self.committed
        self.step(self.anyone().name, fx.Read(self.tokens))

    def lose(self) -> None:
        if self.on_way:
            self.on_way.pop(self.dice.randrange(len(self.on_way)))

    def repeat(self) -> None:
        if self.on_way:
            self.on_way.insert(self.dice.randrange(len(self.on_way) + 1), self.dice.choice(self.on_way))

    def cut_or_mend(self) -> None:
        if self.dice.random() < 0.4:
            self.cut.clear()
        elif self.dice.random() < 0.5:
            self.cut.add(tuple(self.dice.sample(NAMES, 2)))
        else:
            alone = self.victim()
            self.cut |= {pair for other in NAMES for pair in ((alone, other), (other, alone))}

    def crash(self) -> None:
        self.crash_one(self.victim())

    def crash_one(self, name: str) -> None:
        self.save(name)
        # What was handed to a hanging disk may have reached it or not.
        if name in self.held:
            said = self.held.pop(name)
            self.blocked.discard(name)
            if self.dice.random() < 0.5:
                self.nodes[name].hard_state = said.persist.hard_state or self.nodes[name].hard_state
                self.nodes[name].log.persist(said.persist.entries)
        # A node that could not prove itself is not trusted after the next start, either.
        self.restart(name, trusted=self.nodes[name].machine.trusted)

    def save(self, name: str) -> None:
        node = self.nodes[name]
        kept = (MemoryLog(node.log.all, node.log.floor), node.hard_state, list(node.applied))
        self.backups[name].append(kept)

    def put_back(self) -> None:
        node = self.anyone()
        name = node.name
        if not self.backups[name] or name in self.held or not self.may_lose_trust(name):
            return
        log, node.hard_state, applied = self.dice.choice(self.backups[name])
        node.log, node.applied = MemoryLog(log.all, log.floor), list(applied)
        self.restart(name, trusted=False)

    def may_lose_trust(self, name: str) -> bool:
        return all(other.machine.trusted or other.name == name for other in self.nodes.values())

    def hang_or_wake(self) -> None:
        node = self.anyone()
        if node.name in self.held:
            self.unblock(node.name)
        elif node.name in self.blocked:
            self.blocked.discard(node.name)
        elif self.dice.random() < 0.5:
            self.blocked.add(node.name)

    def trim(self) -> None:
        node = self.anyone()
        machine = node.machine
        if node.name in self.held or machine.applied_index <= node.log.floor.index:
            return
        floor = machine.floor_at(self.dice.randint(node.log.floor.index, machine.applied_index))
        node.log.trim(floor)
        self.step(node.name, fx.Trimmed(floor, b"state"))

    def fetch(self) -> None:
        """The state of another node is put in place of one's own, or cannot be."""
        node = self.anyone()
        wanted = node.installing
        if wanted is None or node.name in self.held:
            return
        node.installing = None
        source = self.nodes[wanted.source].machine
        if self.dice.random() < 0.3 or source.applied_index < wanted.floor.index:
            self.step(node.name, fx.InstallFailed(wanted.floor.index))
            return
        floor = source.floor_at(source.applied_index)
        node.log.install(floor)
        node.applied = list(self.nodes[wanted.source].applied)
        self.step(node.name, fx.Installed(floor))

    def change_membership(self) -> None:
        name = self.some_leader()
        now = self[name].configuration
        voters, learners = set(now.voters), set(now.learners)
        who = self.dice.choice(NAMES)
        where = self.dice.choice(("voter", "learner", "out"))
        voters.discard(who)
        learners.discard(who)
        if where == "voter":
            voters.add(who)
        elif where == "learner":
            learners.add(who)
        self.propose(name, b"members", Configuration(tuple(sorted(voters)), tuple(sorted(learners))))

    def hand_over(self) -> None:
        self.tokens += 1
        target = self.dice.choice((None, self.dice.choice(NAMES)))
        self.step(self.some_leader(), fx.Transfer(self.tokens, target))

    def hint(self) -> None:
        node = self.anyone()
        if node.machine.leader is not None and self.dice.random() < 0.7:
            self.cut |= {(node.machine.leader, node.name), (node.name, node.machine.leader)}
            self.step(node.name, fx.Hint(node.machine.leader))

    def resign(self) -> None:
        self.step(self.some_leader(), fx.StepDown("asked to"))

    def lose_power(self) -> None:
        """Several nodes stop at the same moment."""
        for name in NAMES:
            if self.dice.random() < 0.6:
                self.crash_one(name)

    def pass_shortly(self, rounds: int) -> None:
        """Some time passes in small steps, and nearly everything arrives."""
        for _ in range(rounds):
            self.now += self.dice.choice((0.01, 0.03, 0.05))
            for name in NAMES:
                if name not in self.stopped:
                    self.nodes[name].machine.tick(self.clock(name))
                    self.settle(name)
            waiting, self.on_way = self.on_way, []
            for out in waiting:
                if out.target in self.stopped or self.dice.random() < 0.05:
                    self.on_way.append(out)
                else:
                    self.deliver(out)

    def isolate_leader(self) -> None:
        """The leader is cut off, or stopped, and everybody notices at once; later it is asked to read and to write."""
        old = self.some_leader()
        if self.dice.random() < 0.5:
            self.stopped.add(old)
        else:
            self.cut |= {pair for other in NAMES for pair in ((old, other), (other, old))}
        for name in NAMES:
            if self[name].leader == old and name != old and self.dice.random() < 0.8:
                self.step(name, fx.Hint(old))
        self.pass_shortly(self.dice.randint(1, 40))
        for name in self.leaders:
            self.propose(name, b"%d" % self.tokens)
        self.pass_shortly(self.dice.randint(0, 4))
        self.stopped.discard(old)
        for name in (old, self.some_leader()):
            self.tokens += 1
            self.asked[self.tokens] = self.committed
            self.step(name, fx.Read(self.tokens))

    def hand_over_slowly(self) -> None:
        """A leader's TimeoutNow is on its way for longer than the leader waits for it."""
        old = self.some_leader()
        self.hand_over()
        late = [out for out in self.on_way if isinstance(out.message, TimeoutNow)]
        self.on_way = [out for out in self.on_way if not isinstance(out.message, TimeoutNow)]
        for _ in range(self.dice.randint(0, 30)):
            self.pass_shortly(1)
            late += [out for out in self.on_way if isinstance(out.message, TimeoutNow)]
            self.on_way = [out for out in self.on_way if not isinstance(out.message, TimeoutNow)]
        self.cut |= {pair for other in NAMES for pair in ((old, other), (other, old)) if self.dice.random() < 0.7}
        for out in late[:1]:
            self.deliver(out)
        self.pass_shortly(6)
        self.write()
        self.pass_shortly(2)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def calm(self) -> None:
        """End the storm and see that the group works again."""
        self.cut.clear()
        for name in [*self.held]:
            self.unblock(name)
        self.blocked.clear()
        for _ in range(12):
            for name in NAMES:
                while self.nodes[name].installing is not None:
                    self.fetch_for(name)
            self.run(1.0, step=0.05)
            if self.is_settled():
                break
        newest = max((self[name] for name in NAMES), key=lambda machine: (machine.commit_index, machine.term))
        voters = newest.configuration.voters
        for machine in (newest, *(self[name] for name in newest.configuration.nodes)):
            counted = machine.configuration.voters
            if sum(self[voter].trusted for voter in counted) <= len(counted) // 2:
                return  # Whoever may have to lead needs a majority that is trusted; `Trust` is what helps here.
        if len(self.leaders) != 1:
            raise Violation(f"progress: {self.leaders} lead {voters} in calm weather")
        leader = self.leaders[0]
        self.propose(leader, b"after the storm")
        self.run(1.0, step=0.05)
        last = self[leader].last_index
        for name in self[leader].configuration.nodes:
            if self[name].commit_index != last:
                raise Violation(f"progress: {name} stands at {self[name].commit_index}, not at {last}")
            if name in self[leader].configuration.voters and not self[name].trusted and len(voters) > 2:
                raise Violation(f"progress: {name} has not regained its trust")

    def is_settled(self) -> bool:
        """Whether one node leads and all members stand where it stands."""
        if len(self.leaders) != 1:
            return False
        leader = self[self.leaders[0]]
        members = [self[name] for name in leader.configuration.nodes]
        return all((one.commit_index, one.leader) == (leader.last_index, leader.node_id) for one in members)

    def fetch_for(self, name: str) -> None:
        node = self.nodes[name]
        wanted, node.installing = node.installing, None
        source = self.nodes[wanted.source].machine
        if source.applied_index < wanted.floor.index:
            self.step(name, fx.InstallFailed(wanted.floor.index))
            return
        floor = source.floor_at(source.applied_index)
        node.log.install(floor)
        node.applied = list(self.nodes[wanted.source].applied)
        self.step(name, fx.Installed(floor))

    def run(self, seconds: float, step: float = 0.01) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += step
            for name in NAMES:
                self.nodes[name].machine.tick(self.clock(name))
                self.settle(name)
            self.flow()
            for name in NAMES:
                if self.nodes[name].installing is not None:
                    self.fetch_for(name)


def weather(seed: int, machine_type: type[RaftMachine] = RaftMachine, steps: int = 500) -> Storm:
    """Run one storm; raises `Violation`."""
    storm = Storm(seed, machine_type)
    storm.blow(steps)
    storm.calm()
    return storm
