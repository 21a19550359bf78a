"""Real nodes as child processes: start, wait for the ready line, stop, kill by process id, look at what they said.

Every wait is for a condition (a line arrived, the process ended) with a generous deadline; nothing sleeps in place of a
condition, and only processes that were started here are ever signalled.

Example::

    with Nodes(tmp_path, 3) as nodes:
        nodes.start_all()  # bootstraps, waits for all ready lines
        nodes["node-3"].kill()
        nodes["node-3"].start().wait_ready()
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
COMMAND = [sys.executable, "-m", "srengine", "node", "start"]
ROOT = Path(__file__).resolve().parent.parent

_handed_out: set[int] = set()


def free_ports(count: int = 3) -> int:
    """Return P such that P, P+1, ... P+count-1 are free on loopback now (a node uses three: client, peer, bulk).

    They lie below the kernel's ephemeral range, so that no outgoing connection takes them in between, and in the share
    of this worker of pytest-xdist: another one must not take them while the node they are meant for does not run.
    """
    chooser = random.SystemRandom()
    ports = _share(range(10_000, 32_000))
    while True:
        first = chooser.randrange(ports.start, ports.stop - count)
        wanted = range(first, first + count)
        if _handed_out.intersection(wanted):
            continue
        with contextlib.ExitStack() as stack:
            try:
                for port in wanted:
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _handed_out.update(wanted)
        return first


def _share(ports: range) -> range:
    """Return the part of the ports that is this worker's."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # One that takes the place of another has a number beyond.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    return ports[len(ports) * worker // workers : len(ports) * (worker + 1) // workers]


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Return the first true value of ``condition()``; raise AssertionError that names ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}; last value {value!r}")
        pause.wait(0.02)


class NodeProcess:
    """One ``srengine node start`` in its own process, restartable on the same directory and ports."""

    def __init__(self, name: str, data: Path, port: int, arguments: Sequence[str] = ()) -> None:
        self.name = name
        self.data = data
        self.port = port
        self.address = f"tcp://127.0.0.1:{port}"
        self.arguments = list(arguments)
        self.before: list[str] = []
        """What stands before the command, to start it elsewhere."""
        self.environment: dict[str, str] = {}
        """Of the process, beyond this one's."""
        self.log = data.with_name(data.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader: threading.Thread | None = None

    def start(self, *more: str) -> Self:
        """Start the process; does not wait (see `wait_ready`)."""
        assert self.process is None or self.process.poll() is not None, (self.name, "is running")
        command = [*self.command(), *more]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment
            )
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True)
        self._reader.start()
        return self

    def command(self) -> list[str]:
        """Return the words that start it."""
        command = [*self.before, *COMMAND, "--name", self.name, "--data", str(self.data), "--listen", self.address]
        return [*command, *self.arguments]

    @staticmethod
    def _read(process: subprocess.Popen[bytes], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                lines.put(line.decode())
        lines.put(None)

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Return the ready event; AssertionError with the end of the log when the process ends or time runs out."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.name} was not ready in {timeout_s} s\n{self.log_tail()}") from None
            if line is None:
                raise AssertionError(f"{self.name} ended with {self.wait()} before it was ready\n{self.log_tail()}")
            with contextlib.suppress(json.JSONDecodeError):
                event: dict[str, Any] = json.loads(line)
                if event.get("event") == "ready":
                    return event

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name that it has told since the last call, without waiting; others are dropped."""
        found = []
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                with contextlib.suppress(json.JSONDecodeError):
                    event: dict[str, Any] = json.loads(line)
                    if event.get("event") == name:
                        found.append(event)
        return found

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to this very process."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.alive:
            self.signal(signal.SIGKILL)
        self.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        if self.alive:
            self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Return the exit code of the process when it ends by itself."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        if self._reader is not None:
            self._reader.join(timeout_s)
        return code

    def log_tail(self, bytes_max: int = 4000) -> str:
        """Return the end of what the node wrote to stderr."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[-bytes_max:].decode(errors="replace")


class Nodes:
    """``count`` nodes node-1 .. node-N of one cluster under ``directory``; whatever still runs is killed at the end."""

    def __init__(
        self, directory: Path, count: int = 3, *, cluster: str = "test", arguments: Sequence[str] = ()
    ) -> None:
        names = [f"node-{number}" for number in range(1, count + 1)]
        ports = {name: free_ports() for name in names}
        self.initial = ",".join(f"{name}=tcp://127.0.0.1:{ports[name]}" for name in names)
        common = ["--cluster", cluster, "--initial", self.initial, *arguments]
        self.nodes = {name: NodeProcess(name, directory / name, ports[name], common) for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            if node.process is not None:
                if node.alive:
                    node.go_on()
                node.kill()

    def __getitem__(self, name: str) -> NodeProcess:
        return self.nodes[name]

    def __iter__(self) -> Iterator[NodeProcess]:
        return iter(self.nodes.values())

    @property
    def endpoints(self) -> str:
        """All client addresses, as ``--endpoint`` takes them."""
        return ",".join(node.address for node in self)

    def start_all(self) -> Self:
        """Start all and wait until each says that it is ready."""
        for node in self:
            node.start()
        for node in self:
            node.wait_ready()
        return self
