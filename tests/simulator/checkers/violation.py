"""What every checker raises."""

from __future__ import annotations


class Violation(AssertionError):
    """A promise is broken. ``rule`` is the checker's name for it, the rest says how."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule
