"""Deliberate breakages: each one a bug that somebody could write. The simulator must find every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Breakage:
    """``machine``: changes a machine that was just made."""

    name: str
    text: str
    machine: Callable[[Any], None] | None = None
    sends_before_persist: bool = False
    trusts_restored: bool = False


NONE = Breakage("none", "nothing is broken")
BREAKAGES: dict[str, Breakage] = {}
