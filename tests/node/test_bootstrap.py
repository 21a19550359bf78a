"""Founding a cluster and becoming a member, with real processes; a node inside a program; a cluster with keys."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

import srengine
from srengine import errors
from srengine.ha.messages import Belongs, Introduce
from srengine.node import NodeOptions, parse_initial
from srengine.security import ensure_node_keys
from srengine.transport import Endpoint, Identity
from tests.node.cluster import Asker, numbered
from tests.processes import ROOT, NodeProcess, Nodes, free_ports, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def test_first_nodes_that_disagree_are_told(tmp_path: Path) -> None:
    """All first nodes name the same members in the same order and one cluster; who does not stops with exit 5."""
    with Nodes(tmp_path, 2) as nodes:
        turned = ",".join(reversed(nodes.initial.split(",")))
        one, two = nodes
        one.start()
        two.start("--initial", turned)
        # Turned around each thinks itself the founder. Whoever asks first finds out and stops; the other one waits for
        # it.
        stopped = wait_for(lambda: [node for node in nodes if not node.alive], "one of them stops")
        assert all(node.wait() == 5 for node in stopped)
        assert "name the same members in the same order" in stopped[0].log_tail()
        assert not any((node.data / "identity.json").exists() for node in nodes)


def test_another_cluster_name_is_refused(tmp_path: Path) -> None:
    """A first node started for another cluster stops with exit 5, and nothing is founded."""
    with Nodes(tmp_path, 2) as nodes:
        one, two = nodes
        one.start()
        two.start("--cluster", "other")
        stopped = wait_for(lambda: [node for node in nodes if not node.alive], "one of them stops")
        assert all(node.wait() == 5 for node in stopped)
        assert "cluster" in stopped[0].log_tail()
        assert not any((node.data / "identity.json").exists() for node in nodes)


def test_a_member_that_calls_before_there_is_a_cluster_is_put_off(tmp_path: Path) -> None:
    """H29: a node that is just being let in may be called by a member before it has heard that it is one: it is not
    ready, which is asked again, not foreign, which would be final.
    """

    async def call(address: str) -> None:
        member = Endpoint(Identity(node_id="a" * 32, name="node-9", cluster_id="c" * 32))
        try:
            told = (await member.channel(address).request(Introduce("node-9"), timeout_s=20)).message
            assert not told.cluster_id
            peer = f"{address.rpartition(':')[0]}:{told.peer_address.rpartition(':')[2]}"
            with pytest.raises(errors.NotReady):
                await member.channel(peer, port="peer").request(Belongs(), timeout_s=20)
        finally:
            await member.close()

    with Nodes(tmp_path, 3) as nodes:
        node = nodes["node-2"].start()
        wait_for(lambda: "waiting for" in node.log_tail(), "it waits for the others")
        asyncio.run(call(node.address))
        assert node.alive


def test_the_founder_waits_for_everybody(tmp_path: Path) -> None:
    """Without an answer of every other first member nothing is founded: one of them might know of a cluster."""
    with Nodes(tmp_path, 3) as nodes:
        nodes["node-1"].start()
        nodes["node-2"].start()
        wait_for(lambda: "waiting for node-3" in nodes["node-1"].log_tail(), "the founder says whom it waits for")
        # Its id may be written down by now, because node-2 has asked for it; a cluster is not.
        identity = nodes["node-1"].data / "identity.json"
        assert not identity.exists() or json.loads(identity.read_text())["cluster_id"] == ""
        nodes["node-3"].start()
        for node in nodes:
            node.wait_ready()


def test_a_killed_founder_goes_on(tmp_path: Path, asker: Asker) -> None:
    """K21: killed at any moment of the bootstrap and started again, the nodes end in one cluster."""
    with Nodes(tmp_path, 3) as nodes:
        for pause_s in (0.3, 0.5, 0.7):
            for node in nodes:
                node.start()
            with pytest.raises(subprocess.TimeoutExpired):
                nodes["node-1"].wait(pause_s)
            for node in nodes:
                node.kill()
        nodes.start_all()
        one = nodes["node-1"].address
        asker.create(one, TABLE)
        asker.write(one, TABLE, numbered(0, 20), consistency="all")
        assert len({event["cluster"]["id"] for event in map(asker.status, [node.address for node in nodes])}) == 1


def test_without_initial_a_blank_node_says_what_it_needs(tmp_path: Path) -> None:
    """A directory that belongs to no cluster needs --initial: exit 2."""
    node = NodeProcess("node-1", tmp_path / "node-1", free_ports(), ["--cluster", "test"])
    try:
        node.start()
        assert node.wait() == 2, node.log_tail()
        assert "--initial" in node.log_tail()
    finally:
        node.kill()


def test_a_single_node_is_a_cluster(tmp_path: Path, asker: Asker) -> None:
    """One member: founded at once, keeps everything over a kill, and needs no --initial again."""
    with Nodes(tmp_path, 1) as nodes:
        one = nodes.start_all()["node-1"]
        asker.create(one.address, TABLE, replicas=1)
        asker.write(one.address, TABLE, numbered(0, 50))
        one.kill()
        one.arguments = []
        one.start().wait_ready()
        assert len(asker.everything(one.address, TABLE)) == 50


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """A second node on the same port stops with one sentence, and changes nothing."""
    with Nodes(tmp_path, 1) as nodes:
        nodes.start_all()
        other = NodeProcess("node-1", tmp_path / "other", nodes["node-1"].port, nodes["node-1"].arguments)
        try:
            other.start()
            assert other.wait() not in {0, None}
            assert str(other.port) in other.log_tail()
            assert not (other.data / "identity.json").exists()
        finally:
            other.kill()


def test_a_node_inside_a_program(tmp_path: Path, asker: Asker) -> None:
    """`srengine.Node` starts and stops in a thread, tells its state, and answers like any other."""
    port = free_ports()
    options = NodeOptions(
        name="n1",
        data=tmp_path / "data",
        listen=f"tcp://127.0.0.1:{port}",
        cluster="embedded",
        initial=parse_initial(f"n1=tcp://127.0.0.1:{port}"),
    )
    states: list[tuple[str, str]] = []
    node = srengine.Node(options)
    node.on_state_change = lambda before, after: states.append((before, after))
    with node:
        asker.create(node.address, TABLE, replicas=1)
        with node.client() as client:
            orders = client.table(TABLE)
            orders[b"k"] = b"v"
            assert orders[b"k"] == b"v"
    assert states == [("INIT", "LEADER"), ("LEADER", "UNKNOWN")]
    with pytest.raises(errors.NotReady):
        node.client()
    with srengine.Node(options) as again, again.client() as client:
        assert client.table(TABLE)[b"k"] == b"v"


def test_a_node_that_cannot_start_raises(tmp_path: Path) -> None:
    """`Node.start` raises the reason in the caller's thread."""
    options = NodeOptions(name="n1", data=tmp_path / "data", listen="tcp://127.0.0.1:0", cluster="x")
    with pytest.raises(errors.UsageError):
        srengine.Node(options).start()


def test_a_cluster_with_keys(tmp_path: Path) -> None:
    """F35: with keys in --initial nodes talk encrypted and replicate; a client without a key is not let in."""
    with Nodes(tmp_path, 3) as nodes:
        keys = {}
        for node in nodes:
            node.data.mkdir(mode=0o700)
            keys[node.name] = ensure_node_keys(node.data).public.hex()
        initial = ",".join(f"{node.name}={node.address}#{keys[node.name]}" for node in nodes)
        for node in nodes:
            node.arguments = ["--cluster", "test", "--initial", initial]
        nodes.start_all()
        one = nodes["node-1"]
        with Asker() as stranger, pytest.raises(errors.Error):
            stranger.ask(one.address, srengine.client.messages.Status(), timeout_s=3)
        base = [sys.executable, "-m", "srengine", "--endpoint", one.address]
        base += ["--server-key", keys["node-1"], "--key-file", str(one.data / "keys" / "node.key")]
        for command in (["db", "create", "shop"], ["table", "create", TABLE], ["put", TABLE, "k", "v"]):
            done = subprocess.run([*base, *command], cwd=ROOT, capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr.decode()
        done = subprocess.run([*base, "get", TABLE, "k"], cwd=ROOT, capture_output=True, timeout=60)
        assert done.stdout.strip() == b"v"
