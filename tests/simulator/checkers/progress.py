"""Progress: when nothing fails any more, a leader is there and new writes are committed within a bound (liveness)."""

from __future__ import annotations

from collections.abc import Iterable

from tests.simulator.checkers.violation import Violation


class Progress:
    """Told when the last fault ended and what is waited for; asked whether it came in time."""

    def __init__(self, bound_s: float) -> None:
        self.bound_s = bound_s
        self._healed_s: float | None = None
        self._waiting: dict[str, float] = {}

    def healed(self, now_s: float, what: Iterable[str]) -> None:
        """From ``now_s`` on nothing fails; each of ``what`` must be reached within the bound."""
        self._healed_s = now_s
        self._waiting = dict.fromkeys(what, now_s)

    def reached(self, what: str, now_s: float) -> float:
        """``what`` came; return how long it took."""
        assert self._healed_s is not None
        self._waiting.pop(what, None)
        return now_s - self._healed_s

    @property
    def done(self) -> bool:
        """Whether everything came."""
        return self._healed_s is not None and not self._waiting

    def look(self, now_s: float) -> None:
        """Complain when the bound is over and something is missing."""
        if self._healed_s is not None and self._waiting and now_s > self._healed_s + self.bound_s:
            raise Violation(
                "progress", f"{self.bound_s:g} s after everything was healed there is no {', '.join(self._waiting)}"
            )
