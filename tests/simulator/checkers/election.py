"""Election safety: at most one node leads a group in a term (Raft, figure 3)."""

from __future__ import annotations

from tests.simulator.checkers.violation import Violation


class ElectionSafety:
    """Told of everybody who says that it leads, or speaks as only a leader may."""

    def __init__(self) -> None:
        self._leaders: dict[tuple[str, int], str] = {}

    def leads(self, group: str, term: int, node: str) -> None:
        """``node`` became leader of ``term``, or sent what only its leader sends."""
        first = self._leaders.setdefault((group, term), node)
        if first != node:
            raise Violation("election safety", f"group {group}, term {term}: both {first} and {node} lead")

    @property
    def elections(self) -> int:
        """How many terms had a leader, over all groups."""
        return len(self._leaders)
