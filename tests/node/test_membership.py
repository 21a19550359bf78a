"""Members that join, leave, move, are wiped: real processes and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from srengine import errors
from tests.node.cluster import Asker, numbered
from tests.node.coordination import Writer, command, joiner, put_until_done, rows_of, wait_leader
from tests.processes import NodeProcess, Nodes, free_ports, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def stable(asker: Asker, address: str, name: str) -> bool:
    try:
        return any(member.name == name and member.stable for member in asker.members(address).members)
    except errors.Error:
        return False


def test_a_node_joins_and_leaves(nodes: Nodes, asker: Asker, tmp_path: Path) -> None:
    """H12, B10: under load a fourth node joins with its ticket, is unstable, becomes stable, is removed, and its
    process ends with exit code 12; no write fails for it.
    """
    one = nodes["node-1"].address
    wait_leader(asker, nodes)
    ticket = command(one, "member", "add", "node-4").stdout.decode().strip()
    with Writer(nodes) as writer, joiner(nodes, tmp_path, "node-4", ticket) as four:
        writer.wait_more(3)
        four.start().wait_ready()
        wait_for(lambda: stable(asker, one, "node-4"), "the joiner votes")
        writer.wait_more(3)
        assert {member.name for member in asker.members(four.address).members} == {
            "node-1", "node-2", "node-3", "node-4",
        }  # fmt: skip
        removed = command(one, "member", "remove", "node-4")
        assert removed.returncode == 0, removed.stderr.decode()
        assert four.wait() == 12, four.log_tail()
        writer.wait_more(3)
    assert {member.name for member in asker.members(one).members} == {"node-1", "node-2", "node-3"}
    writer.check(asker, one)
    again = four.start()
    assert again.wait() == 12, four.log_tail()


def test_tickets(nodes: Nodes, asker: Asker, tmp_path: Path) -> None:
    """A wrong ticket, none, and one that was used are refused (exit 6), and nothing is changed."""
    one = nodes["node-1"].address
    wait_leader(asker, nodes)
    before = asker.members(one)
    ticket = command(one, "member", "add", "node-4").stdout.decode().strip()
    for wrong in ("", "0" * len(ticket), ticket[:-1]):
        with joiner(nodes, tmp_path / f"wrong{len(wrong)}{wrong[:1]}", "node-4", wrong) as four:
            four.data.parent.mkdir(exist_ok=True)
            assert four.start().wait() == 6, four.log_tail()
    assert asker.members(one).members == before.members
    with joiner(nodes, tmp_path, "node-4", ticket) as four:
        four.start().wait_ready()
        with joiner(nodes, tmp_path / "second", "node-4", ticket) as thief:
            thief.data.parent.mkdir()
            assert thief.start().wait() in {5, 6}, thief.log_tail()


def test_removing(nodes: Nodes, asker: Asker) -> None:
    """B14, H25: the leader is not removed (13), a stranger is not found (10), a majority is not lost (4)."""
    one = nodes["node-1"].address
    leader = wait_leader(asker, nodes)
    assert command(nodes[leader].address, "member", "remove", leader).returncode == 13
    assert command(one, "member", "remove", "node-9").returncode == 10
    followers = [node for node in nodes if node.name != leader]
    followers[0].kill()
    wait_for(lambda: not rows_of(asker, nodes[leader].address)[followers[0].name]["alive"], "the dead one is seen")
    refused = command(nodes[leader].address, "member", "remove", followers[1].name)
    assert refused.returncode == 4, (refused.returncode, refused.stderr.decode())
    assert len(asker.members(nodes[leader].address).members) == 3
    assert command(nodes[leader].address, "member", "remove", followers[0].name).returncode == 0
    assert len(asker.members(nodes[leader].address).members) == 2


def test_a_dead_joiner_of_a_group_of_two_is_dropped(tmp_path: Path, asker: Asker) -> None:
    """H14: in a group of two the joiner died before it voted: it can be dropped, and the group goes on."""
    with Nodes(tmp_path, 2) as nodes:
        nodes.start_all()
        leader = wait_leader(asker, nodes)
        at = nodes[leader].address
        ticket = command(at, "member", "add", "node-3").stdout.decode().strip()
        with joiner(nodes, tmp_path, "node-3", ticket) as three:
            three.start()
            wait_for(lambda: len(asker.members(at).members) == 3, "the joiner is known")
            three.kill()
            assert command(at, "member", "remove", "node-3").returncode == 0
        put_until_done(asker, lambda: [at], "r", b"v")


def test_roles_change(nodes: Nodes, asker: Asker) -> None:
    """B32, H18, B09: a voter becomes an observer and a voter again under load; an observer never leads."""
    leader = wait_leader(asker, nodes)
    other = next(node for node in nodes if node.name != leader)
    third = next(node for node in nodes if node.name not in {leader, other.name})
    with Writer(nodes) as writer:
        writer.wait_more(2)
        assert command(nodes[leader].address, "member", "set-role", other.name, "observer").returncode == 0
        writer.wait_more(2)
    wait_for(lambda: rows_of(asker, nodes[leader].address)[other.name]["state"] == "OBSERVER", "it observes")
    assert command(nodes[leader].address, "member", "set-role", leader, "observer").returncode == 13
    third.kill()
    with pytest.raises((errors.NoQuorum, errors.TimedOut)):
        asker.put_register(nodes[leader].address, "r", b"v", timeout_s=2)
    third.start().wait_ready()
    leader = wait_leader(asker, nodes)
    assert leader != other.name
    assert command(nodes[leader].address, "member", "set-role", other.name, "follower").returncode == 0
    wait_for(lambda: stable(asker, nodes[leader].address, other.name), "it votes again")
    writer.check(asker, other.address)


def test_a_node_moves(nodes: Nodes, asker: Asker) -> None:
    """H15, B15, F30: a node comes back at another port: one command, its id and data are kept."""
    leader = wait_leader(asker, nodes)
    moved = next(node for node in nodes if node.name not in {leader, "node-1"})
    at = nodes[leader].address
    before = {member.name: member.id for member in asker.members(at).members}
    moved.stop()
    moved.port = free_ports()
    moved.address = f"tcp://127.0.0.1:{moved.port}"
    taken = command(at, "member", "update-address", moved.name, nodes["node-1"].address)
    assert taken.returncode == 5, taken.stderr.decode()
    assert command(at, "member", "update-address", moved.name, moved.address).returncode == 0
    assert command(at, "member", "update-address", "node-9", "tcp://127.0.0.1:9").returncode == 10
    moved.arguments = ["--cluster", "test"]
    moved.start().wait_ready()
    wait_for(lambda: rows_of(asker, at)[moved.name]["alive"], "it is there again")
    member = {member.name: member for member in asker.members(at).members}[moved.name]
    assert (member.id, member.address) == (before[moved.name], moved.address)
    asker.put_register(moved.address, "r", b"v")


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_wiped_node_comes_back_as_another(nodes: Nodes, asker: Asker, which: str) -> None:
    """H29, F13: a node whose directory is gone is another node: it learns, founds nothing, and votes once equal."""
    leader = wait_leader(asker, nodes)
    wiped = nodes[leader] if which == "leader" else next(node for node in nodes if node.name != leader)
    alive = next(node for node in nodes if node is not wiped)
    asker.create(nodes["node-1"].address, TABLE)
    asker.write(nodes["node-1"].address, TABLE, numbered(0, 50), consistency="all")
    before = asker.members(alive.address)
    cluster = asker.status(alive.address)["cluster"]["id"]
    wiped.kill()
    shutil.rmtree(wiped.data)
    wiped.start().wait_ready()
    wait_for(lambda: stable(asker, alive.address, wiped.name), "it votes again")
    after = asker.members(alive.address)
    ids = {member.name: member.id for member in after.members}
    assert ids[wiped.name] != {member.name: member.id for member in before.members}[wiped.name]
    assert json.loads((wiped.data / "identity.json").read_text())["cluster_id"] == cluster
    wait_for(lambda: asker.settled(alive.address, TABLE), "all replicas equal again")
    assert len(asker.everything(wiped.address, TABLE)) == 50


def test_a_directory_of_another_cluster_cannot_join(nodes: Nodes, asker: Asker, tmp_path: Path) -> None:
    """B19: a directory that belongs to another cluster is refused (exit 5) and stays as it was."""
    (tmp_path / "other").mkdir()
    with Nodes(tmp_path / "other", 1, cluster="other") as others:
        stranger = others["node-1"]
        others.start_all()
        stranger.stop()
        before = {path: path.read_bytes() for path in stranger.data.rglob("identity.json")}
        ticket = command(nodes["node-1"].address, "member", "add", "node-4").stdout.decode().strip()
        node = NodeProcess(
            "node-1", stranger.data, free_ports(),
            ["--cluster", "test", "--join", nodes["node-1"].address, "--ticket", ticket],
        )  # fmt: skip
        try:
            assert node.start().wait() == 5, node.log_tail()
        finally:
            node.kill()
        assert {path: path.read_bytes() for path in before} == before
