"""The event loop of a node: it waits busily for what is about to come, and asleep for everything else.

A node answers in a few hundred microseconds and then waits as long for the next message, for a follower, for its
disk. To put the processor to sleep and to wake it again takes a tenth of that each time, and a write meets it again
and again on its way. So the loop looks for a moment (`BUSY_S`) whether something has come before it sleeps; between two
looks it yields its processor, and no lock is held. It does so only if the wait before took no longer
than that: a node that is idle sleeps, and one under load may use a processor of its own::

    wait    |--- 0.2 ms ---| |- 0.3 -| |------ 40 ms ------| |------ 40 ms ------| |- 0.2 -|
            asleep           busy      busy, then asleep     asleep                asleep

Where a control group bounds the processor time of this process, busy waits would be paid for with pauses later, so
there are none by default. Busy polling is a term of the field (epoll(7), NAPI); the same is done by runtimes that keep
a thread spinning before they park it.
"""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from srengine._native import poll as kernel

BUSY_S: Final = 0.001
"""About as long as a node waits while others work on the same write, shorter than between heartbeats."""
BUSY_S_MAX: Final = 0.01


def new_event_loop(busy_s: float | None = None) -> asyncio.AbstractEventLoop:
    """Return an event loop that waits busily for up to ``busy_s``; 0: never, None: `default_busy_s`.

    Without epoll (not Linux) it is asyncio's own.
    """
    wanted = default_busy_s() if busy_s is None else busy_s
    if not wanted or not hasattr(select, "epoll"):
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(BusySelector(wanted))


def loop_factory(busy_s: float | None = None) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return `new_event_loop` for `asyncio.Runner`."""
    return partial(new_event_loop, busy_s)


def waits_of(loop: asyncio.AbstractEventLoop) -> tuple[int, int] | None:
    """Return how often an event loop has slept and how often it has waited busily; None for one that is not ours."""
    selector = getattr(loop, "_selector", None)
    if not hasattr(select, "epoll") or not isinstance(selector, BusySelector):
        return None
    return selector.poller.sleeps, selector.poller.busy_waits


def default_busy_s(root: Path = Path("/")) -> float:
    """Return `BUSY_S`, or 0 where the processor time of this process is bounded. ``root``: where proc and sys are."""
    return 0.0 if _has_quota(root) else BUSY_S


def _has_quota(root: Path) -> bool:
    """Whether a control group of this process, or one above it, has a quota of processor time (cgroups(7), v1 and v2).
    What cannot be read counts as none.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, name = root / "sys/fs/cgroup", "cpu.max"
        elif "cpu" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/cpu", "cpu.cfs_quota_us"
        else:
            continue
        group = path.strip("/").split("/")
        for depth in range(len(group), -1, -1):
            quota = _read(base.joinpath(*group[:depth], name)).split()
            if quota and quota[0] not in {"max", "-1"}:
                return True
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


if hasattr(select, "epoll"):

    class BusySelector(selectors.EpollSelector):
        """A selector whose waits are busy at first; see the module."""

        def __init__(self, busy_s: float) -> None:
            super().__init__()
            self.poller = kernel.Poller(self.fileno(), busy_s)
            self._registered: dict[int, selectors.SelectorKey] = {}

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            """See `selectors.BaseSelector.register`."""
            key = super().register(fileobj, events, data)
            self._registered[key.fd] = key
            return key

        def unregister(self, fileobj: Any) -> selectors.SelectorKey:
            """See `selectors.BaseSelector.unregister`."""
            key = super().unregister(fileobj)
            del self._registered[key.fd]
            return key

        def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            """See `selectors.BaseSelector.modify`."""
            key = super().modify(fileobj, events, data)
            self._registered[key.fd] = key
            return key

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            """See `selectors.BaseSelector.select`."""
            ready = []
            for descriptor, mask in self.poller.wait(-1.0 if timeout is None else max(timeout, 0.0)):
                key = self._registered.get(descriptor)
                if key is not None:
                    events = 0
                    if mask & ~select.EPOLLIN:
                        events |= selectors.EVENT_WRITE
                    if mask & ~select.EPOLLOUT:
                        events |= selectors.EVENT_READ
                    ready.append((key, events & key.events))
            return ready
