"""Named places where a test may kill, stop or break the process: ``failpoints.hit("snapshot.chunk.written")``.

Off, as always outside tests, `hit` is a function that returns at once. The environment switches it on before the
process starts: ``SRENGINE_FAILPOINTS="snapshot.chunk.written=kill@3,tablet.committed=error"`` makes the third hit of
the first point a SIGKILL of the own process and the first hit of the second an `OSError` (EIO). Actions:

* ``kill``   SIGKILL to the own process: nothing is flushed, no handler runs
* ``exit``   leave at once with exit code 86
* ``stop``   SIGSTOP to the own process: a test continues it
* ``error``  raise ``OSError(EIO)``
* ``full``   raise ``OSError(ENOSPC)``
* ``hold``   the thread stands still while the file that ``SRENGINE_FAILPOINTS_HOLD`` names is there

``@n`` (default 1) is the hit that acts; earlier and later ones pass, but later ones of ``hold`` look for the file, too.
A test in the same process may use `armed`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACTIONS = ("kill", "exit", "stop", "error", "full", "hold")
_LOOK_S = 0.01


class _Points:
    """The armed points and how often each was hit."""

    def __init__(self, text: str) -> None:
        self.lock = threading.Lock()
        self.counts: dict[str, int] = {}
        self.plan: dict[str, tuple[str, int]] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, what = part.partition("=")
            action, _, number = what.partition("@")
            if action not in _ACTIONS or not name or (number and not number.isdigit()):
                message = f"failpoint {part!r} is not name=action[@n] with action one of {', '.join(_ACTIONS)}"
                raise ValueError(message)
            self.plan[name] = (action, int(number or 1))

    def hit(self, name: str) -> None:
        with self.lock:
            count = self.counts[name] = self.counts.get(name, 0) + 1
            action, number = self.plan.get(name, ("", 0))
        if count == number or (action == "hold" and count > number):
            _act(action, name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(86)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hold":
        while Path(os.environ["SRENGINE_FAILPOINTS_HOLD"]).exists():
            time.sleep(_LOOK_S)
    elif action == "error":
        raise OSError(errno.EIO, f"failpoint {name}")
    else:
        assert action == "full", action
        raise OSError(errno.ENOSPC, f"failpoint {name}")


_points = _Points(os.environ["SRENGINE_FAILPOINTS"]) if "SRENGINE_FAILPOINTS" in os.environ else None
"""None: no failpoint is armed."""


def hit(name: str) -> None:
    """Act if a test armed the point ``name``; otherwise return at once."""
    if _points is not None:
        _points.hit(name)


def planned(*names: str) -> bool:
    """Return whether a test armed one of the points."""
    return _points is not None and any(name in _points.plan for name in names)


@contextlib.contextmanager
def armed(text: str) -> Iterator[None]:
    """Arm points for the with-block, in this process (a test's); the text is that of ``SRENGINE_FAILPOINTS``."""
    global _points  # noqa: PLW0603  (the one switch of the process)
    before, _points = _points, _Points(text)
    try:
        yield
    finally:
        _points = before
