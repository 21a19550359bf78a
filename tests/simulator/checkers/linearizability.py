"""Linearizability of registers: is there one order of all operations that explains what every client saw?

Wing and Gong's search (1993) with Lowe's improvements (Testing for linearizability, 2017), as in his and in Horn and
Kroening's tools: the history is a linked list of calls and returns in order of time. An operation whose call stands
before the first return of the list may come next; it is taken out (*lifted*) with its return if the register allows
what it saw, and the search goes on with the rest. A return at the head of the list that nobody lifted is a dead end:
the last choice is taken back.

* *Memoised configurations*: a pair (set of lifted operations, value) that was there before leads nowhere new. The set
  is an integer whose leading run of ones is cut off, so it stays as short as operations overlap, however long the
  history is.
* *Partitioning*: a history is linearizable exactly when that of each register is (Herlihy and Wing, locality).
* An operation that was never answered may have happened at any time after its call, or never. One whose value nobody
  ever saw is left out: if there is an order with it, there is one without it. That keeps the search short after many
  timeouts. It needs every written value to be written once only, which `Operation`s of the simulator obey.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.simulator.checkers.violation import Violation


class Kind(enum.Enum):
    READ = "read"
    WRITE = "write"
    COMPARE = "compare and set"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on one register.

    ``invoked``, ``returned``: places in one order of all events of the history, no two equal; ``returned`` None: there
    was never an answer. ``expected``, ``value``: what a compare-and-set compares with; what it or a write puts there.
    ``seen``: what a read or a compare-and-set found (None: an empty register); it set ``value`` exactly when that is
    ``expected``.
    """

    client: str
    register: str
    kind: Kind
    invoked: int
    returned: int | None
    expected: int | None = None
    value: int | None = None
    seen: int | None = None

    def __str__(self) -> str:
        what = {
            Kind.READ: f"read -> {self.seen}",
            Kind.WRITE: f"write {self.value}",
            Kind.COMPARE: f"compare {self.expected}, set {self.value} -> saw {self.seen}",
        }[self.kind]
        return f"[{self.invoked:>6}, {'?' if self.returned is None else self.returned:>6}] {self.client}: {what}"


class _Place:
    """A place in the list: the call of an operation, or its return."""

    __slots__ = ("after", "before", "call", "number", "operation", "partner")

    def __init__(self, operation: Operation | None, number: int, *, call: bool) -> None:
        self.operation = operation
        self.number = number
        self.call = call
        self.partner: _Place | None = None
        self.before: _Place | None = None
        self.after: _Place | None = None


def check(history: Iterable[Operation]) -> None:
    """Raise a `Violation` that shows the history of a register for which there is no such order."""
    registers: dict[str, list[Operation]] = {}
    for operation in history:
        registers.setdefault(operation.register, []).append(operation)
    for register in sorted(registers):
        operations = sorted(registers[register], key=lambda operation: operation.invoked)
        explained = _search(_observable(operations))
        if explained is not None:
            shown = "\n  ".join(str(operation) for operation in operations[max(0, explained - 20) : explained + 12])
            raise Violation("linearizability", f"register {register}: no order explains\n  {shown}")


def _observable(operations: Sequence[Operation]) -> list[Operation]:
    """Leave out what was never answered and never seen."""
    kept = [operation for operation in operations if operation.returned is not None]
    open_ones = [o for o in operations if o.returned is None and o.kind is not Kind.READ]
    seen = {operation.seen for operation in kept}
    while True:
        found = [operation for operation in open_ones if operation.value in seen]
        if not found:
            break
        kept += found
        open_ones = [operation for operation in open_ones if operation.value not in seen]
        seen |= {operation.expected for operation in found}
    return sorted(kept, key=lambda operation: operation.invoked)


def _linked(operations: Sequence[Operation]) -> _Place:
    """Return the head of the list of all calls and returns."""
    places: list[tuple[int, _Place]] = []
    for number, operation in enumerate(operations):
        call = _Place(operation, number, call=True)
        places.append((operation.invoked, call))
        if operation.returned is not None:
            call.partner = _Place(operation, number, call=False)
            places.append((operation.returned, call.partner))
    places.sort(key=lambda pair: pair[0])
    head = last = _Place(None, -1, call=False)
    for _, place in places:
        last.after, place.before = place, last
        last = place
    return head


def _search(operations: Sequence[Operation]) -> int | None:
    """Return None when there is an order, else the number of the operation at which every order ends."""
    head = _linked(operations)
    unanswered = sum(operation.returned is not None for operation in operations)
    value: int | None = None
    base, lifted = 0, 0  # operations below base are lifted, and those in the bits of lifted above it
    seen: set[tuple[int, int, int | None]] = set()
    stack: list[tuple[_Place, int, int, int | None]] = []
    furthest = 0
    place = head.after
    while unanswered:
        if place is not None and place.call:
            allowed, following = _apply(place.operation, value)
            if allowed:
                new_base, new_lifted = base, lifted | 1 << (place.number - base)
                if new_lifted & 1:
                    ones = (~new_lifted & (new_lifted + 1)).bit_length() - 1
                    new_base, new_lifted = base + ones, new_lifted >> ones
                configuration = new_base, new_lifted, following
                if configuration not in seen:
                    seen.add(configuration)
                    stack.append((place, base, lifted, value))
                    base, lifted, value = configuration
                    _lift(place)
                    unanswered -= place.partner is not None
                    place = head.after
                    continue
            place = place.after
            continue
        # The end of the list, or a return that must not be passed.
        if place is not None:
            furthest = max(furthest, place.number)
        if not stack:
            return furthest
        place, base, lifted, value = stack.pop()
        _put_back(place)
        unanswered += place.partner is not None
        place = place.after
    return None


def _apply(operation: Operation | None, value: int | None) -> tuple[bool, int | None]:
    """Return whether the register, holding ``value``, allows what the operation saw, and what it holds then."""
    assert operation is not None
    if operation.kind is Kind.WRITE:
        return True, operation.value
    if operation.kind is Kind.READ:
        return operation.seen == value, value
    if operation.returned is not None and operation.seen != value:
        return False, value
    return True, operation.value if value == operation.expected else value


def _lift(place: _Place) -> None:
    for one in (place, place.partner):
        if one is not None:
            assert one.before is not None
            one.before.after = one.after
            if one.after is not None:
                one.after.before = one.before


def _put_back(place: _Place) -> None:
    # NB: in the reverse order of lifting: the neighbours of one may be the other.
    for one in (place.partner, place):
        if one is not None:
            assert one.before is not None
            one.before.after = one
            if one.after is not None:
                one.after.before = one
