"""Hosts with a router between them, as network namespaces: cuts of any direction between real processes.

::

    node-1 (10.77.1.2) --+
    node-2 (10.77.2.2) --+-- router: forwards, or drops what goes from one to another (a policy rule with a blackhole)
    node-3 (10.77.3.2) --+
    tests  (10.77.250.2)-+

A cut is silent, as a pulled cable is: nobody gets a reset. Needs root. Names and addresses exist in these namespaces
alone; `Network` removes them at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from tests.processes import NodeProcess, Nodes

CLIENT = "tests"
_CLONE_NEWNET = 0x40000000
_PORT = 7400


class Network:
    """One router and a host for each name, and one for the tests themselves."""

    def __init__(self, names: Iterable[str]) -> None:
        self._prefix = f"srx{secrets.token_hex(3)}"
        numbers = [*enumerate(names, 1), (250, CLIENT)]
        self.numbers = {name: number for number, name in numbers}
        self._made: list[str] = []
        self._cuts: dict[tuple[str, str], int] = {}
        self._preferences = itertools.count(100)

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _make(self) -> None:
        router = self._add("r")
        run_ip("-n", router, "link", "set", "lo", "up")
        run_in(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for number in self.numbers.values():
            host = self._add(str(number))
            run_ip("-n", host, "link", "set", "lo", "up")
            run_ip("link", "add", "up0", "netns", host, "type", "veth", "peer", "name", f"to{number}", "netns", router)
            run_ip("-n", host, "addr", "add", f"10.77.{number}.2/24", "dev", "up0")
            run_ip("-n", host, "link", "set", "up0", "up")
            run_ip("-n", router, "addr", "add", f"10.77.{number}.1/24", "dev", f"to{number}")
            run_ip("-n", router, "link", "set", f"to{number}", "up")
            run_ip("-n", host, "route", "add", "default", "via", f"10.77.{number}.1")

    def _add(self, what: str) -> str:
        name = f"{self._prefix}-{what}"
        run_ip("netns", "add", name)
        self._made.append(name)
        return name

    def _remove(self) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._made.clear()

    # --- hosts -------------------------------------------------------------------------------------------------------

    def namespace(self, name: str) -> str:
        """Return the name of a host's namespace."""
        return f"{self._prefix}-{self.numbers[name]}"

    def host(self, name: str) -> str:
        """Return a host's address."""
        return f"10.77.{self.numbers[name]}.2"

    @property
    def router(self) -> str:
        """Name of the router's namespace."""
        return f"{self._prefix}-r"

    def enter(self, name: str = CLIENT) -> None:
        """Move the calling thread (and those that it starts afterwards) to a host, for good."""
        self.enter_namespace(self.namespace(name))

    @staticmethod
    def enter_namespace(namespace: str) -> None:
        """As `enter`, for any namespace of the network."""
        fd = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)

    # --- cuts --------------------------------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Drop whatever ``source`` sends to ``target``; the other way stays open."""
        if (source, target) not in self._cuts:
            preference = next(self._preferences)
            self._rule("add", source, target, preference)
            self._cuts[source, target] = preference

    def heal(self, source: str, target: str) -> None:
        """End one cut."""
        preference = self._cuts.pop((source, target), None)
        if preference is not None:
            self._rule("del", source, target, preference)

    def _rule(self, verb: str, source: str, target: str, preference: int) -> None:
        where = ["pref", str(preference), *self.between(source, target)]
        run_ip("-n", self.router, "rule", verb, *where, "blackhole")

    def between(self, source: str, target: str) -> list[str]:
        """Return what a rule of the router needs to match all that one host sends to another."""
        return ["iif", f"to{self.numbers[source]}", "to", f"{self.host(target)}/32"]

    def split(self, *sides: Iterable[str]) -> None:
        """Cut every pair of nodes on different sides, both ways. The tests' own host reaches all."""
        for one, other in itertools.permutations([list(side) for side in sides], 2):
            for source, target in itertools.product(one, other):
                self.cut(source, target)

    def isolate(self, name: str) -> None:
        """Cut one node from all others."""
        self.split([name], [other for other in self.numbers if other not in {name, CLIENT}])

    def heal_all(self) -> None:
        """End all cuts."""
        for source, target in list(self._cuts):
            self.heal(source, target)


class HostNode(NodeProcess):
    """A node on a host of its own."""

    def __init__(self, network: Network, name: str, data: Path, arguments: list[str]) -> None:
        super().__init__(name, data, _PORT, arguments)
        self.address = f"tcp://{network.host(name)}:{_PORT}"
        self.before = ["ip", "netns", "exec", network.namespace(name)]


class HostNodes(Nodes):
    """As `tests.processes.Nodes`, each node on a host of its own in ``network``."""

    def __init__(
        self,
        network: Network,
        directory: Path,
        names: list[str],
        *,
        cluster: str = "test",
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.network = network
        self.initial = ",".join(f"{name}=tcp://{network.host(name)}:{_PORT}" for name in names)
        self.common = ["--cluster", cluster, "--insecure", *arguments]
        first = [*self.common, "--initial", self.initial]
        self.nodes = {name: HostNode(network, name, directory / name, first) for name in names}


@contextlib.contextmanager
def hosts(directory: Path, count: int, **more: Any) -> Iterator[HostNodes]:
    """Make a network and a cluster on it, started and ready."""
    names = [f"node-{number}" for number in range(1, count + 1)]
    with Network(names) as network, HostNodes(network, directory, names, **more) as nodes:
        nodes.start_all()
        yield nodes


def run_ip(*arguments: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def run_in(namespace: str, *command: str) -> None:
    """Run a command in a namespace."""
    subprocess.run(["ip", "netns", "exec", namespace, *command], check=True, capture_output=True)
