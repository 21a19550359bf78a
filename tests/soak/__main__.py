"""Run the long stories: ``python -m tests.soak [--kills N] [--calm-s S] [--observers N]``; prints a line for each."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak import stories


def main() -> int:
    """Run each story in a directory of its own; return 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm-s", type=float, default=600.0)
    parser.add_argument("--observers", type=int, default=40)
    given = parser.parse_args()

    def steady(terms: tuple[int, int]) -> str:
        before, after = terms
        if before != after:
            raise AssertionError(f"the term was {before} and became {after}")
        return f"term {after} all the time"

    todo: list[tuple[str, Callable[[Path], str]]] = [
        (
            f"{given.kills} kills",
            lambda path: f"{stories.kills(path, given.kills, given.seed)} entries acknowledged, none lost",
        ),
        (f"idle for {given.calm_s:g} s", lambda path: steady(stories.calm(path, given.calm_s, load=False))),
        (f"loaded for {given.calm_s:g} s", lambda path: steady(stories.calm(path, given.calm_s, load=True))),
        (
            f"{given.observers} observers for {given.calm_s:g} s",
            lambda path: steady(stories.observers(path, given.observers, given.calm_s)),
        ),
    ]
    failed = 0
    for name, story in todo:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                said = story(Path(directory))
            except AssertionError as error:
                said, failed = f"FAILED: {error}", 1
        sys.stdout.write(f"{name}: {said} ({time.monotonic() - began:.0f} s)\n")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
