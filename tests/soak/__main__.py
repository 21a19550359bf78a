"""Run the long stories: ``python -m tests.soak [STORY …]``, all without a name; prints a line for each."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak import stories

LEADER_S_MAX = 6.0
"""Three times the longest election time-out of a node's defaults."""
SLOWER_MAX = 2.0
ELECTION_S_MAX = 5.0


def check(right: bool, said: str) -> str:
    """Return what was seen; AssertionError with it when it is not right."""
    if not right:
        raise AssertionError(said)
    return said


def steady(terms: tuple[int, int]) -> str:
    before, after = terms
    return check(before == after, f"term {before} at the beginning, {after} at the end")


def leaders(path: Path, given: argparse.Namespace) -> str:
    taken = sorted(stories.leaders(path, given.leader_kills))
    said = f"written again after {statistics.median(taken):.2f} s (median), {taken[-1]:.2f} s (longest), none lost"
    return check(taken[-1] <= LEADER_S_MAX, said)


def kills(path: Path, given: argparse.Namespace) -> str:
    return f"{stories.kills(path, given.kills, given.seed)} entries acknowledged, none lost"


def idle(path: Path, given: argparse.Namespace) -> str:
    return steady(stories.calm(path, given.calm_s, load=False))


def loaded(path: Path, given: argparse.Namespace) -> str:
    return steady(stories.calm(path, given.calm_s, load=True))


def observers(path: Path, given: argparse.Namespace) -> str:
    seen = stories.observers(path, given.observers, given.calm_s, voters=5)
    said = f"{steady(seen.terms)}; written again {seen.election_s:.2f} s after the leader was killed"
    return check(seen.election_s < ELECTION_S_MAX, said)


def distant(path: Path, given: argparse.Namespace) -> str:
    seen = stories.distant(path, given.calm_s)
    said = f"{len(seen.far_s)} writes of {seen.round_trips:.2f} round trips; {steady(seen.terms)}"
    return check(round(seen.round_trips) == 1, said)


def join(path: Path, given: argparse.Namespace) -> str:
    seen = stories.join(path, given.backlog_mib, writes=500)
    said = f"{len(seen.joining_s)} writes until it counted, p99 {seen.slower:.2f} times that of before"
    return check(seen.slower < SLOWER_MAX, said)


def contend(path: Path, given: argparse.Namespace) -> str:
    return f"{stories.contend(path, given.contenders, given.rounds)} epochs won, by one contender each"


STORIES: dict[str, Callable[[Path, argparse.Namespace], str]] = {
    story.__name__: story for story in (leaders, kills, idle, loaded, observers, distant, join, contend)
}


def main() -> int:
    """Run each story in a directory of its own; return 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("stories", nargs="*", metavar="STORY", help=f"of {', '.join(STORIES)}")
    parser.add_argument("--leader-kills", type=int, default=100)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm-s", type=float, default=600.0)
    parser.add_argument("--observers", type=int, default=40)
    # The most that the agreed state may hold in registers: a joiner cannot lack more.
    parser.add_argument("--backlog-mib", type=int, default=230)
    parser.add_argument("--contenders", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    unknown = set(given.stories) - set(STORIES)
    if unknown:
        parser.error(f"there is no story {', '.join(sorted(unknown))}")
    failed = 0
    for name in given.stories or STORIES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                said = STORIES[name](Path(directory), given)
            except AssertionError as error:
                said, failed = f"FAILED: {error}", 1
        sys.stdout.write(f"{name}: {said} ({time.monotonic() - began:.0f} s)\n")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
