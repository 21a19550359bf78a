"""Real etcd servers as child processes: started on free ports of loopback, stopped, killed, paused by process id.

Every wait is for a condition; only processes that were started here are ever signalled.

Example::

    with Etcd(tmp_path, 3) as etcd:
        etcd.servers[0].kill()
        etcd.urls  # for EtcdOptions
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.processes import free_ports, wait_for

START_S = 60.0
STOP_S = 30.0


class EtcdServer:
    """One etcd process, restartable on its directory and ports."""

    def __init__(self, name: str, directory: Path, port: int, arguments: Sequence[str] = ()) -> None:
        self.name = name
        self.data = directory / name
        self.log = directory / f"{name}.log"
        self.url = f"http://127.0.0.1:{port}"
        self.peer_url = f"http://127.0.0.1:{port + 1}"
        self.arguments = list(arguments)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start the process; `wait_healthy` waits."""
        assert not self.alive, (self.name, "is running")
        command = ["etcd", "--name", self.name, "--data-dir", str(self.data)]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self

    def healthy(self) -> bool:
        """Return whether it answers and knows a leader."""
        assert self.process is not None, self.name
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}\n{self.log_tail()}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return json.load(answer).get("health") == "true"
        except (OSError, urllib.error.URLError, json.JSONDecodeError):
            return False

    def wait_healthy(self) -> Self:
        """Return when it answers and knows a leader."""
        wait_for(self.healthy, f"{self.name} healthy; its log ends:\n{self.log_tail()}", START_S)
        return self

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self.process is not None
        if self.alive:
            self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        assert self.process is not None
        if self.alive:
            self.process.terminate()
        self.process.wait(STOP_S)

    def pause(self) -> None:
        """SIGSTOP."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def log_tail(self, bytes_max: int = 3000) -> str:
        return self.log.read_bytes()[-bytes_max:].decode(errors="replace") if self.log.exists() else ""


class Etcd:
    """``count`` servers of one etcd cluster below ``directory``; whatever still runs is killed at the end."""

    def __init__(self, directory: Path, count: int = 1, *, arguments: Sequence[str] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.servers = [
            EtcdServer(f"etcd-{number}", directory, free_ports(2), arguments) for number in range(1, count + 1)
        ]
        cluster = ",".join(f"{server.name}={server.peer_url}" for server in self.servers)
        for server in self.servers:
            server.arguments += ["--initial-cluster", cluster, "--initial-cluster-token", f"test-{cluster[-5:]}"]

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses for clients."""
        return tuple(server.url for server in self.servers)

    def start(self) -> Self:
        """Start all, wait until all are healthy."""
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_healthy()
        return self

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            if server.alive:
                with contextlib.suppress(OSError):
                    server.go_on()
                server.kill()
