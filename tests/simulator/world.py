"""Everything of one seed together: hosts, network, judges; and what they need of each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor
from srengine.types import NodeId
from tests.simulator.appliers import MetadataRegisters
from tests.simulator.breakages import NONE, Breakage
from tests.simulator.checkers.acknowledged import Acknowledged
from tests.simulator.checkers.application import StateMachineSafety
from tests.simulator.checkers.completeness import LeaderCompleteness
from tests.simulator.checkers.election import ElectionSafety
from tests.simulator.checkers.epochs import Epochs
from tests.simulator.checkers.matching import START, LogMatching, chained
from tests.simulator.disk import content
from tests.simulator.host import Host
from tests.simulator.machines import open_machine
from tests.simulator.network import Network
from tests.simulator.process import Process
from tests.simulator.regime import Regime
from tests.simulator.registers import Registers
from tests.simulator.schedule import Schedule
from tests.simulator.trace import Trace


class Judges:
    """The checkers that look at every step."""

    def __init__(self) -> None:
        self.election = ElectionSafety()
        self.matching = LogMatching()
        self.completeness = LeaderCompleteness()
        self.application = StateMachineSafety()
        self.epochs = Epochs()
        self.acknowledged = Acknowledged()


class World:
    """One seed's nodes. ``show`` gets every line of the trace;"""

    def __init__(
        self,
        seed: int,
        *,
        regime: Regime,
        breakage: Breakage = NONE,
        show: Callable[[str], object] | None = None,
    ) -> None:
        self.seed = seed
        self.breakage = breakage
        self.schedule = Schedule()
        self.trace = Trace(self.schedule, show)
        self.regime = regime
        self.judges = Judges()
        self._state_kind: type[Registers] = MetadataRegisters if self.regime.metadata else Registers
        if breakage.reuses_epochs or breakage.repeats_requests:
            broken = {"repeats_requests": breakage.repeats_requests, "reuses_epochs": breakage.reuses_epochs}
            self._state_kind = type("Registers", (Registers,), {"__slots__": (), **broken})
        self.network = Network(self.schedule, random.Random(f"{seed} network"), replace(self.regime.weather))
        self.groups = [f"g{number}" for number in range(self.regime.groups)]
        self.hosts: dict[str, Host] = {}
        self.on_leader: Callable[[Host], object] | None = None
        """Called with the host of the next leader of any group, once."""
        self._names: dict[str, str] = {}
        self._digests: dict[int, tuple[Entry, int]] = {}
        for number in range(self.regime.hosts):
            host = Host(self, "abcdefghi"[number])
            self.hosts[host.name] = host
            self.welcome(host)
        self._bootstrap(random.Random(f"{seed} bootstrap"))

    def _bootstrap(self, source: random.Random) -> None:
        """The first voters of each group begin with the same first entry (index 1, term 1)."""
        for group in self.groups:
            chosen = sorted(source.sample([host.id for host in self.hosts.values()], self.regime.voters))
            first = Entry(1, 1, EntryKind.CONFIGURATION, b"", Configuration(tuple(chosen)))
            chain = chained(START, 1, 1, content(first))
            for voter in chosen:
                host = self.host_of(voter)
                assert host is not None
                host.log(group).begin(first, chain)
                self.judges.matching.appended(group, voter, 1, 1, chain)

    # --- who is where ------------------------------------------------------------------------------------------------

    def welcome(self, host: Host) -> None:
        """A node with this id can be reached at the host."""
        self._names[host.id] = host.name

    def forget(self, host: Host) -> None:
        """The node with this id is gone for ever."""
        del self._names[host.id]

    def host_of(self, node: str) -> Host | None:
        """Return the host of a node, None when it was wiped."""
        name = self._names.get(node)
        return None if name is None else self.hosts[name]

    # --- the network -------------------------------------------------------------------------------------------------

    def send(self, process: Process, target: str, messages: tuple[Any, ...]) -> None:
        """Send what one turn says to one node."""
        name = self._names.get(target)
        if name is None:
            return
        host, node = self.hosts[name], target

        def deliver(_name: str, frame: tuple[Any, ...]) -> None:
            # Hello names the node: another one on the same machine does not get it.
            if host.process is not None and host.id == node:
                kinds = " ".join(f"{type(message).__name__}{message.term}" for message in frame)
                self.trace.note(f"{process.id}>{node} {kinds}")
                host.process.receive(frame)

        self.network.send(process.host.name, name, messages, deliver)

    def answers(self, host: Host, node: str) -> bool:
        """Whether ``host`` would get an answer of ``node`` now."""
        other = self.host_of(node)
        return other is not None and other.running and self.network.connected(host.name, other.name)

    def hints(self, host: Host) -> None:
        """The process at ``host`` ended: its connections close, which its peers see soon if they see it at all."""
        gone = host.id
        for peer in self.hosts.values():
            if peer is not host and peer.process is not None and self.network.connected(peer.name, host.name):
                peer.process.later(0.001, lambda process=peer.process: process.hint(gone))

    # --- states ------------------------------------------------------------------------------------------------------

    def open_machine(self, process: Process, group: str) -> Any:
        """Return the machine of a group that starts."""
        return open_machine(process, group, self.breakage)

    def new_state(self) -> Registers:
        """Return the state of a group before its first entry."""
        return self._state_kind()

    def floor_of(self, state: Registers) -> Floor:
        """Return the floor that stands for an applied state."""
        return Floor(state.index, state.term, state.configuration)

    def state_copy(self, host: Host, source: str, group: str, index: int) -> Registers | None:
        """Return a copy of the state of ``source``, None when it does not come or does not reach ``index``."""
        if not self.answers(host, source):
            return None
        other = self.host_of(source)
        assert other is not None
        state = other.state(group)
        return state.copy() if state.index >= index else None

    def digest(self, entry: Entry) -> int:
        """Return the digest of what an entry holds. Logs share entries, so most of them are looked at once."""
        known = self._digests.get(id(entry))
        if known is None or known[0] is not entry:
            known = entry, chained(0, entry.index, entry.term, content(entry))
            self._digests[id(entry)] = known
        return known[1]

    # --- what may be broken ------------------------------------------------------------------------------------------

    def may_harm(self, host: Host) -> bool:
        """Whether, with this node's disk harmed too, a majority of every group still has all that it promised."""
        harmed = {self.hosts[name].id for name in self.hosts if self._is_harmed(self.hosts[name])} | {host.id}
        return all(self.survives(group, one, harmed) for group in self.groups for one in self._in_force(group))

    def may_become(self, group: str, configuration: Configuration) -> bool:
        """Whether a majority of the configuration has all that it promised."""
        harmed = {host.id for host in self.hosts.values() if self._is_harmed(host)}
        return self.survives(group, configuration, harmed)

    def survives(self, group: str, configuration: Configuration, harmed: set[NodeId]) -> bool:
        """Whether less than half of the voters are wiped or harmed."""
        lost = sum(voter in harmed or self.host_of(voter) is None for voter in configuration.voters)
        return lost <= (len(configuration.voters) - 1) // 2 or not configuration.voters

    def _is_harmed(self, host: Host) -> bool:
        return any(log.suspect for log in host.disk.image.logs.values())

    def _in_force(self, group: str) -> list[Configuration]:
        """Return every configuration that is in force somewhere, or may be after a cut."""
        found: list[Configuration] = []
        for host in self.hosts.values():
            for configuration in host.log(group).configurations()[-2:]:
                if configuration not in found:
                    found.append(configuration)
            if host.process is not None:
                found += [one for one in host.process.proposed(group) if one not in found]
        return found
