"""May this node vote after a start? Decided from what the other voters remember of it, without I/O.

A vote and an acknowledgement are promises; a directory that was put back to an older state has forgotten some of them.
So a node that starts is not trusted: it says what it is (its *claim*: boot number, term, last index) to the other
voters, and each answers what it remembers::

    start --claim--> every other voter --Answer--> [ClaimsMachine] --TRUSTED--> votes, campaigns, counts
                                                        |
                                                        +--BELOW---> a learner until it has caught up

==============================================================  ===================================================
known                                                           verdict
==============================================================  ===================================================
an answer remembers more than the claim says                    BELOW: catch up first
directory not copied, half of the other voters (rounded up)     TRUSTED: with this node they are a majority, and
answered and remember no more                                   whoever promised after us is among them
directory copied or put back                                    as BELOW, however many answer; but see the next line
the same, every other voter answered, and the voters that       TRUSTED, with an alarm: nobody knows better, waiting
are what they were are no majority                              would be for ever; acknowledged entries may be gone.
                                                                Votes go to those alone who hold all that any voter
                                                                was found to hold: an intact one among them must win
anything else                                                   WAITING
==============================================================  ===================================================

The limit that stays (docs/decisions/0013-restored-disks.md): a volume that was put back whole, with its inodes, while
every voter that remembers more is down.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from srengine.types import NodeId


@dataclass(frozen=True, slots=True)
class Claim:
    """What this node says of itself. ``copied``: its directory was copied or put back to an older state."""

    boot_number: int
    term: int
    last_index: int
    copied: bool = False


@dataclass(frozen=True, slots=True)
class Voters:
    """The other voters of the journal's configuration, as this node's log has it; may change at any time."""

    others: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What another voter remembers of this node; zeros for nothing.

    ``trusted``: the answering directory is what it was. ``held``: (term, index) of the last entry of its own log.
    """

    node: NodeId
    boot_number: int
    term: int
    last_index: int
    trusted: bool = True
    held: tuple[int, int] = (0, 0)


Input = Voters | Answer


class Verdict(enum.Enum):
    """What follows from the answers so far."""

    WAITING = "waiting"
    TRUSTED = "trusted"
    BELOW = "below"


@dataclass(frozen=True, slots=True)
class Effects:
    """``verdict``: None: as it was. ``alarm``: empty when there is nothing that a person must see.

    ``held``: with TRUSTED, what a candidate must hold at least to get a vote, see the table.
    """

    verdict: Verdict | None = None
    alarm: str = ""
    held: tuple[int, int] = (0, 0)


class ClaimsMachine:
    """``step``, ``tick``, ``drain``; see the module's text. TRUSTED is final for this run."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.verdict = Verdict.WAITING
        self._others: tuple[NodeId, ...] | None = None
        """None: no configuration is known here yet, so there is nobody to vote with."""
        self._answers: dict[NodeId, Answer] = {}
        self._effects = Effects()

    def step(self, message: Input) -> None:
        """Take one input."""
        match message:
            case Voters(others):
                self._others = tuple(sorted(others))
            case Answer():
                self._answers[message.node] = message
        self._judge()

    def tick(self, now: float) -> None:
        """Let time pass: nothing depends on it here; who asks asks again by itself."""

    def drain(self) -> Effects:
        """Return what changed since the last call."""
        effects, self._effects = self._effects, Effects()
        return effects

    @property
    def unanswered(self) -> tuple[NodeId, ...]:
        """Return the other voters that have not answered yet, sorted."""
        return tuple(node for node in self._others or () if node not in self._answers)

    def _judge(self) -> None:
        if self.verdict is Verdict.TRUSTED or self._others is None:
            return
        answers = [self._answers[node] for node in self._others if node in self._answers]
        known_better = [answer for answer in answers if _knows_more(answer, self.claim)]
        voters = len(self._others) + 1
        if known_better:
            self._become(Verdict.BELOW)
        elif not self.claim.copied and len(answers) >= voters // 2:
            self._become(Verdict.TRUSTED)
        elif self.claim.copied and len(answers) == len(self._others):
            intact = sum(answer.trusted for answer in answers)
            if intact < voters // 2 + 1:
                self._become(
                    Verdict.TRUSTED,
                    f"only {intact} of {voters} voters are what they were and nobody remembers more: "
                    f"what only lost directories held is gone",
                    max((answer.held for answer in answers), default=(0, 0)),
                )
            else:
                self._become(Verdict.BELOW)

    def _become(self, verdict: Verdict, alarm: str = "", held: tuple[int, int] = (0, 0)) -> None:
        if verdict is not self.verdict:
            self.verdict = verdict
            self._effects = Effects(verdict, alarm, held)


def _knows_more(answer: Answer, claim: Claim) -> bool:
    return answer.boot_number > claim.boot_number or answer.term > claim.term or answer.last_index > claim.last_index
