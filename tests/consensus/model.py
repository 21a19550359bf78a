"""A small exhaustive model of election and fencing, over the real machine (B37).

Every state that three nodes can reach is visited, within these bounds:

* the machines are `RaftMachine` itself, with time taken out: a time-out may fire at any moment, so promises and leases
  are off (they only forbid what is allowed here), and pre-votes are skipped (they promise nothing);
* the network keeps every message for ever and delivers any of them at any time: so messages are lost, late, reordered
  and repeated without bound. Appends without entries are left out: they say nothing about elections;
* ``standing`` nodes may stand for election as often as terms up to ``term_max`` allow; ``restarts`` times a node loses
  its memory and starts again from its disk;
* a leader proposes an epoch at once, as ha/ does after its election: the newest that it has applied, plus one. Who
  applies it first in the log owns it (SUCCESS), a later one of the same number is refused (KEYEXIST).

What must hold in every state: one leader in a term; equal entries at equal (index, term); what is decided at an index
is decided for ever; whatever is decided before a leader's term is in its log; and every epoch has one owner, whoever
applies it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from srengine.consensus import effects as fx
from srengine.consensus.entries import Configuration, Entry, EntryKind, HardState
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Append, Message
from srengine.consensus.roles import Follower, Leader
from srengine.consensus.view import Handed, LogView
from tests.consensus.groups import GROUP, MemoryLog

NAMES = ("a", "b", "c")
FIRST = Entry(1, 1, EntryKind.CONFIGURATION, b"", Configuration(NAMES))
TIMING = fx.Timing()


class Broken(AssertionError):
    """Something that must hold does not; says how one gets there."""


def timeless(kind: type[RaftMachine]) -> type[RaftMachine]:
    """Return the machine without clocks: promises have always lapsed, nobody has a lease."""

    class Timeless(kind):  # type: ignore[valid-type, misc]
        def _promised(self):
            return False

        def _has_lease(self):
            return False

    return Timeless


def applier(applied: tuple[Entry, ...]) -> dict[int, bytes]:
    """Return epoch -> owner, as every node computes it from what it has applied."""
    owners: dict[int, bytes] = {}
    for entry in applied:
        if entry.kind is EntryKind.COMMAND:
            epoch, owner = entry.data.split(b" ", 1)
            if int(epoch) == max(owners, default=0) + 1:
                owners[int(epoch)] = owner
    return owners


class Node:
    """One node between two events, numbered by what distinguishes it. Never stepped: `clone` its machine first."""

    def __init__(self, number: int, machine: RaftMachine, hard_state: HardState, applied: tuple[Entry, ...]) -> None:
        self.number, self.machine, self.hard_state, self.applied = number, machine, hard_state, applied
        self.after: dict[tuple, tuple[Node, int]] = {}
        """Event -> what the node becomes by it, and which messages it sends."""
        self.done_with = 0
        """Messages that change nothing here any more, as bits."""


World = tuple[int, int, int, int, int]
"""Numbers of the three nodes' states, the messages sent so far as bits, restarts that are left."""


def clone(machine: RaftMachine) -> RaftMachine:
    """Copy a machine, sharing what never changes. Much faster than `copy.deepcopy`."""
    made = object.__new__(type(machine))
    made.__dict__.update(machine.__dict__)
    view, log = machine.view, MemoryLog(machine.view._log.all, machine.view.floor)
    copied = object.__new__(LogView)
    copied.__dict__.update(view.__dict__)
    copied._log = log
    copied._pending, copied._starts, copied._terms = list(view._pending), list(view._starts), list(view._terms)
    copied._configurations = list(view._configurations)
    made.view = copied
    state = machine.state
    if isinstance(state, Leader):
        peers = {name: replace(peer, in_flight=peer.in_flight.copy()) for name, peer in state.peers.items()}
        made.state = replace(
            state,
            peers=peers,
            rounds=state.rounds.copy(),
            uncommitted=state.uncommitted.copy(),
            reads=state.reads.copy(),
        )
    elif isinstance(state, Follower):
        made.state = replace(state)
    else:
        made.state = replace(state, votes=dict(state.votes))
    made.dropped, made._roles, made._send = {}, [], []
    made._handed = Handed()
    made._accepted, made._refused, made._reads = [], [], []
    made._random = random.Random(0)
    return made


def key_of(machine: RaftMachine, applied: tuple[Entry, ...]) -> tuple:
    """Return what distinguishes the node's state for the future."""
    state = machine.state
    match state:
        case Leader():
            own = tuple(
                (name, peer.next_index, peer.match_index, peer.counted_index, peer.flow, peer.probing, peer.commit_sent)
                for name, peer in sorted(state.peers.items())
            )
        case Follower(leader=leader):
            own = (leader,)
        case _:
            own = tuple(sorted(state.votes.items()))
    return (machine.hard_state, type(state), own, machine.view._log.all, machine.commit_index, len(applied))


class Model:
    """The search. What one node does depends on its own state alone, so it is computed once for each state."""

    def __init__(
        self,
        kind: type[RaftMachine] = RaftMachine,
        *,
        term_max: int = 3,
        standing: tuple[str, ...] = ("a", "b"),
        restarts: int = 1,
        stale: bool = True,
        owners_of: Callable[[tuple[Entry, ...]], dict[int, bytes]] = applier,
    ) -> None:
        self.kind = timeless(kind)
        self.term_max, self.standing, self.restarts, self.owners_of = term_max, standing, restarts, owners_of
        self.stale = stale
        """Whether messages arrive whose term is over at the receiver."""
        self.nodes: list[Node] = []
        self.node_numbers: dict[tuple, int] = {}
        self.messages: list[tuple[int, Message]] = []
        """(position of the target, message), by number."""
        self.message_numbers: dict[tuple[int, Message], int] = {}
        self.addressed = [0, 0, 0]
        """Messages to each node, as bits."""
        self.came_from: dict[World, tuple[World, int, tuple]] = {}
        self.checked: set[tuple[int, int, int]] = set()
        self.events = self.leaderships = self.ownerships = 0

    # --- the search --------------------------------------------------------------------------------------------------

    def run(self, worlds_max: int = 10_000_000) -> int:
        """Visit every world and return how many there are; raises `Broken`."""
        nodes = [self.node(*self.started(name, MemoryLog([FIRST]), HardState(1), ())) for name in NAMES]
        first: World = (nodes[0].number, nodes[1].number, nodes[2].number, 0, self.restarts)
        seen = {first}
        open_worlds = [first]
        while open_worlds:
            world = open_worlds.pop()
            for position, event in self.possible(world):
                self.events += 1
                following = self.follow(world, position, event)
                if following in seen:
                    continue
                seen.add(following)
                assert len(seen) <= worlds_max, f"more than {worlds_max} worlds: the bounds are too wide"
                self.came_from[following] = (world, position, event)
                self.check(following)
                open_worlds.append(following)
        return len(seen)

    def possible(self, world: World) -> Iterator[tuple[int, tuple]]:
        """Yield (position, event) for everything that may happen next."""
        for position, name in enumerate(NAMES):
            node = self.nodes[world[position]]
            machine = node.machine
            if name in self.standing and machine.term < self.term_max and not isinstance(machine.state, Leader):
                yield position, ("stands",)
            if world[4]:
                yield position, ("restarts",)
            waiting = world[3] & self.addressed[position] & ~node.done_with
            while waiting:
                lowest = waiting & -waiting
                waiting ^= lowest
                number = lowest.bit_length() - 1
                if self.stale or self.messages[number][1].term >= machine.term:
                    yield position, ("receives", number)

    def follow(self, world: World, position: int, event: tuple) -> World:
        node = self.nodes[world[position]]
        found = node.after.get(event)
        if found is None:
            found = node.after[event] = self.happen(node, event)
            if event[0] == "receives" and found == (node, 0):
                node.done_with |= 1 << event[1]
        made, sent = found
        numbers = [*world[:3]]
        numbers[position] = made.number
        return (numbers[0], numbers[1], numbers[2], world[3] | sent, world[4] - (event[0] == "restarts"))

    # --- one node ----------------------------------------------------------------------------------------------------

    def started(self, name: str, log: MemoryLog, hard_state: HardState, applied: tuple[Entry, ...]) -> tuple:
        machine = self.kind(
            group=GROUP,
            node_id=name,
            log=log,
            hard_state=hard_state,
            applied_index=len(applied),
            timing=TIMING,
            random=random.Random(0),
            now=0.0,
            trusted=True,
        )
        return machine, hard_state, applied

    def node(self, machine: RaftMachine, hard_state: HardState, applied: tuple[Entry, ...]) -> Node:
        number = self.node_numbers.setdefault((machine.node_id, *key_of(machine, applied)), len(self.nodes))
        if number == len(self.nodes):
            self.nodes.append(Node(number, machine, hard_state, applied))
        return self.nodes[number]

    def happen(self, node: Node, event: tuple) -> tuple[Node, int]:
        """Return what the node becomes, having done what its machine said, and the messages that it sent."""
        if event[0] == "restarts":
            log = MemoryLog(node.machine.view._log.all)
            return self.node(*self.started(node.machine.node_id, log, node.hard_state, node.applied)), 0
        machine, hard_state, applied, sent = clone(node.machine), node.hard_state, node.applied, 0
        led = isinstance(machine.state, Leader)
        if event[0] == "stands":
            machine._stand(0, transfer=False)
        else:
            machine.step(fx.Received(self.messages[event[1]][1]))
        if isinstance(machine.state, Leader) and not led:
            epoch = max(self.owners_of(applied), default=0) + 1
            machine.step(fx.Propose(0, b"%d %s of %d" % (epoch, machine.node_id.encode(), machine.term)))
        while said := machine.drain():
            if said.persist is not None:
                hard_state = said.persist.hard_state or hard_state
                machine.view._log.persist(said.persist.entries)
                machine.step(fx.Persisted(machine.view._log.last_index))
            for out in said.send:
                if not isinstance(out.message, Append) or out.message.entries:
                    sent |= 1 << self.number(NAMES.index(out.target), out.message)
            applied += said.apply
            if said.apply:
                machine.step(fx.Applied(said.apply[-1].index))
        return self.node(machine, hard_state, applied), sent

    def number(self, target: int, message: Message) -> int:
        number = self.message_numbers.setdefault((target, message), len(self.messages))
        if number == len(self.messages):
            self.messages.append((target, message))
            self.addressed[target] |= 1 << number
        return number

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        if world[:3] in self.checked:
            return
        self.checked.add(world[:3])
        nodes = [self.nodes[number] for number in world[:3]]
        leaders: dict[int, str] = {}
        logs: dict[tuple[int, int], tuple[Entry, int]] = {}
        decided: dict[int, Entry] = {}
        owners: dict[int, bytes] = {}
        for node in nodes:
            machine = node.machine
            if isinstance(machine.state, Leader):
                self.leaderships += 1
                self.expect(leaders.setdefault(machine.term, machine.node_id) == machine.node_id, world, "two leaders")
            before = 0
            for entry in machine.view._log.all:
                known = logs.setdefault((entry.index, entry.term), (entry, before))
                self.expect(known == (entry, before), world, "logs do not match")
                before = entry.term
            for entry in node.applied:
                self.expect(decided.setdefault(entry.index, entry) == entry, world, "two decisions at one index")
            for epoch, owner in self.owners_of(node.applied).items():
                self.ownerships += 1
                self.expect(owners.setdefault(epoch, owner) == owner, world, "an epoch has two owners")
        for node in nodes:
            if isinstance(node.machine.state, Leader):
                log = node.machine.view._log.all
                for index, entry in decided.items():
                    holds = index <= len(log) and log[index - 1] == entry
                    self.expect(holds or entry.term > node.machine.term, world, "a leader lacks what is decided")

    def expect(self, holds: bool, world: World, what: str) -> None:
        if not holds:
            raise Broken(f"{what}, after: {'; '.join(self.path(world))}")

    def path(self, world: World) -> list[str]:
        """Return the events that lead to a world."""
        events: list[str] = []
        while world in self.came_from:
            world, position, event = self.came_from[world]
            events.insert(0, f"{NAMES[position]} {self.told(event)}")
        return events

    def told(self, event: tuple) -> str:
        if event[0] != "receives":
            return event[0]
        message = self.messages[event[1]][1]
        return f"receives {type(message).__name__} {message.term} of {message.sender}"


BOUNDS = {
    "votes": {"term_max": 2, "restarts": 2},
    "terms": {"term_max": 3, "restarts": 0, "stale": False},
    "stale": {"term_max": 3, "restarts": 0},
    "restart": {"term_max": 3, "restarts": 1, "stale": False},
    "three": {"term_max": 3, "restarts": 0, "stale": False, "standing": NAMES},
}
"""Bounds that were searched to their end. The gate visits the first two, `python -m tests.consensus.model` all."""


def main() -> None:
    """Visit every world within every one of BOUNDS and print how many there were."""
    for name, bounds in BOUNDS.items():
        model = Model(**bounds)  # type: ignore[arg-type]
        worlds = model.run()
        told = f"{len(model.nodes):4} states of a node, {model.events:8} events, all is well"
        sys.stdout.write(f"{name:8} {worlds:8} worlds, {told}\n")


if __name__ == "__main__":
    main()
