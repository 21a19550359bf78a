"""Real nodes as child processes of this one: start, wait until ready, kill, and leave nothing behind.

Each node runs ``python -m srengine node start`` in a session of its own, so that Ctrl-C reaches only us and the nodes
end in our order; should this process die, the kernel ends them (``--with-parent``). Only processes that were started
here are signalled, by the handle of the process, never by name.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from srengine import errors

READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 15.0
POLL_S: Final = 0.05
PORTS_PER_NODE: Final = 3
_PORTS: Final = range(20_000, 32_000)
"""Below the ephemeral ports of Linux, so that no outgoing connection takes one between asking and binding."""


class NodeProcess:
    """One node: its directory, its ports, and the process while there is one."""

    def __init__(self, name: str, data: Path, port: int, arguments: list[str]) -> None:
        self.name = name
        self.data = data
        self.address = f"tcp://127.0.0.1:{port}"
        self.log = data.with_name(f"{data.name}.log")
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    @property
    def pid(self) -> int | None:
        """Process id of the last start; None before it."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs now."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; `wait_ready` waits for it."""
        assert not self.alive, self.name
        command = [sys.executable, "-m", "srengine", "node", "start", "--with-parent", "--name", self.name]
        command += ["--data", str(self.data), "--listen", self.address, *self._arguments]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self._process = process
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(process, self._lines), daemon=True).start()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Return the ready event; `Error` with the node's last words when it ends first, or `TimedOut`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise errors.TimedOut(f"{self.name} was not ready in {timeout_s} s; see {self.log}") from None
            if line is None:
                assert self._process is not None
                code = self._process.wait()
                raise errors.Error(
                    f"{self.name} ended with code {code}: {self.last_words()}", node=self.name, code_of_node=code
                )
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == "ready":
                    return event

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._process is not None:
            if self.alive:
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def terminate(self) -> None:
        """Ask for an orderly end; `wait_end` waits for it."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)

    def wait_end(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait for the end; SIGKILL when it takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def last_words(self, bytes_max: int = 2000) -> str:
        """Return the end of what the node wrote to stderr."""
        try:
            return self.log.read_bytes()[-bytes_max:].decode("utf-8", "replace").strip() or "it said nothing"
        except FileNotFoundError:
            return "it said nothing"


class LocalCluster:
    """``count`` nodes node-1 … node-N on loopback, under one directory; ends them all when left, whatever happened.

    ``directory``: None makes a temporary one, which is removed at the end unless ``keep``.
    """

    def __init__(self, count: int, *, name: str, keep: bool = False, directory: Path | None = None) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"srengine-{name}-"))
        self.directory.chmod(0o700)
        self.keep = keep or directory is not None
        ports = dict(zip((f"node-{number}" for number in range(1, count + 1)), free_ports(count), strict=True))
        initial = ",".join(f"{node}=tcp://127.0.0.1:{port}" for node, port in ports.items())
        arguments = ["--cluster", name, "--initial", initial]
        self.nodes = {node: NodeProcess(node, self.directory / node, port, arguments) for node, port in ports.items()}

    @property
    def endpoints(self) -> str:
        """All client addresses, as ``--endpoint`` takes them."""
        return ",".join(node.address for node in self.nodes.values())

    def start(self) -> None:
        """Start all nodes and wait until each can serve."""
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_ready()

    def stop(self) -> None:
        """End all nodes, orderly if they can, and remove the directory unless it is to be kept."""
        # The first one leads: it finishes what was begun only while the others are still there to acknowledge it.
        for node in self.nodes.values():
            node.terminate()
            node.wait_end()
        if not self.keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A second Ctrl-C while we tidy up would leave nodes behind.
        with _uninterrupted():
            self.stop()


def free_ports(count: int) -> list[int]:
    """Return the first of three free neighbouring ports (client, peers, bulk) for each of ``count`` nodes."""
    found: list[int] = []
    start = _PORTS.start + time.time_ns() % (len(_PORTS) - PORTS_PER_NODE * count)
    candidates = iter([*range(start, _PORTS.stop), *range(_PORTS.start, start)])
    for first in candidates:
        if any(abs(first - other) < PORTS_PER_NODE for other in found):
            continue
        if all(_is_free(port) for port in range(first, first + PORTS_PER_NODE)):
            found.append(first)
            if len(found) == count:
                return found
    raise errors.Error("there are no free ports on loopback")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """Return the first true value of ``condition()``, asked repeatedly; `TimedOut` names what did not come true."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise errors.TimedOut(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it tidies up."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_lines(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
