"""Tasks of a node: all under one roof, so that a node is never half alive.

A task that ends by an exception nobody expected ends the node: it is logged with its trace, and `Supervisor.failed` is
set. This is the one place that catches everything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from srengine import errors

_logger = logging.getLogger(__name__)


class Supervisor:
    """Starts tasks and looks after them."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[errors.Error] = asyncio.get_running_loop().create_future()
        """Done when the node must stop, with the reason."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` as a task until `stop`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def fail(self, error: errors.Error) -> None:
        """Stop the node because of ``error``."""
        if not self.failed.done():
            self.failed.set_result(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None or self._stopping:
            return
        _logger.critical("task %r failed, the node stops", task.get_name(), exc_info=error)
        self.fail(
            error
            if isinstance(error, errors.Error)
            else errors.Error(f"task {task.get_name()!r} failed: {type(error).__name__}: {error}")
        )

    async def stop(self) -> None:
        """Cancel all tasks and wait for their end."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
