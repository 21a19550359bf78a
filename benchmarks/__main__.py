"""``python -m benchmarks``: build the reference loops, run the suite, print the table."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the benchmarks; the exit code is pytest's (a missed target is a line in the table, not a failure)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure srengine against its references."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="100 000 records in place of 1 000 000"
    )
    size.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="2 000 records: does it run at all?"
    )
    parser.add_argument("--directory", help="where the stores are made (default: build/ of the working copy)")
    parser.add_argument("--json", help="also write the table as JSON to this file")
    parser.add_argument("--markdown", help="also write the table as markdown to this file")
    parser.add_argument("-k", dest="pattern", help="run only the benchmarks whose name matches, as in pytest")
    arguments = parser.parse_args()
    environment = dict(os.environ)
    for name in ("size", "directory", "json", "markdown"):
        if getattr(arguments, name):
            environment[f"SRENGINE_BENCH_{name.upper()}"] = getattr(arguments, name)
    subprocess.run([sys.executable, str(HERE / "build.py")], check=True)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE)]
    if arguments.pattern:
        command += ["-k", arguments.pattern]
    return subprocess.run(command, check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
