"""Whether a node may vote after a start: one line a rule of `srengine.ha.claims_machine`."""

from __future__ import annotations

import pytest

from srengine.ha.claims_machine import Answer, Claim, ClaimsMachine, Verdict, Voters
from srengine.types import NodeId

A, B, C, D = (NodeId(letter * 32) for letter in "abcd")
OWN = Claim(boot_number=7, term=5, last_index=100)
COPIED = Claim(boot_number=7, term=5, last_index=100, copied=True)


def same(node: NodeId, *, trusted: bool = True) -> Answer:
    return Answer(node, 7, 5, 100, trusted)


def judged(claim: Claim, others: tuple[NodeId, ...], *answers: Answer) -> Verdict:
    machine = ClaimsMachine(claim)
    machine.step(Voters(others))
    for answer in answers:
        machine.step(answer)
    return machine.verdict


@pytest.mark.parametrize(
    ("claim", "others", "answers", "verdict"),
    [
        pytest.param(OWN, (), (), Verdict.TRUSTED, id="the only voter asks nobody"),
        pytest.param(OWN, (A, B), (), Verdict.WAITING, id="nobody answered"),
        pytest.param(OWN, (A, B), (same(A),), Verdict.TRUSTED, id="of three: one is enough"),
        pytest.param(OWN, (A, B, C, D), (same(A),), Verdict.WAITING, id="of five: one is not enough"),
        pytest.param(OWN, (A, B, C, D), (same(A), same(C)), Verdict.TRUSTED, id="of five: two are"),
        pytest.param(OWN, (A,), (Answer(A, 0, 0, 0),), Verdict.TRUSTED, id="who remembers nothing has nothing against"),
        pytest.param(OWN, (A, B), (Answer(A, 8, 5, 100),), Verdict.BELOW, id="a later start was seen"),
        pytest.param(OWN, (A, B), (Answer(A, 7, 6, 100),), Verdict.BELOW, id="a higher term was promised"),
        pytest.param(OWN, (A, B), (Answer(A, 7, 5, 101),), Verdict.BELOW, id="an entry was acknowledged that is gone"),
        pytest.param(OWN, (A, B), (same(C),), Verdict.WAITING, id="who is no voter does not count"),
        pytest.param(COPIED, (A, B), (same(A),), Verdict.WAITING, id="copied: one answer is not enough"),
        pytest.param(COPIED, (A, B), (same(A), same(B)), Verdict.BELOW, id="copied: catches up with the majority"),
        pytest.param(
            COPIED, (A, B), (same(A), same(B, trusted=False)), Verdict.TRUSTED, id="copied as most: nobody knows better"
        ),
        pytest.param(
            COPIED,
            (A, B),
            (Answer(A, 7, 5, 101, trusted=False), same(B, trusted=False)),
            Verdict.BELOW,
            id="copied as all, but another holds more",
        ),
        pytest.param(COPIED, (), (), Verdict.TRUSTED, id="the only voter, copied: there is nobody to prove it"),
    ],
)
def test_verdict(claim: Claim, others: tuple[NodeId, ...], answers: tuple[Answer, ...], verdict: Verdict) -> None:
    """F14: a node votes only when the others' memory says that its directory forgot nothing."""
    assert judged(claim, others, *answers) is verdict


def test_without_a_configuration_nothing_is_decided() -> None:
    """A node whose log is empty knows no voters: it waits, whoever answers."""
    machine = ClaimsMachine(OWN)
    machine.step(same(A))
    assert machine.verdict is Verdict.WAITING
    assert machine.unanswered == ()


def test_trust_is_final_and_told_once() -> None:
    """Who was trusted stays so for this run; the verdict leaves in one `Effects`, an alarm with it when it is due."""
    machine = ClaimsMachine(COPIED)
    machine.step(Voters((A, B)))
    machine.step(same(A, trusted=False))
    assert machine.drain().verdict is None
    assert machine.unanswered == (B,)
    machine.step(same(B, trusted=False))
    told = machine.drain()
    assert told.verdict is Verdict.TRUSTED
    assert "only 0 of 3 voters are what they were" in told.alarm
    machine.step(Answer(A, 9, 9, 999))
    assert machine.drain().verdict is None
    assert machine.verdict is Verdict.TRUSTED


def test_below_becomes_trusted_no_more_by_answers() -> None:
    """Once an answer remembered more, answers that do not cannot outvote it."""
    assert judged(OWN, (A, B, C), Answer(A, 8, 5, 100), same(B), same(C)) is Verdict.BELOW


def test_what_an_intact_voter_holds_must_win() -> None:
    """F14: most directories were put back: votes are given back, with an alarm, for whom holds all that any voter was
    found to hold; in all other cases the log of each voter is enough.
    """
    machine = ClaimsMachine(COPIED)
    machine.step(Voters((A, B)))
    machine.step(Answer(A, 7, 5, 100, trusted=False, held=(5, 90)))
    machine.step(Answer(B, 7, 5, 100, trusted=True, held=(6, 80)))
    effects = machine.drain()
    assert effects.verdict is Verdict.TRUSTED
    assert "only 1 of 3 voters" in effects.alarm
    assert effects.held == (6, 80)
    whole = ClaimsMachine(OWN)
    whole.step(Voters((A, B)))
    whole.step(Answer(A, 7, 5, 100, held=(6, 80)))
    assert whole.drain().held == (0, 0)
