"""Feed every decoder anything, for as long as is said: ``python -m tests.fuzz --seconds 600``.

Runs the tests that are marked ``fuzz`` with many examples, again and again with a new seed each time, until the time is
over or one fails. A failure prints the seed; ``--seed`` runs that round again.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to go on (default 600)")
    parser.add_argument("--seed", type=int, help="seed of the first round")
    parser.add_argument("arguments", nargs="*", help="for pytest: files, -k ...")
    parsed = parser.parse_args()
    until = time.monotonic() + parsed.seconds
    seed = parsed.seed if parsed.seed is not None else random.SystemRandom().randrange(2**32)
    rounds = 0
    environment = {**os.environ, "SRENGINE_HYPOTHESIS": os.environ.get("SRENGINE_HYPOTHESIS", "fuzz")}
    while rounds == 0 or time.monotonic() < until:
        sys.stdout.write(f"round {rounds}, seed {seed}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "fuzz", "-o", "faulthandler_timeout=0"]
        command += [f"--hypothesis-seed={seed}", *(parsed.arguments or ["tests"])]
        left = max(60.0, until - time.monotonic())
        try:
            ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=left)
        except subprocess.TimeoutExpired:
            break
        if ended.returncode != 0:
            sys.stdout.write(f"failed with seed {seed}\n")
            return 1
        rounds += 1
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
