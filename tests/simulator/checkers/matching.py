"""Log matching: two logs with an entry of the same index and term are equal up to it (Raft, figure 3).

Each place of each log carries a chained digest: of the digest before it and of its entry. Two logs are equal up to a
place exactly when the chains there are; so one look into one table checks every append against all logs ever written.
"""

from __future__ import annotations

from typing import Final

import xxhash

from tests.simulator.checkers.violation import Violation

START: Final = 0
"""The chain of an empty log."""


def chained(previous: int, index: int, term: int, content: bytes) -> int:
    """Return the chain at ``index`` whose entry is (``term``, ``content``), ``previous`` being the one before it."""
    head = b"%d:%d:%d:" % (previous, index, term)
    return xxhash.xxh3_128_intdigest(head + content)


class LogMatching:
    """Told of every entry that anybody writes into a log."""

    def __init__(self) -> None:
        self._chains: dict[tuple[str, int, int], tuple[int, str]] = {}

    def appended(self, group: str, node: str, index: int, term: int, chain: int) -> None:
        """``node`` wrote an entry of ``term`` at ``index``; ``chain`` is that of its log there."""
        known = self._chains.setdefault((group, index, term), (chain, node))
        if known[0] != chain:
            raise Violation(
                "log matching",
                f"group {group}: the logs of {known[1]} and {node} both have term {term} at {index} and differ before",
            )
