"""Run many seeds: ``python -m tests.simulator --seed 0 --seeds 10000``, or ``make sim SEED=0 SEEDS=10000``.

Each failure is printed with its seed, the commit and the command that plays it again; with one seed alone, ``--trace``
shows everything that happens. ``--breakage NAME`` breaks the machine on purpose (``--breakages`` lists how);
``--regime NAME`` leaves it whole and plays in the regime in which that breakage is looked for.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.simulator.breakages import BREAKAGES, NONE
from tests.simulator.story import Failure
from tests.simulator.workers import one, results

ROOT = Path(__file__).resolve().parents[2]


def revision() -> str:
    """Return the commit that is checked out, marked when files were changed since."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def told(failure: Failure, parsed: argparse.Namespace) -> str:
    """Return what a failure prints."""
    options = [
        f'--{option} "{name}"' for option in ("breakage", "regime") if (name := getattr(parsed, option)) != NONE.name
    ]
    broken = f" ARGS='{' '.join(options)}'" if options else ""
    last = "\n    ".join(failure.last)
    return (
        f"seed {failure.seed} at commit {revision()} failed\n  {failure}\n  the last of its trace:\n    {last}\n"
        f"  play it again: make sim SEED={failure.seed} SEEDS=1{broken}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--breakage", default=NONE.name, choices=[NONE.name, *BREAKAGES], metavar="NAME")
    parser.add_argument("--regime", default=NONE.name, choices=[NONE.name, *BREAKAGES], metavar="NAME")
    parser.add_argument("--breakages", action="store_true", help="list the breakages and end")
    parser.add_argument("--hunt", action="store_true", help="for each breakage, find the first seed that finds it")
    parser.add_argument("--trace", action="store_true", help="print everything that happens (one seed)")
    parser.add_argument("--keep-going", action="store_true", help="run all seeds though one failed")
    parsed = parser.parse_args()
    if parsed.breakages:
        for breakage in BREAKAGES.values():
            sys.stdout.write(f"{breakage.name}: {breakage.text}\n")
        return 0
    if parsed.hunt:
        return hunt(parsed)
    if parsed.trace:
        return traced(parsed)
    return many(parsed)


def traced(parsed: argparse.Namespace) -> int:
    """Run one seed and show all of it."""
    result = one((parsed.seed, parsed.breakage, parsed.regime), show=lambda line: sys.stdout.write(line + "\n"))
    if isinstance(result, Failure):
        sys.stdout.write(told(result, parsed) + "\n")
        return 1
    sys.stdout.write(f"{result}\n")
    return 0


def hunt(parsed: argparse.Namespace) -> int:
    """For one breakage or all of them, run seeds until one fails."""
    names = [parsed.breakage] if parsed.breakage != NONE.name else list(BREAKAGES)
    missed = 0
    for name in names:
        began = time.process_time()
        for seed in range(parsed.seed, parsed.seed + parsed.seeds):
            result = one((seed, name, NONE.name))
            if isinstance(result, Failure):
                text = str(result).splitlines()[0][:110]
                sys.stdout.write(f"{name}: seed {seed}, {time.process_time() - began:.0f} s: {result.rule}: {text}\n")
                break
        else:
            missed += 1
            sys.stdout.write(f"{name}: not found, {time.process_time() - began:.0f} s\n")
        sys.stdout.flush()
    return 1 if missed else 0


def many(parsed: argparse.Namespace) -> int:
    """Run seeds, in several processes if there is more than one seed."""
    began = time.monotonic()
    tasks = ((seed, parsed.breakage, parsed.regime) for seed in range(parsed.seed, parsed.seed + parsed.seeds))
    totals: collections.Counter[str] = collections.Counter()
    faults: collections.Counter[str] = collections.Counter()
    healed = [0.0]
    failed: list[int] = []
    jobs = max(1, min(parsed.jobs, parsed.seeds))
    for result in results(tasks, parsed.seeds, jobs):
        if isinstance(result, Failure):
            failed.append(result.seed)
            sys.stdout.write(told(result, parsed) + "\n")
            sys.stdout.flush()
            if not parsed.keep_going:
                break
            continue
        totals.update(
            seeds=1,
            steps=result.steps,
            elections=result.elections,
            applied=result.applied,
            acknowledged=result.acknowledged,
            answered=result.answered,
        )
        faults.update(dict(result.faults))
        healed.append(result.healed_s)
        if totals["seeds"] % 100 == 0:
            sys.stdout.write(f"{totals['seeds']} seeds, {time.monotonic() - began:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(
        f"seeds {parsed.seed} to {parsed.seed + parsed.seeds - 1} at commit {revision()}: {totals['seeds']} passed, "
        f"{len(failed)} failed {failed[:20]}, {time.monotonic() - began:.0f} s in {jobs} processes\n"
        f"  {totals['steps']} steps, {totals['elections']} elections, {totals['applied']} entries, "
        f"{totals['acknowledged']} acknowledged writes, {totals['answered']} operations checked\n"
        f"  longest heal {max(healed):.1f} s; faults: "
        + ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
        + "\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
