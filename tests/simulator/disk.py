"""A node's disk: the node-wide log of all groups, the applied states, and what can go wrong with both.

The log is what `consensus/log.py` promises: one transaction for a turn, there whole or not at all after a crash; a
damaged tail is found at the next start by its checksums: the log ends before it. Restoring an older copy shows in
nothing on the disk; the boot number that peers saw tells. Either way the group is *suspect* here: its node is not
trusted with a vote until its machine has made up for what was lost.
"""

from __future__ import annotations

import copy
import enum
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from srengine.consensus.effects import Persist
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState
from tests.simulator.checkers.matching import START, LogMatching, chained
from tests.simulator.checkers.violation import Violation
from tests.simulator.registers import Registers
from tests.simulator.schedule import Schedule, Timer


class GroupLog:
    """The durable log of one group on one node: a `LogReader`. ``chains[i]`` belongs to ``entries[i]``; ``suspect``: it
    may have lost what it held once.
    """

    __slots__ = ("_entries", "chains", "floor", "floor_chain", "hard_state", "suspect")

    def __init__(self) -> None:
        self.floor = Floor()
        self.floor_chain = START
        self.hard_state = HardState()
        self.suspect = False
        self._entries: list[Entry] = []
        self.chains: list[int] = []

    @property
    def last_index(self) -> int:
        return self.floor.index + len(self._entries)

    def term_at(self, index: int) -> int | None:
        place = index - self.floor.index
        if place == 0:
            return self.floor.term
        return self._entries[place - 1].term if 0 < place <= len(self._entries) else None

    def entries(self, start: int, stop: int, bytes_max: int) -> tuple[Entry, ...]:
        first = self.floor.index + 1
        assert start >= first, (start, first)
        found = self._entries[start - first : max(stop, start) - first]
        total = 0
        for number, entry in enumerate(found):
            total += len(entry.data) + 32
            if number and total > bytes_max:
                return tuple(found[:number])
        return tuple(found)

    def chain_at(self, index: int) -> int:
        place = index - self.floor.index
        return self.floor_chain if place == 0 else self.chains[place - 1]

    def configuration_at(self, index: int) -> Configuration:
        """Return the configuration in force at ``index``."""
        for entry in reversed(self._entries[: index - self.floor.index]):
            if entry.configuration is not None:
                return entry.configuration
        return self.floor.configuration

    def configurations(self) -> list[Configuration]:
        """Return every configuration that the log knows of."""
        return [self.floor.configuration, *(e.configuration for e in self._entries if e.configuration is not None)]

    def write(self, persist: Persist, node: str, group: str, matching: LogMatching, applied: int) -> None:
        """Put one turn's part of this group in place."""
        if persist.hard_state is not None:
            self.hard_state = persist.hard_state
        if not persist.entries:
            return
        first = persist.entries[0].index
        if first <= max(applied, self.floor.index):
            raise Violation("state machine safety", f"group {group}: {node} cuts its log at {first}, applied {applied}")
        assert first <= self.last_index + 1, (first, self.last_index)
        self.cut(first)
        chain = self.chain_at(first - 1)
        for entry in persist.entries:
            assert entry.index == self.last_index + 1, (entry.index, self.last_index)
            chain = chained(chain, entry.index, entry.term, content(entry))
            self._entries.append(entry)
            self.chains.append(chain)
            matching.appended(group, node, entry.index, entry.term, chain)

    def begin(self, entry: Entry, chain: int) -> None:
        """Hold the first entry of all, written before there was a machine."""
        assert self.last_index == 0, self.last_index
        self.hard_state = HardState(entry.term, "")
        self._entries.append(entry)
        self.chains.append(chain)

    def cut(self, first: int) -> None:
        """Drop the entries from index ``first`` on."""
        place = first - self.floor.index - 1
        del self._entries[place:], self.chains[place:]

    def trim(self, index: int) -> Floor:
        """Drop the entries up to ``index``, which stays as the floor."""
        term = self.term_at(index)
        assert term is not None, (index, self.floor, self.last_index)
        floor = Floor(index, term, self.configuration_at(index))
        chain, place = self.chain_at(index), index - self.floor.index
        del self._entries[:place], self.chains[:place]
        self.floor, self.floor_chain = floor, chain
        return floor

    def reset(self, floor: Floor, chain: int) -> None:
        """Begin behind ``floor``; entries after it that match stay."""
        if floor.index <= self.floor.index:
            return
        if self.term_at(floor.index) == floor.term:
            trimmed = self.trim(floor.index)
            assert trimmed == floor, (trimmed, floor)
            return
        self._entries, self.chains = [], []
        self.floor, self.floor_chain = floor, chain

    def copy(self) -> GroupLog:
        other = copy.copy(self)
        other._entries, other.chains = list(self._entries), list(self.chains)
        return other


def content(entry: Entry) -> bytes:
    """Return what of an entry its digest is of, index and term apart."""
    if entry.kind is EntryKind.CONFIGURATION:
        return repr((entry.configuration, entry.data)).encode()
    return b"%d" % entry.kind + entry.data


class Health(enum.Enum):
    GOOD = "good"
    SLOW = "slow"
    HUNG = "hung"
    FAILING = "failing"
    FULL = "full"


@dataclass
class Image:
    """What is on the platter: survives crashes, can be copied and put back."""

    boot: int = 0
    logs: dict[str, GroupLog] = field(default_factory=dict)
    states: dict[str, Registers] = field(default_factory=dict)

    def copy(self) -> Image:
        return Image(
            self.boot,
            {group: log.copy() for group, log in self.logs.items()},
            {group: state.copy() for group, state in self.states.items()},
        )


Transaction = list[tuple[str, Persist]]


class Disk:
    """One disk. ``write`` calls back with True when the transaction is durable, with False when it failed."""

    def __init__(self, schedule: Schedule, source: random.Random, latency_s: tuple[float, float]) -> None:
        self._schedule = schedule
        self._source = source
        self._latency_s = latency_s
        self.image = Image()
        self.health = Health.GOOD
        self.slow_s = 1.0
        self._under_way: tuple[Transaction, Callable[[bool], None], Timer | None] | None = None
        self._waiting: list[Callable[[], None]] = []

    def write(self, transaction: Transaction, done: Callable[[bool], None]) -> None:
        """Write and sync; one at a time."""
        assert self._under_way is None
        if self.health is Health.HUNG:
            self._under_way = transaction, done, None
            return
        shortest, longest = self._latency_s
        delay_s = shortest + (longest - shortest) * self._source.random()
        if self.health is Health.SLOW:
            delay_s += self.slow_s * self._source.random()
        timer = self._schedule.after(delay_s, self._finish)
        self._under_way = transaction, done, timer

    def _finish(self) -> None:
        assert self._under_way is not None
        transaction, done, _ = self._under_way
        if self.health is Health.HUNG:
            self._under_way = transaction, done, None
            return
        self._under_way = None
        done(self.health not in {Health.FAILING, Health.FULL})

    def when_it_answers(self, action: Callable[[], None]) -> None:
        """Do ``action`` now, or once the disk no longer hangs."""
        if self.health is Health.HUNG:
            self._waiting.append(action)
        else:
            action()

    def heal(self) -> None:
        """All is well again: what hung goes on."""
        self.health = Health.GOOD
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            self._schedule.after(0.0, action)
        if self._under_way is not None and self._under_way[2] is None:
            transaction, done, _ = self._under_way
            self._under_way = transaction, done, self._schedule.after(self._latency_s[0], self._finish)

    def power_cut(self) -> Transaction | None:
        """The process is gone. Return the transaction that was under way: whether it is there is chance's."""
        self._waiting.clear()
        if self._under_way is None:
            return None
        transaction, _, timer = self._under_way
        self._under_way = None
        if timer is not None:
            timer.cancel()
        return transaction
