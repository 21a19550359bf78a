"""One thread that does one thing after another for an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

Job = Callable[[], object]
Done = Callable[[BaseException | None], None]


class Worker:
    """Runs jobs in a thread of its own, in order; each one's end is told on the loop.

    An executor would do the same with a future, a lock and a callback more for each job; a turn of the log is short
    enough to notice.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, done: Done) -> None:
        """Run ``job`` in the thread, then ``done`` on the loop, with what it raised or None."""
        self._jobs.put((job, done))

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            failure: BaseException | None = None
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (handed to the loop, which decides)
                failure = error
            try:
                self._loop.call_soon_threadsafe(done, failure)
            except RuntimeError:  # the loop is closed: nobody waits
                return

    def stop(self) -> None:
        """End the thread after what was submitted."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for its end, blocking; return whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
