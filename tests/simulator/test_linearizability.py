"""The checker of linearizability, against histories that are known to be good and known to be bad."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.simulator.checkers.linearizability import Kind, Operation, check
from tests.simulator.checkers.violation import Violation


def write(client, invoked, returned, value, register="x"):
    return Operation(client, register, Kind.WRITE, invoked, returned, value=value)


def read(client, invoked, returned, seen, register="x"):
    return Operation(client, register, Kind.READ, invoked, returned, seen=seen)


def compare(client, invoked, returned, expected, value, seen, register="x"):
    return Operation(client, register, Kind.COMPARE, invoked, returned, expected=expected, value=value, seen=seen)


GOOD = {
    "nothing": [],
    "one after the other": [write("a", 1, 2, 7), read("b", 3, 4, 7)],
    "an empty register is read": [read("a", 1, 2, None), write("b", 3, 4, 7)],
    "a read during a write sees the old value": [write("a", 1, 10, 7), read("b", 2, 3, None)],
    "a read during a write sees the new value": [write("a", 1, 10, 7), read("b", 2, 3, 7)],
    "two reads during a write, old then new": [write("a", 1, 10, 7), read("b", 2, 3, None), read("b", 4, 5, 7)],
    "writes that overlap may come in any order": [
        write("a", 1, 10, 7),
        write("b", 2, 9, 8),
        read("c", 11, 12, 7),
        read("c", 13, 14, 7),
    ],
    "a write without an answer happened late": [
        write("a", 1, None, 7),
        read("b", 2, 3, None),
        read("b", 4, 5, 7),
    ],
    "a write without an answer never happened": [write("a", 1, None, 7), read("b", 2, 3, None), read("b", 4, 5, None)],
    "compare and set takes turns": [
        write("a", 1, 2, 1),
        compare("a", 3, 4, 1, 2, seen=1),
        compare("b", 5, 6, 1, 3, seen=2),
        read("c", 7, 8, 2),
    ],
    "two compare and set overlap and one wins": [
        write("a", 1, 2, 1),
        compare("a", 3, 6, 1, 2, seen=1),
        compare("b", 4, 5, 1, 3, seen=2),
    ],
    "a compare and set without an answer explains a value": [
        write("a", 1, 2, 1),
        compare("b", 3, None, 1, 2, seen=None),
        read("c", 4, 5, 2),
    ],
    "a chain of compare and set without answers explains a value": [
        write("a", 1, 2, 1),
        compare("b", 3, None, 1, 2, seen=None),
        compare("c", 4, None, 2, 3, seen=None),
        read("d", 5, 6, 3),
    ],
    "registers do not order each other": [
        write("a", 1, 10, 1, "x"),
        read("b", 2, 3, 1, "x"),
        read("b", 4, 5, None, "y"),
        write("a", 11, 12, 1, "y"),
    ],
    "an answer of the furthest first": [  # needs taking back: 8 first is a dead end
        write("a", 1, 20, 8),
        write("b", 2, 19, 9),
        read("c", 3, 4, 9),
        read("c", 5, 6, 8),
    ],
}

BAD = {
    "a stale read": [write("a", 1, 2, 1), write("a", 3, 4, 2), read("b", 5, 6, 1)],
    "a read of nothing after a write": [write("a", 1, 2, 1), read("b", 3, 4, None)],
    "a lost update": [
        write("a", 1, 2, 1),
        compare("a", 3, 6, 1, 2, seen=1),
        compare("b", 4, 5, 1, 3, seen=1),
    ],
    "an acknowledged write that is gone": [
        write("a", 1, 2, 1),
        write("b", 3, 4, 2),
        read("c", 5, 6, 2),
        read("c", 7, 8, 1),
    ],
    "new then old during one write": [write("a", 1, 10, 7), read("b", 2, 3, 7), read("b", 4, 5, None)],
    "two readers disagree on the order": [
        write("a", 1, 10, 7),
        write("b", 2, 11, 8),
        read("c", 12, 13, 7),
        read("d", 14, 15, 8),
    ],
    "a value from nowhere": [write("a", 1, 2, 1), read("b", 3, 4, 99)],
    "a value from the future": [read("b", 1, 2, 1), write("a", 3, 4, 1)],
    "a compare and set that saw what was overwritten": [
        write("a", 1, 2, 1),
        write("a", 3, 4, 2),
        compare("b", 5, 6, 1, 3, seen=1),
    ],
    "a write without an answer happened twice": [
        write("a", 1, None, 1),
        read("b", 2, 3, 1),
        write("b", 4, 5, 2),
        read("b", 6, 7, 2),
        read("b", 8, 9, 1),
    ],
    "one register of two": [
        write("a", 1, 2, 1, "x"),
        read("a", 3, 4, 1, "x"),
        write("a", 5, 6, 1, "y"),
        read("a", 7, 8, None, "y"),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_history_passes(name: str) -> None:
    """A history that one order explains is accepted."""
    check(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_history_is_found(name: str) -> None:
    """A history that no order explains is refused, and the message shows it."""
    with pytest.raises(Violation, match="no order explains") as caught:
        check(BAD[name])
    assert "write" in str(caught.value)


def explained_by_brute_force(operations: list[Operation]) -> bool:
    """Try every order of every choice of unanswered operations: the definition, word by word."""
    answered = [operation for operation in operations if operation.returned is not None]
    unanswered = [operation for operation in operations if operation.returned is None]
    for count in range(len(unanswered) + 1):
        for chosen in itertools.combinations(unanswered, count):
            for order in itertools.permutations([*answered, *chosen]):
                if _is_legal(order):
                    return True
    return False


def _is_legal(order: tuple[Operation, ...]) -> bool:
    value = None
    for place, operation in enumerate(order):
        if any(later.returned is not None and later.returned < operation.invoked for later in order[place + 1 :]):
            return False
        if operation.kind is Kind.WRITE:
            value = operation.value
            continue
        if operation.returned is not None and operation.seen != value:
            return False
        if operation.kind is Kind.COMPARE and value == operation.expected:
            value = operation.value
    return True


def small_history(source: random.Random) -> list[Operation]:
    """A few operations on one register that overlap and saw anything that was written."""
    count = source.randint(2, 6)
    places = source.sample(range(1, 100), 2 * count)
    operations = []
    for number in range(count):
        invoked, returned = sorted(places[2 * number : 2 * number + 2])
        seen = source.choice([None, *range(count)])
        expected = source.choice([None, *range(count)])
        kind = source.choice(list(Kind))
        operations.append(
            Operation(
                f"c{number}",
                "x",
                kind,
                invoked,
                returned if source.random() < 0.75 else None,
                expected=expected if kind is Kind.COMPARE else None,
                value=None if kind is Kind.READ else number,
                seen=None if kind is Kind.WRITE else seen,
            )
        )
    return operations


def test_small_histories_agree_with_brute_force() -> None:
    """On random small histories the search says what trying every order says."""
    source = random.Random(11)
    verdicts = [0, 0]
    for _ in range(1500):
        history = small_history(source)
        expected = explained_by_brute_force(history)
        verdicts[expected] += 1
        try:
            check(history)
        except Violation:
            found = False
        else:
            found = True
        assert found == expected, history
    assert min(verdicts) > 200, verdicts


def long_history(source: random.Random, count: int, clients: int) -> list[Operation]:
    """What clients would see of a correct register: every operation takes effect at one moment between call and
    return.
    """
    clock = itertools.count(1)
    value, written = None, itertools.count(1)
    busy: dict[str, list] = {}
    history = []
    while len(history) < count:
        name = f"c{source.randrange(clients)}"
        pending = busy.get(name)
        if pending is None:
            kind = source.choice(list(Kind))
            busy[name] = [kind, next(clock), False, None, None, None]
        elif not pending[2]:
            pending[2] = True
            if pending[0] is not Kind.WRITE:
                pending[5] = value
            if pending[0] is not Kind.READ:
                pending[4] = next(written)
            if pending[0] is Kind.COMPARE:
                pending[3] = source.choice([value, 0])
            if pending[0] is Kind.WRITE or (pending[0] is Kind.COMPARE and pending[3] == value):
                value = pending[4]
        else:
            kind, invoked, _, expected, new, seen = busy.pop(name)
            history.append(Operation(name, "x", kind, invoked, next(clock), expected, new, seen))
    return history


def test_long_history_is_checked_by_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 operations of six clients on one register take a few steps each, not a search without end."""
    from tests.simulator.checkers import linearizability

    history = long_history(random.Random(5), 20_000, 6)
    steps = itertools.count()
    original = linearizability._apply

    def counted(operation, value):
        assert next(steps) < 40 * len(history)
        return original(operation, value)

    monkeypatch.setattr(linearizability, "_apply", counted)
    check(history)
    # One stale read in the middle of it is found, as quickly.
    place = next(n for n in range(10_000, 20_000) if history[n].kind is Kind.READ)
    stale = next(o.value for o in history[:5_000] if o.kind is Kind.WRITE)
    old = history[place]
    history[place] = Operation(old.client, "x", Kind.READ, old.invoked, old.returned, seen=stale)
    steps = itertools.count()
    with pytest.raises(Violation):
        check(history)


def test_many_unanswered_operations_cost_nothing() -> None:
    """Hundreds of operations that were never answered and never seen do not make the search long."""
    history = [write(f"t{n}", 2 * n + 1, None, 1_000 + n) for n in range(400)]
    history += [compare(f"s{n}", 1_000 + n, None, 5_000 + n, 6_000 + n, None) for n in range(400)]
    history += [write("a", 2_000, 2_001, 1), read("b", 2_002, 2_003, 1)]
    check(history)
    with pytest.raises(Violation):
        check([*history, write("a", 2_004, 2_005, 2), read("b", 2_006, 2_007, 1)])
