"""No acknowledged entry is lost, and none takes effect twice (H11, F27)."""

from __future__ import annotations

from tests.simulator.checkers.violation import Violation


class Acknowledged:
    """Told of every acknowledgement that left for a client and of every effect that an entry had."""

    def __init__(self) -> None:
        self._acknowledged: dict[tuple[str, bytes], int] = {}
        self._effects: dict[tuple[str, bytes], int] = {}

    def acknowledged(self, group: str, request: bytes, index: int) -> None:
        """A client was told that its ``request`` took effect at ``index``."""
        known = self._acknowledged.setdefault((group, request), index)
        if known != index:
            raise Violation("acknowledged", f"group {group}: {request.hex()} acknowledged at {known} and at {index}")

    def effect(self, group: str, request: bytes, index: int) -> None:
        """The entry at ``index`` did what ``request`` asks; told once for each node that applies it."""
        known = self._effects.setdefault((group, request), index)
        if known != index:
            raise Violation("acknowledged", f"group {group}: {request.hex()} took effect at {known} and at {index}")

    def kept(self, group: str, node: str, applied: int) -> None:
        """At the end: ``node`` has applied up to ``applied``, which must hold everything that was acknowledged."""
        for (where, request), index in self._acknowledged.items():
            if where != group:
                continue
            if self._effects.get((where, request)) != index or index > applied:
                raise Violation(
                    "acknowledged",
                    f"group {group}: {request.hex()}, acknowledged at {index}, is not among the {applied} of {node}",
                )

    def newest(self, group: str) -> int:
        """Return the highest index that was acknowledged."""
        return max((index for (where, _), index in self._acknowledged.items() if where == group), default=0)

    @property
    def count(self) -> int:
        """How many requests were acknowledged."""
        return len(self._acknowledged)
