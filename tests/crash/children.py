"""Child processes of the fault tests: a piece of Python in a process of its own, with the recorder preloaded.

A child prints one JSON value as its last line (`told`); how it ended is its return code, negative for a signal.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.crash import record

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import ctypes, json, os, sys
from pathlib import Path
from srengine import errors, storage
from srengine.storage import fences, files, pages
def tell(value):
    sys.stdout.write(json.dumps(value) + "\\n")
    sys.stdout.flush()
def break_from_now(kind, code, at=1, count=1, delay_ms=0):
    ctypes.CDLL(None).recorder_break(kind, ctypes.c_long(at), ctypes.c_long(count), ctypes.c_long(code),
                                     ctypes.c_long(delay_ms))
def events():
    function = ctypes.CDLL(None).recorder_events
    function.restype = ctypes.c_long
    return function()
def code_of(action):
    try:
        action()
    except errors.Error as error:
        return error.code
    return None
ANY, WRITE, SYNC, META = 0, 1, 2, 3
"""


@contextlib.contextmanager
def small_file_system(mount: Path, size: str = "2m") -> Iterator[Path]:
    """Mount a small tmpfs (root alone may); skips the test where that is not possible."""
    mount.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


class Ended(NamedTuple):
    """How a child ended and every line that it told."""

    code: int
    lines: list[Any]
    errors: str

    @property
    def told(self) -> Any:
        """The last line; fails with what the child wrote to stderr when there is none."""
        assert self.lines, f"exit code {self.code}: {self.errors}"
        return self.lines[-1]


def run(source: str | tuple[str, ...], *arguments: object, library: Path | None = None, **settings: object) -> Ended:
    """Run ``source`` (or several pieces of it) in a child; ``settings`` are the recorder's (SRENGINE_<NAME>)."""
    if library is not None:
        environment = record.recording_environment(library, **settings)
    else:
        environment = record.plain_environment(**settings)
    pieces = (source,) if isinstance(source, str) else source
    finished = subprocess.run(
        [sys.executable, "-c", PRELUDE + "".join(map(textwrap.dedent, pieces)), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    return Ended(finished.returncode, lines, finished.stderr)
