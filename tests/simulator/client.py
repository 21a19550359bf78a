"""Clients: read and write registers wherever they think the leader is, and ask again, with the same request id, until
their patience ends. What they saw is the history that must be linearizable.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.simulator.checkers.linearizability import Kind, Operation
from tests.simulator.registers import Command, Outcome, Verb

if TYPE_CHECKING:
    from tests.simulator.world import World


@dataclass(slots=True)
class Call:
    """An operation that goes on. ``attempt`` grows with each asking: answers to older ones count as well. Once it is
    ``given_up`` none counts: its client is at the next one.
    """

    group: str
    register: str
    kind: Kind
    invoked: int
    request: bytes
    expected: int | None = None
    value: int | None = None
    returned: int | None = None
    seen: int | None = None
    asked_s: float = 0.0
    attempt: int = 0
    index: int = 0
    given_up: bool = False

    def operation(self, client: str) -> Operation:
        """Return it as the checker sees it."""
        return Operation(
            client,
            f"{self.group}/{self.register}",
            self.kind,
            self.invoked,
            self.returned,
            self.expected,
            self.value,
            self.seen,
        )


class Client:
    """One client: one operation after the other; one that is given up stays open in the history."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.calls: list[Call] = []
        self.stopped = False
        self._source = random.Random(f"{world.seed} client {name}")
        self.leaders: dict[str, str] = {}
        self._known: dict[tuple[str, str], int | None] = {}
        self._pause()

    def _pause(self) -> None:
        if not self.stopped:
            self.world.schedule.after(self.world.regime.think_s * 2 * self._source.random(), self._next)

    def _next(self) -> None:
        if self.stopped:
            return
        source = self._source
        group = source.choice(self.world.groups)
        register = f"r{source.randrange(self.world.regime.registers)}"
        kind = source.choices((Kind.READ, Kind.WRITE, Kind.COMPARE), self.world.regime.mix)[0]
        self.call(group, register, kind)

    def call(self, group: str, register: str, kind: Kind) -> Call:
        """Begin an operation."""
        number = self.world.schedule.moment()
        call = Call(group, register, kind, number, f"{self.name}.{number}".encode(), asked_s=self.world.schedule.now_s)
        if kind is not Kind.READ:
            call.value = number
        if kind is Kind.COMPARE:
            call.expected = self._known.get((group, register))
        self.calls.append(call)
        self._attempt(call, self.world.schedule.now_s + 3 * self.world.regime.patience_s)
        return call

    def _attempt(self, call: Call, until_s: float) -> None:
        if call.returned is not None:
            return
        world = self.world
        if world.schedule.now_s >= until_s:
            call.given_up = True
            self._pause()
            return
        call.attempt += 1
        attempt = call.attempt
        host = self.leaders.get(call.group)
        if host is None or self._source.random() < world.regime.roams:
            host = self._source.choice(list(world.hosts))
        settled = False

        def again(delay_s: float) -> None:
            nonlocal settled
            if not settled:
                settled = True
                world.schedule.after(delay_s, lambda: self._attempt(call, until_s))

        def answered(outcome: Outcome | None) -> None:
            # Over the way back; the answer may be lost like any frame.
            world.network.send(host, self.name, outcome, lambda _to, what: arrived(what))

        def arrived(outcome: Outcome | None) -> None:
            if outcome is None:
                if attempt == call.attempt and call.returned is None:
                    self.leaders.pop(call.group, None)
                    again(0.02 + 0.1 * self._source.random())
            elif call.returned is None and not call.given_up:
                self.leaders[call.group] = host
                self._return(call, outcome)

        world.network.send(self.name, host, call, lambda _to, _call: self._ask(host, call, answered))
        world.schedule.after(world.regime.patience_s * (0.5 + self._source.random()), lambda: forget(self))

        def forget(client: Client) -> None:
            if not settled and call.returned is None:
                client.leaders.pop(call.group, None)
                again(0.0)

    def _ask(self, host: str, call: Call, answered: Any) -> None:
        """The request arrived at the host."""
        process = self.world.hosts[host].process
        if process is None:
            answered(None)
        elif call.kind is Kind.READ:
            process.guarded(lambda: process.read(call.group, call.register, answered))
        else:
            verb = Verb.WRITE if call.kind is Kind.WRITE else Verb.COMPARE

            def make(epoch: int, proposer: str) -> Command:
                return Command(verb, epoch, proposer, call.request, call.register, call.expected, call.value)

            process.guarded(lambda: process.write(call.group, make, answered))

    def _return(self, call: Call, outcome: Outcome) -> None:
        call.returned = self.world.schedule.moment()
        call.seen, call.index = outcome.seen, outcome.index
        place = call.group, call.register
        if call.kind is Kind.WRITE or (call.kind is Kind.COMPARE and call.seen == call.expected):
            self._known[place] = call.value
        else:
            self._known[place] = call.seen
        self.world.trace.note(f"{self.name} {call.kind.value} {call.register} {call.value} {call.seen} @{call.index}")
        self._pause()
