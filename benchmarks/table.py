"""The one table at the end: rows, targets, verdicts.

A row compares ours with one reference. ``ratio`` is the median of the ratios of interleaved rounds (A B A B), never the
ratio of two medians of different moments: on a shared machine both sides of a round meet the same weather. A ratio is
"how many times the reference" of the quantity that the row names: throughput where more is better (``at least``), bytes
or time where less is better (``at most``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Better = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio must reach."""

    number: float
    better: Better = "at least"

    def __str__(self) -> str:
        """Show as in the table."""
        return f"{'>=' if self.better == 'at least' else '<='} {self.number:g}"

    def met(self, ratio: float) -> bool:
        """Return whether ``ratio`` reaches the target."""
        return ratio >= self.number if self.better == "at least" else ratio <= self.number


def at_least(number: float) -> Target:
    """Return a target for a quantity of which more is better."""
    return Target(number)


def at_most(number: float) -> Target:
    """Return a target for a quantity of which less is better."""
    return Target(number, "at most")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``ours`` and ``reference`` are values with their units, for people."""

    name: str
    target: Target | None
    ratio: float | None
    ours: str
    reference: str
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return pass, miss, reported (no target here) or the reason why there is no number."""
        if self.ratio is None:
            return "not run"
        if self.target is None:
            return "reported"
        return "pass" if self.target.met(self.ratio) else "MISS"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "target": None if self.target is None else str(self.target), "verdict": self.verdict}


ORDER = (
    "durable put_many, inserts / C loop",
    "durable put_many, overwrites / C loop",
    "durable put_many, inserts / py-lmdb",
    "digests",
    "get, warm / py-lmdb",
    "scan verifying",
    "snapshot written",
    "snapshot applied",
    "shipping",
    "write, ship, apply",
    "16 threads",
    "rejoin",
    "exchange",
    "journal",
    "one write of the log",
    "writes of the log",
    "durable put_many, inserts",
    "get, warm",
    "scan, warm",
)
"""How the names of the rows begin, in the order of the table: that of the targets' list, rivals last."""

HEADINGS = ("row", "target", "ratio", "ours", "reference", "verdict")


def place_in_table(row: Row) -> tuple[int, str]:
    """Return the sort key of a row."""
    places = [place for place, start in enumerate(ORDER) if row.name.startswith(start)]
    return (places[0] if places else len(ORDER), row.name)


def render(rows: Iterable[Row], *, markdown: bool = False) -> str:
    """Return the rows as an aligned table, for a terminal or for the README; notes follow under their numbers."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    notes: list[str] = []
    for row in sorted(rows, key=place_in_table):
        mark = ""
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            mark = f" ({notes.index(row.note) + 1})"
        lines.append(
            (
                row.name + mark,
                "-" if row.target is None else str(row.target),
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                row.ours,
                row.reference,
                row.verdict,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    edge, gap = ("| ", " | ") if markdown else ("", "  ")
    text = [edge + gap.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text = [line + " |" if markdown else line.rstrip() for line in text]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|" if markdown else "-" * len(max(text, key=len))
    text.insert(1, rule)
    if notes:
        text.append("")
        text += [f"({number}) {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(text)


def rate(count: float, seconds: float, unit: str) -> str:
    """Return a throughput in the prefix that reads best."""
    value = count / seconds
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}{unit}/s"
    return f"{value:.3g} {unit}/s"
