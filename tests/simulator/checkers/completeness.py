"""Leader completeness: what is committed in a term is in the log of the leader of every later term (Raft, figure 3)."""

from __future__ import annotations

from collections.abc import Callable

from tests.simulator.checkers.violation import Violation


class LeaderCompleteness:
    """Told of every first application, which proves a commitment, and of every new leader.

    In which term an entry was committed is not seen from outside; the term of the node that applied it first is not
    below it, so comparing with that one accuses nobody wrongly. (A leader may be elected late for a term that the
    others have left: it need not hold what they committed since.)
    """

    def __init__(self) -> None:
        self._committed: dict[str, dict[int, tuple[int, int]]] = {}

    def committed(self, group: str, index: int, term: int, seen_in_term: int) -> None:
        """The entry (``index``, ``term``) was applied, first by a node whose term was ``seen_in_term``."""
        known = self._committed.setdefault(group, {})
        if index not in known:
            known[index] = (term, seen_in_term)

    def leads(self, group: str, node: str, term: int, floor: int, term_at: Callable[[int], int | None]) -> None:
        """``node`` became leader of ``term``; ``term_at`` looks into its log, which begins behind ``floor``."""
        for index, (entry_term, seen_in_term) in reversed(self._committed.get(group, {}).items()):
            if index <= floor:
                break
            if seen_in_term < term and term_at(index) != entry_term:
                raise Violation(
                    "leader completeness",
                    f"group {group}: {node} leads term {term} and has {term_at(index)} at {index}, where an entry of "
                    f"term {entry_term} was committed by term {seen_in_term}",
                )
