"""The garbage collector of a process that is nothing but a node."""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 20_000
"""Objects made before the youngest are looked through, instead of 700: some megabytes of what is garbage by then."""


def collect_rarely() -> None:
    """Leave alone what is there by now, and look for garbage less often.

    A node makes thousands of short-lived objects for each request and hardly any circle of them; looking for circles
    took a twentieth of its processor time. For a process of our own only: the collector is the whole program's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
