"""Where a scan stands: a page of each tablet, merged in key order.

    tablet 0   [b d f]…        everything up to the least last key of the tablets that have more behind their page
    tablet 1   [a c]…     ->   is certainly next: a b c, then the page after c is read
    tablet 2   [e g]  done

A page is checked before it is used: in order, inside what was asked, not empty unless it is the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Final

from srengine import errors
from srengine.client import messages

_KEY_OF_PAIR: Final = itemgetter(0)


@dataclass(slots=True)
class Cursor:
    """Where a scan stands in one tablet."""

    tablet: int
    request: messages.Scan
    pairs: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Read, but not yet handed out; in the order of the scan."""
    done: bool = False
    """Nothing is left behind ``pairs``."""
    start: bytes | None = None
    stop: bytes | None = None

    def __post_init__(self) -> None:
        self.start, self.stop = self.request.start, self.request.stop

    def take(self, pairs: list[tuple[bytes, bytes]], *, done: bool) -> None:
        """Add a page and move behind its last key; `FrameError` when it is not in order or outside what was asked."""
        keys = [key for key, _ in pairs]
        ascending = keys[::-1] if self.request.reverse else keys
        if not keys:
            wrong = not done
        else:
            wrong = (
                any(low >= high for low, high in pairwise(ascending))
                or (self.start is not None and ascending[0] < self.start)
                or (self.stop is not None and ascending[-1] >= self.stop)
            )
        if wrong:
            raise errors.FrameError(
                "a page of a scan is empty, out of order, or outside what was asked", tablet=self.tablet
            )
        self.pairs = pairs
        self.done = done
        if keys and self.request.reverse:
            self.stop = keys[-1]
        elif keys:
            self.start = keys[-1] + b"\0"


def merge(cursors: list[Cursor], *, reverse: bool) -> list[tuple[bytes, bytes]]:
    """Take from all cursors what is certainly next: up to the nearest end of a page that has a successor."""
    ends = [cursor.pairs[-1][0] for cursor in cursors if not cursor.done]
    end = None if not ends else max(ends) if reverse else min(ends)
    page: list[tuple[bytes, bytes]] = []
    for cursor in cursors:
        if end is None:
            page += cursor.pairs
            cursor.pairs = []
            continue
        count = sum(1 for key, _ in cursor.pairs if (key >= end if reverse else key <= end))
        page += cursor.pairs[:count]
        cursor.pairs = cursor.pairs[count:]
    page.sort(key=_KEY_OF_PAIR, reverse=reverse)
    return page


def half_open(start: bytes | None, stop: bytes | None, prefix: bytes | None) -> tuple[bytes | None, bytes | None]:
    """Return the half-open range that fulfils all three."""
    for bound in (start, stop, prefix):
        if bound is not None and type(bound) is not bytes:
            raise TypeError(f"start, stop and prefix are bytes, not {type(bound).__name__}")
    if prefix:
        end = prefix.rstrip(b"\xff")
        after = end[:-1] + bytes([end[-1] + 1]) if end else None
        start = prefix if start is None else max(start, prefix)
        if after is not None:
            stop = after if stop is None else min(stop, after)
    return start or None, stop


def check_limit(limit: int | None) -> int | None:
    """Return ``limit`` if it is None or a whole number from 0; `InvalidValue` otherwise."""
    if limit is not None and (type(limit) is not int or limit < 0):
        raise errors.InvalidValue(f"limit is {limit!r}; it is a whole number from 0, or None")
    return limit
