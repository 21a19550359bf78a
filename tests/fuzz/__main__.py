"""Feed every decoder anything, for as long as is said: ``python -m tests.fuzz --minutes 20``.

Each file that has tests marked ``fuzz`` gets an equal share of the time. In its share those tests run with many
examples, again and again with a new seed each time, until the share is over; the run that is then under way is
interrupted, which is no failure. The first failure ends everything: it is printed with the seed, and ``--seed`` with
the file runs that round again. Where the time was not enough for one whole round of a file, some of its tests were not
reached; the line of the file says so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED_S_MAX = 60.0


def marked() -> list[str]:
    """Return the files with tests that are marked, as pytest wants them."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.fuzz" in path.read_text("utf-8"))
    return [path.relative_to(ROOT).as_posix() for path in files]


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(file: str, seed: int, seconds: float, more: list[str]) -> int | None:
    """Run one round of a file; return pytest's exit code, None when the time was over first."""
    with tempfile.TemporaryFile("w+") as said:
        code = _run(file, seed, seconds, more, said)
        if code not in {None, 0}:
            said.seek(0)
            say(said.read())
    return code


def _run(file: str, seed: int, seconds: float, more: list[str], said: IO[str]) -> int | None:
    environment = {**os.environ, "SRENGINE_HYPOTHESIS": "fuzz"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "fuzz", "-o", "faulthandler_timeout=0"]
    command += [f"--hypothesis-seed={seed}", file, *more]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
    )
    try:
        return child.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(INTERRUPTED_S_MAX)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return None
    except BaseException:
        child.kill()
        child.wait()
        raise


def main() -> int:
    """Give each file its share; the exit code is 1 at the first failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to go on (default 20)")
    parser.add_argument("--seed", type=int, help="seed of the first round of each file")
    parser.add_argument("files", nargs="*", help="files or directories, in place of every file with a marked test")
    parser.add_argument("-k", dest="pattern", help="only tests whose name matches, as in pytest")
    parsed = parser.parse_args()
    wanted = [file for file in marked() if not parsed.files or any(file.startswith(name) for name in parsed.files)]
    if not wanted:
        parser.error("no file with a marked test is among these")
    first = parsed.seed if parsed.seed is not None else random.SystemRandom().randrange(2**32)
    more = ["-k", parsed.pattern] if parsed.pattern else []
    until = time.monotonic() + 60 * parsed.minutes
    for number, file in enumerate(wanted):
        share_until = time.monotonic() + (until - time.monotonic()) / (len(wanted) - number)
        rounds = 0
        while (left := share_until - time.monotonic()) > 0:
            code = run(file, first + rounds, left, more)
            if code is None:
                break
            if code != 0:
                say(f"{file}: failed with --seed {first + rounds}")
                return 1
            rounds += 1
        say(f"{file}: {rounds} whole rounds from seed {first}" + ("" if rounds else "; some tests were not reached"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
