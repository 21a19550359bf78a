"""The replicated log with three nodes in three processes on loopback: one write at a time, and many at once."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from benchmarks import machine
from benchmarks.settings import ROOT
from benchmarks.table import Row

SIZE = 256
CLIENTS = 32
START_S = 30.0


class Node:
    """One `benchmarks.driving` process."""

    def __init__(self, number: int, directory: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.driving", str(number), str(directory)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, line: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def ask(self, *command: object) -> Any:
        assert self._process.stdout is not None
        self.tell(command)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        if self._process.poll() is None:
            self.tell(["end"])
        self._process.communicate(timeout=START_S)


class Group:
    """Three of them, with a leader."""

    def __init__(self, directory: Path) -> None:
        self._nodes = [Node(number, directory / str(number)) for number in range(3)]
        ports = free_ports(3)
        for node in self._nodes:
            node.tell(ports)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.end()

    def leader(self) -> Node:
        deadline = time.monotonic() + START_S
        while True:
            leading = [node for node in self._nodes if node.ask("role") == "leader"]
            if leading:
                return leading[0]
            assert time.monotonic() < deadline, "nobody leads"
            time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def bench_log_writes(
    benchmark: Any, report: Callable[[Row], None], scratch: Path, disk: machine.Disk, sizes: Any
) -> None:
    """Propose at the leader: the time of one write at a time, and the rate of 32 clients."""
    count = min(2000, sizes.records // 50)
    with Group(scratch) as group:
        leader = group.leader()
        leader.ask("sequential", 200, SIZE)
        taken = benchmark.pedantic(lambda: sorted(leader.ask("sequential", count, SIZE)), rounds=1, iterations=1)
        total = leader.ask("clients", CLIENTS, 5 * count, SIZE)
    median, late = statistics.median(taken), taken[int(len(taken) * 0.99)]
    syncs = median / disk.fsync_s
    report(
        Row(
            "one write of the log, 3 nodes, in fsyncs of this disk",
            None,
            syncs,
            f"median {median * 1e3:.2f} ms, p99 {late * 1e3:.2f} ms",
            f"{disk.fsync_s * 1e3:.2f} ms",
            note="Log of the leader, log of a follower, state machine: three durable steps one after another.",
        )
    )
    report(
        Row(
            f"writes of the log by {CLIENTS} clients, for each that one makes",
            None,
            5 * count / total * median,
            f"{5 * count / total:.0f}/s",
            f"{1 / median:.0f}/s",
            note="What comes while the disk works shares the next transaction.",
        )
    )
