"""State machine safety: no two nodes apply different entries at one index (Raft, figure 3), none is left out, and the
states that come out of it are equal (H27).
"""

from __future__ import annotations

from tests.simulator.checkers.violation import Violation


class StateMachineSafety:
    """Told of every application. Keeps the agreed history of each group: what was applied at each index first."""

    def __init__(self) -> None:
        self._applied: dict[tuple[str, int], tuple[int, int, str]] = {}
        self._states: dict[tuple[str, int], tuple[int, str]] = {}
        self.newest: dict[str, int] = {}

    def applied(self, group: str, node: str, before: int, index: int, term: int, content: int) -> bool:
        """``node``, whose state was at ``before``, applied (``term``, digest ``content``) at ``index``. True: first."""
        if index != before + 1:
            raise Violation("state machine safety", f"group {group}: {node} applied {index} after {before}")
        key = group, index
        known = self._applied.get(key)
        if known is None:
            self._applied[key] = (term, content, node)
            self.newest[group] = max(index, self.newest.get(group, 0))
            return True
        if known[:2] != (term, content):
            raise Violation(
                "state machine safety",
                f"group {group}: at {index} {known[2]} applied an entry of term {known[0]}, {node} another of {term}",
            )
        return False

    def state(self, group: str, node: str, index: int, digest: int) -> None:
        """The state of ``node`` at ``index`` has this digest."""
        known = self._states.setdefault((group, index), (digest, node))
        if known[0] != digest:
            raise Violation(
                "state machine safety", f"group {group}: the states of {known[1]} and {node} differ at {index}"
            )

    def term_at(self, group: str, index: int) -> int | None:
        """Return the term of what was applied at ``index`` of ``group``."""
        known = self._applied.get((group, index))
        return None if known is None else known[0]
