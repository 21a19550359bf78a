"""Which processes are accepted: restarts, wiped, restored and doubled nodes."""

from __future__ import annotations

import pytest

from srengine import limits
from srengine.ha.roster_machine import Hello, Process, RosterMachine, Verdict

SILENT = limits.CONTACT_S + 0.1


def hello(boot: int, nonce: str, *, node: str = "id-3", copied: bool = False) -> Hello:
    return Hello("node-3", Process(node, boot, nonce), copied)


@pytest.mark.parametrize(
    ("second", "after_s", "verdict"),
    [
        (hello(5, "a"), 0.1, Verdict.ACCEPTED),
        (hello(6, "b"), 0.1, Verdict.ACCEPTED),
        (hello(6, "b", copied=True), 0.1, Verdict.DUPLICATE),
        (hello(6, "b", copied=True), SILENT, Verdict.ACCEPTED),
        (hello(6, "a"), 0.1, Verdict.ACCEPTED),
        (hello(6, "a", copied=True), 0.1, Verdict.ACCEPTED),
        (hello(4, "a", copied=True), 0.1, Verdict.STALE_BOOT),
        (hello(5, "b"), 0.1, Verdict.DUPLICATE),
        (hello(5, "b"), SILENT, Verdict.STALE_BOOT),
        (hello(2, "b"), SILENT, Verdict.STALE_BOOT),
        (hello(1, "b", node="id-4"), 0.1, Verdict.DUPLICATE),
        (hello(1, "b", node="id-4"), SILENT, Verdict.ACCEPTED),
    ],
)
def test_verdicts(second: Hello, after_s: float, verdict: Verdict) -> None:
    """F12, F13, F14: the table of the module, row by row."""
    roster = RosterMachine([])
    assert roster.hear(hello(5, "a"), 10.0).verdict is Verdict.ACCEPTED
    judged = roster.hear(second, 10.0 + after_s)
    assert judged.verdict is verdict
    if verdict is Verdict.STALE_BOOT:
        assert judged.highest == 5


def test_what_was_seen_survives_a_restart() -> None:
    """The highest process is handed out to be persisted once, and a roster made of it knows."""
    first = RosterMachine([])
    judged = first.hear(hello(5, "a"), 0.0)
    assert judged.persist == Process("id-3", 5, "a")
    assert first.hear(hello(5, "a"), 1.0).persist is None
    second = RosterMachine([("node-3", Process("id-3", 5, "a"))])
    assert second.hear(hello(5, "a"), 0.0).verdict is Verdict.ACCEPTED
    assert second.hear(hello(4, "z"), SILENT).verdict is Verdict.STALE_BOOT
    assert second.seen("node-3") == Process("id-3", 5, "a")


def test_a_replaced_process_is_told_so() -> None:
    """F21: a process that stood still while its successor was accepted is refused when it wakes."""
    roster = RosterMachine([])
    roster.hear(hello(5, "a"), 0.0)
    roster.hear(hello(6, "b"), 1.0)
    assert roster.hear(hello(5, "a"), 1.1).verdict is Verdict.DUPLICATE
    assert roster.hear(hello(5, "a"), 1.0 + SILENT).verdict is Verdict.STALE_BOOT


def test_contact_ends() -> None:
    """A node counts as reachable for CONTACT_S after its last question; refused ones never."""
    roster = RosterMachine([])
    assert not roster.alive("node-3", 0.0)
    roster.hear(hello(5, "a"), 0.0)
    assert roster.alive("node-3", limits.CONTACT_S)
    assert not roster.alive("node-3", SILENT)
    roster.hear(hello(4, "z"), SILENT)
    assert not roster.alive("node-3", SILENT)


def test_learning_from_answers() -> None:
    """A leader's process is new when its boot number is higher than any seen of its id."""
    roster = RosterMachine([])
    assert roster.learn("node-1", Process("id-1", 3, "a"))
    assert not roster.learn("node-1", Process("id-1", 3, "a"))
    assert not roster.learn("node-1", Process("id-1", 2, "b"))
    assert roster.seen("node-1") == Process("id-1", 3, "a")
    assert roster.learn("node-1", Process("id-9", 1, "c"))
    assert roster.seen("node-1") == Process("id-9", 1, "c")
