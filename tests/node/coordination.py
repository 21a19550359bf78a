"""What tests of leadership and membership need: who leads, a writer that never stops, a node that joins."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from srengine import errors
from srengine.client import messages
from tests.node.cluster import Asker
from tests.processes import ROOT, NodeProcess, Nodes, free_ports, wait_for

REGISTERS = 1000
"""That a `Writer` uses: a cluster holds 4096."""


def agreed_leader(asker: Asker, nodes: Nodes, among: list[str] | None = None) -> str | None:
    """Return the leader when all living nodes (of ``among``) name the same living one, else None."""
    names = among or [node.name for node in nodes if node.alive]
    named = {asker.leader(nodes[name].address) for name in names}
    leader = next(iter(named))
    return leader if len(named) == 1 and leader in names else None


def wait_leader(asker: Asker, nodes: Nodes, among: list[str] | None = None, but: str = "") -> str:
    """Return the leader that all living nodes agree on, another one than ``but``."""

    def found() -> str | None:
        leader = agreed_leader(asker, nodes, among)
        return leader if leader != but else None

    leader: str = wait_for(found, "all living nodes name one leader", 60)
    return leader


def put_until_done(
    asker: Asker, addresses: Callable[[], list[str]], name: str, value: bytes, timeout_s: float = 60
) -> str:
    """Put a register at any of the addresses until one acknowledges; return it. Puts the same value, so a repeat that
    had an unknown outcome changes nothing.
    """

    def tried() -> str | None:
        for address in addresses():
            with contextlib.suppress(errors.Error):
                asker.put_register(address, name, value, timeout_s=3)
                return address
        return None

    found: str = wait_for(tried, f"somebody acknowledges {name}", timeout_s)
    return found


class Writer:
    """Puts numbers into registers w0, w1, …, around and around, one after the other in a thread, at whichever node
    answers. Each put demands the version that the last one of its register was acknowledged with, so an acknowledged
    one that is lost shows at once, also where a later one would have covered it.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.count = 0
        """Of puts that were acknowledged."""
        self.acknowledged: dict[str, messages.Register] = {}
        """The last one of each register."""
        self.failures = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with Asker() as asker:
                self._write(asker)
        except BaseException as error:
            self._error = error

    def _write(self, asker: Asker) -> None:
        while not self._stop.is_set():
            for node in self.nodes:
                if self._stop.is_set():
                    return
                try:
                    done = self._put(asker, node.address, f"w{self.count % REGISTERS}", b"%d" % self.count)
                except errors.Error:
                    self.failures += 1
                    continue
                self.acknowledged[done.name] = done
                self.count += 1
                break

    def _put(self, asker: Asker, address: str, name: str, value: bytes) -> messages.Register:
        before = self.acknowledged.get(name)
        expected = before.version if before is not None else 0
        try:
            version = asker.put_register(address, name, value, if_version=expected, timeout_s=2)
        except errors.Conflict:
            # An earlier try may have been done after all. What stands there is this value or something was lost.
            found = asker.register(address, name, timeout_s=2)
            assert found.value == value, (name, value, expected, found)
            return found
        return messages.Register(name, value, version)

    def wait_more(self, count: int) -> None:
        """Return when ``count`` more puts were acknowledged."""
        target = self.count + count
        wait_for(lambda: self._error is not None or self.count >= target, f"{count} more acknowledged", 60)

    def check(self, asker: Asker, address: str) -> None:
        """Every acknowledged register is there, or what the last put that was begun made of it."""
        for name, done in self.acknowledged.items():
            found = asker.register(address, name)
            last = (f"w{self.count % REGISTERS}", b"%d" % self.count)
            assert found == done or (name, found.value) == last, (found, done, last)


def command(address: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run ``srengine`` against one node."""
    return subprocess.run(
        [sys.executable, "-m", "srengine", "--endpoint", address, *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=timeout_s,
    )


@contextlib.contextmanager
def joiner(nodes: Nodes, directory: Path, name: str, ticket: str, *more: str) -> Iterator[NodeProcess]:
    """A further node that enters by ``--join`` at the first living one; killed at the end."""
    at = next(node for node in nodes if node.alive)
    arguments = ["--cluster", "test", "--join", at.address, "--ticket", ticket, *more]
    node = NodeProcess(name, directory / name, free_ports(), arguments)
    try:
        yield node
    finally:
        if node.process is not None:
            node.kill()


def rows_of(asker: Asker, address: str) -> dict[str, dict[str, Any]]:
    """Return the rows of the status by node."""
    return {row["name"]: row for row in asker.status(address)["nodes"]}
