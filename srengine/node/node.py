"""A node for programs and for the command line: `Node` in a thread of this process, `run_node` in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from srengine import errors
from srengine.node.interpreter import take_over_interpreter
from srengine.node.loop import loop_factory
from srengine.node.options import NodeOptions
from srengine.node.runtime import Runtime

if TYPE_CHECKING:
    from srengine.client import Client

START_TIMEOUT_S = 60.0


def run_node(options: NodeOptions, on_ready: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Run a node until SIGTERM or SIGINT, then drain and return. The process is the node's: signals, interpreter.

    ``on_ready`` gets the ready event once the node can serve. Raises why the node could not start or had to stop; must
    be called on the main thread.
    """
    with asyncio.Runner(loop_factory=loop_factory(options.checked().busy_poll_s)) as runner:
        runner.run(_run(options, on_ready))


async def _run(options: NodeOptions, on_ready: Callable[[dict[str, Any]], None] | None) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    node = Runtime(options)
    starting = asyncio.ensure_future(node.start())
    stopping = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        starting.result()
        take_over_interpreter()
        if on_ready is not None:
            on_ready(node.ready_event())
        ends: set[asyncio.Future[Any]] = {stopping, node.supervisor.failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if node.supervisor.failed.done():
            raise node.supervisor.failed.result()
    finally:
        stopping.cancel()
        await node.stop()


class Node:
    """A node inside this program, on an event loop of its own in a thread.

    Use as a context manager, or `start` and `stop`. ``on_state_change(old, new)`` may be set before `start`; it is
    called on the node's thread with INIT, LEADER, FOLLOWER, OBSERVER or UNKNOWN.
    """

    def __init__(self, options: NodeOptions) -> None:
        self.options = options.checked()
        self.on_state_change: Callable[[str, str], None] | None = None
        self.state = "INIT"
        self._runtime: Runtime | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start, and return when the node is ready; raises why it is not (`TimedOut` after ``timeout_s``)."""
        if self._thread is not None:
            raise errors.Conflict("the node was started already")
        self._thread = threading.Thread(target=self._main, name=f"srengine-node-{self.options.name}", daemon=True)
        self._thread.start()
        if not self._started.wait(timeout_s):
            self.stop()
            raise errors.TimedOut(f"{self.options.name} was not ready in {timeout_s} s")
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def stop(self) -> None:
        """Drain and stop; a second call does nothing."""
        loop, stop = self._loop, self._stop
        if self._thread is None:
            return
        if loop is not None and stop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)
        self._thread.join()

    def client(self) -> Client:
        """Return a client of the cluster that asks this node first."""
        from srengine.client import connect

        if self._runtime is None:
            raise errors.NotReady("the node is not running")
        return connect(self._runtime.ports.addresses["client"])

    @property
    def address(self) -> str:
        """Real client address; `NotReady` before `start`."""
        if self._runtime is None:
            raise errors.NotReady("the node is not running")
        return self._runtime.ports.addresses["client"]

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory(self.options.busy_poll_s)) as runner:
                runner.run(self._run())
        except errors.Error as error:
            self._error = error
        finally:
            self._change("UNKNOWN")
            self._started.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        runtime = Runtime(self.options)
        starting = asyncio.ensure_future(runtime.start())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                return
            starting.result()
            self._runtime = runtime
            runtime.supervisor.spawn(self._follow_role(runtime), "tell the role")
            self._started.set()
            ends: set[asyncio.Future[Any]] = {stopping, runtime.supervisor.failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if runtime.supervisor.failed.done():
                raise runtime.supervisor.failed.result()
        finally:
            stopping.cancel()
            await runtime.stop()
            self._runtime = None

    async def _follow_role(self, runtime: Runtime) -> None:
        roles = runtime.coordination.roles
        while True:
            roles.changed.clear()
            self._change(roles.role.value)
            await roles.changed.wait()

    def _change(self, state: str) -> None:
        before, self.state = self.state, state
        if before != state and self.on_state_change is not None:
            self.on_state_change(before, state)
