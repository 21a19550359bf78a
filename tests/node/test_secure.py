"""Nodes with keys: who is let in, and what a listener on the wire sees."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import srengine
from srengine import errors
from srengine.client import messages
from srengine.security import ensure_node_keys
from tests.node.cluster import Asker
from tests.processes import NodeProcess, Nodes, free_ports, wait_for

pytestmark = pytest.mark.processes
HIDDEN, SHOWN = b"hidden-marker-" * 8, b"shown-marker-" * 8


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Nodes, dict[str, str]]]:
    with Nodes(tmp_path, 3) as nodes:
        keys = {}
        for node in nodes:
            node.data.mkdir(mode=0o700)
            keys[node.name] = ensure_node_keys(node.data).public.hex()
        initial = ",".join(f"{node.name}={node.address}#{keys[node.name]}" for node in nodes)
        for node in nodes:
            node.arguments = ["--cluster", "test", "--initial", initial]
        yield nodes.start_all(), keys


@contextlib.contextmanager
def captured(path: Path, ports: list[int]) -> Iterator[None]:
    """Record what passes on loopback at these ports, from before the block's first byte on."""
    wanted = " or ".join(f"port {port}" for port in ports)
    command = ["tcpdump", "-i", "lo", "-U", "-s", "0", "-w", str(path), wanted]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        said = b""

        def listening() -> bool:
            nonlocal said
            said += process.stderr.read() or b""
            return b"listening on" in said

        wait_for(listening, "tcpdump listens")
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.mark.requires_root
@pytest.mark.requires_tool("tcpdump")
def test_nobody_reads_along(keyed: tuple[Nodes, dict[str, str]], tmp_path: Path) -> None:
    """B26: with keys nothing that a value holds is on the wire, between client and nodes and between nodes; without
    keys it is, so the listener works.
    """
    nodes, keys = keyed
    (tmp_path / "plain").mkdir()
    with Nodes(tmp_path / "plain", 1, cluster="plain") as plain, Asker() as asker:
        plain.start_all()
        ports = [node.port + offset for node in [*nodes, *plain] for offset in range(3)]
        one = nodes["node-1"]
        wire = tmp_path / "wire.pcap"
        with (
            captured(wire, ports),
            srengine.connect(
                one.address, server_key=keys["node-1"], key_file=str(one.data / "keys" / "node.key")
            ) as client,
        ):
            client.put_register("r", HIDDEN)
            assert client.get_register("r").value == HIDDEN
            at = plain["node-1"].address
            asker.put_register(at, "r", SHOWN)
            wait_for(lambda: SHOWN in wire.read_bytes(), "the listener has written down what was said in the clear")
        seen = wire.read_bytes()
    assert SHOWN in seen
    assert HIDDEN[:14] not in seen


def test_strangers_stay_out(keyed: tuple[Nodes, dict[str, str]], tmp_path: Path) -> None:
    """B27, F35: a node with a key that nobody knows does not join, whatever its ticket, and a peer without one is not
    talked to; the members stay what they are.
    """
    nodes, keys = keyed
    one = nodes["node-1"]
    with srengine.connect(
        one.address, server_key=keys["node-1"], key_file=str(one.data / "keys" / "node.key")
    ) as client:
        wait_for(lambda: client.status()["leader"], "somebody leads")
        before = client.list_members()
        stranger = NodeProcess(
            "node-4",
            tmp_path / "node-4",
            free_ports(),
            ["--cluster", "test", "--join", f"{one.address}#{keys['node-1']}", "--ticket", "0" * 32],
        )
        try:
            stranger.start()
            wait_for(lambda: "waiting for" in stranger.log_tail() or not stranger.alive, "it is not answered")
            assert not (stranger.alive and '"ready"' in stranger.log_tail())
        finally:
            stranger.kill()
        with Asker() as plain, pytest.raises(errors.Error):
            plain.ask(one.address, messages.Status(), timeout_s=3)
        assert client.list_members() == before


def test_a_node_with_a_key_joins(keyed: tuple[Nodes, dict[str, str]], tmp_path: Path) -> None:
    """H12: where keys are used a new node is let in by the key that its ticket names, and by no other."""
    nodes, keys = keyed
    one = nodes["node-1"]
    with srengine.connect(
        one.address, server_key=keys["node-1"], key_file=str(one.data / "keys" / "node.key")
    ) as client:
        wait_for(lambda: client.status()["leader"], "somebody leads")
        with pytest.raises(errors.InvalidValue):
            client.add_member("node-4")
        data = tmp_path / "node-4"
        data.mkdir(mode=0o700)
        public_key = ensure_node_keys(data).public.hex()
        ticket = client.add_member("node-4", public_key=public_key)
        four = NodeProcess(
            "node-4",
            data,
            free_ports(),
            ["--cluster", "test", "--join", f"{one.address}#{keys['node-1']}", "--ticket", ticket],
        )
        try:
            four.start().wait_ready()
            wait_for(
                lambda: any(member.name == "node-4" and member.stable for member in client.list_members().members),
                "the joiner votes",
            )
        finally:
            four.kill()
