"""A group of machines in one thread, with logs in memory and a network that does what it is told. For tests of rules;
the simulator with clocks, disks and many groups is tests/simulator.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from srengine.consensus import effects as fx
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Message

GROUP = "g"
NOTHING = Floor()
FRESH = HardState()


class MemoryLog:
    """A durable log that lives as long as the test."""

    def __init__(self, entries: Iterable[Entry] = (), floor: Floor = NOTHING) -> None:
        self._floor = floor
        self._entries = list(entries)

    @property
    def floor(self) -> Floor:
        return self._floor

    @property
    def last_index(self) -> int:
        return self._floor.index + len(self._entries)

    def term_at(self, index):
        if index == self._floor.index:
            return self._floor.term
        position = index - self._floor.index - 1
        return self._entries[position].term if 0 <= position < len(self._entries) else None

    def entries(self, start, stop, bytes_max):
        found, used = [], 0
        for entry in self._entries[max(start - self._floor.index - 1, 0) : max(stop - self._floor.index - 1, 0)]:
            used += len(entry.data) + 64
            if found and used > bytes_max:
                break
            found.append(entry)
        return tuple(found)

    def persist(self, entries: tuple[Entry, ...]) -> None:
        if entries:
            assert self._floor.index < entries[0].index <= self.last_index + 1
            del self._entries[entries[0].index - self._floor.index - 1 :]
            self._entries.extend(entries)

    def trim(self, floor: Floor) -> None:
        del self._entries[: floor.index - self._floor.index]
        self._floor = floor

    def install(self, floor: Floor) -> None:
        if floor.index <= self._floor.index:
            return
        if self.term_at(floor.index) == floor.term:
            self.trim(floor)
        else:
            self._entries, self._floor = [], floor

    @property
    def all(self) -> tuple[Entry, ...]:
        return tuple(self._entries)


@dataclass
class Node:
    """A machine, its disk, and what it said to those above."""

    name: str
    log: MemoryLog
    hard_state: HardState
    machine: RaftMachine
    applied: list[Entry] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, fx.Accepted] = field(default_factory=dict)
    refused: dict[int, fx.Refused] = field(default_factory=dict)
    roles: list[fx.RoleChanged] = field(default_factory=list)
    installing: fx.InstallState | None = None


@dataclass
class Group:
    """Machines by name and messages on their way, in order of sending."""

    names: tuple[str, ...]
    learners: tuple[str, ...] = ()
    seed: int = 0
    timing: fx.Timing = field(default_factory=fx.Timing)
    machine_type: type[RaftMachine] = RaftMachine
    now: float = 0.0

    def __post_init__(self) -> None:
        self.on_way: list[fx.Outgoing] = []
        self.nodes: dict[str, Node] = {}
        self.tokens = 0
        self.cut: set[tuple[str, str]] = set()
        self.blocked: set[str] = set()
        """Nodes whose disk does not answer, and what they wait with."""
        self.held: dict[str, fx.Effects] = {}
        self.stopped: set[str] = set()
        """Processes that do not run: nothing reaches them."""
        configuration = Configuration(self.names, self.learners)
        first = Entry(1, 1, EntryKind.CONFIGURATION, b"bootstrap", configuration)
        for name in (*self.names, *self.learners):
            self.add(name, MemoryLog([first]))

    def add(self, name: str, log: MemoryLog, hard_state: HardState = FRESH, *, trusted: bool = True) -> Node:
        node = Node(name, log, hard_state, self._machine(name, log, hard_state, 0, trusted=trusted))
        self.nodes[name] = node
        return node

    def _machine(self, name, log, hard_state, applied_index, *, trusted):
        return self.machine_type(
            group=GROUP,
            node_id=name,
            log=log,
            hard_state=hard_state,
            applied_index=max(applied_index, log.floor.index),
            timing=self.timing,
            random=random.Random(f"{self.seed} {name} {self.now}"),
            now=self.now,
            trusted=trusted,
        )

    def restart(self, name: str, *, trusted: bool = True) -> None:
        """Start a node anew from its disk; its memory is gone."""
        node = self.nodes[name]
        applied = node.applied[-1].index if node.applied else 0
        node.machine = self._machine(name, node.log, node.hard_state, applied, trusted=trusted)
        node.installing = None

    # --- one node ----------------------------------------------------------------------------------------------------

    def step(self, name: str, given: fx.Input) -> None:
        machine = self.nodes[name].machine
        if name in self.held:
            return
        machine.tick(self.now)
        machine.step(given)
        self.settle(name)

    def settle(self, name: str) -> bool:
        """Do what the machine says until it says nothing more; return whether it said anything. A blocked disk does
        not answer.
        """
        node = self.nodes[name]
        spoke = False
        while said := node.machine.drain():
            spoke = True
            if said.persist is not None:
                if name in self.blocked:
                    self.held[name] = said
                    continue
                self.persist(node, said)
            self.on_way += said.send
            self.note(node, said)
        return spoke

    def unblock(self, name: str) -> None:
        """Let a disk answer again."""
        self.blocked.discard(name)
        said = self.held.pop(name)
        self.persist(self.nodes[name], said)
        self.on_way += said.send
        self.note(self.nodes[name], said)
        self.settle(name)

    def persist(self, node: Node, said: fx.Effects) -> None:
        node.hard_state = said.persist.hard_state or node.hard_state
        node.log.persist(said.persist.entries)
        node.machine.step(fx.Persisted(node.log.last_index))

    def note(self, node: Node, said: fx.Effects) -> None:
        for entry in said.apply:
            expected = node.applied[-1].index + 1 if node.applied else node.log.floor.index + 1
            assert entry.index == expected or not node.applied, (node.name, entry.index, expected)
            node.applied.append(entry)
        if said.apply:
            node.machine.step(fx.Applied(said.apply[-1].index))
        for ready in said.reads:
            assert ready.token not in node.reads
            node.reads[ready.token] = ready.index
        node.accepted |= {accepted.token: accepted for accepted in said.accepted}
        node.refused |= {refused.token: refused for refused in said.refused}
        node.roles += said.roles
        node.installing = said.install or node.installing

    # --- all of them -------------------------------------------------------------------------------------------------

    def deliver(self, out: fx.Outgoing) -> None:
        if out.target in self.nodes and (out.message.sender, out.target) not in self.cut:
            self.step(out.target, fx.Received(out.message))

    def flow(self, limit: int = 10_000) -> None:
        """Deliver everything, and what follows from it."""
        while limit:
            limit -= 1
            position = next((i for i, out in enumerate(self.on_way) if out.target not in self.stopped), None)
            if position is None:
                break
            self.deliver(self.on_way.pop(position))
        assert limit, "the machines never stop talking"

    def run(self, seconds: float, step: float = 0.01) -> None:
        """Let time pass for everybody."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += step
            for name in sorted({*self.nodes} - self.stopped):
                self.nodes[name].machine.tick(self.now)
                self.settle(name)
            self.flow()

    def elect(self, name: str) -> None:
        """Make a node stand for election at once, and let it win."""
        machine = self.nodes[name].machine
        self.now = max(self.now, *(node.machine.promise_until for node in self.nodes.values()))
        machine.tick(self.now)
        machine._campaign(0)
        self.settle(name)
        self.flow()
        assert machine.role is fx.Role.LEADER, (name, machine.role, machine.dropped)

    def propose(self, name: str, data: bytes, configuration: Configuration | None = None) -> int:
        self.tokens += 1
        self.step(name, fx.Propose(self.tokens, data, configuration))
        return self.tokens

    def read(self, name: str) -> int:
        self.tokens += 1
        self.step(name, fx.Read(self.tokens))
        return self.tokens

    @property
    def leaders(self) -> list[str]:
        return [name for name, node in sorted(self.nodes.items()) if node.machine.role is fx.Role.LEADER]

    def __getitem__(self, name: str) -> RaftMachine:
        return self.nodes[name].machine


def message_names(messages: Iterable[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]
