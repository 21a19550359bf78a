"""What is known of the health of one copy in this run: when it was read whole, what was found, what was repaired."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Repair:
    """One repair. ``path``: sketch, leaves, full, or record; ``bytes_moved`` both ways; ``at``: Unix seconds."""

    at: float
    path: str
    reason: str
    records: int
    bytes_moved: int
    rounds: int = 0


@dataclass(slots=True)
class Health:
    """``scrubbed_at``: Unix seconds when all records were last found to give the root, 0: never in this run.

    ``records``: read by the scrub under way, or by the last one; ``damages``: found in this run; ``repairs``: made in
    this run, the last of them in ``last``.
    """

    scrubbed_at: float = 0.0
    records: int = 0
    damages: int = 0
    repairs: int = 0
    last: Repair | None = field(default=None)

    def repaired(self, repair: Repair) -> None:
        """Note a repair."""
        self.repairs += 1
        self.last = repair
