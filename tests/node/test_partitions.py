"""Nodes that cannot hear each other: hosts in network namespaces, silent cuts of any direction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from srengine import errors
from tests.namespaces import HostNodes, hosts
from tests.node.cluster import Asker
from tests.node.coordination import put_until_done, rows_of, wait_leader
from tests.processes import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.requires_root, pytest.mark.requires_tool("ip")]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[HostNodes, Asker]]:
    with hosts(tmp_path, 3) as nodes, Asker(enter=nodes.network.enter) as asker:
        yield nodes, asker


def equal_everywhere(asker: Asker, nodes: HostNodes, name: str, value: bytes) -> bool:
    try:
        return all(asker.get_register(node.address, name, timeout_s=2) == value for node in nodes)
    except errors.Error:
        return False


def test_a_follower_alone(three: tuple[HostNodes, Asker]) -> None:
    """H08, B18: a follower that is cut off knows no leader and disturbs nobody; the leader sees it dead; healed, it
    follows the same leader again.
    """
    nodes, asker = three
    leader = wait_leader(asker, nodes)
    term = asker.status(nodes[leader].address)["term"]
    alone = next(node for node in nodes if node.name != leader)
    nodes.network.isolate(alone.name)
    wait_for(lambda: rows_of(asker, alone.address)[alone.name]["state"] == "UNKNOWN", "it knows no leader")
    wait_for(lambda: not rows_of(asker, nodes[leader].address)[alone.name]["alive"], "the leader sees it dead")
    asker.put_register(nodes[leader].address, "r", b"v")
    nodes.network.heal_all()
    assert wait_leader(asker, nodes) == leader
    assert asker.status(nodes[leader].address)["term"] == term
    wait_for(lambda: equal_everywhere(asker, nodes, "r", b"v"), "all have it")


def test_the_leader_alone(three: tuple[HostNodes, Asker]) -> None:
    """F23, H06: the leader is cut off: it acknowledges nothing and serves nothing old; the others elect; healed, all
    are equal and nothing acknowledged is lost.
    """
    nodes, asker = three
    leader = wait_leader(asker, nodes)
    others = [node for node in nodes if node.name != leader]
    asker.put_register(nodes[leader].address, "r", b"old")
    nodes.network.isolate(leader)
    put_until_done(asker, lambda: [node.address for node in others], "r", b"new")
    with pytest.raises((errors.NoQuorum, errors.TimedOut)):
        asker.put_register(nodes[leader].address, "lost", b"x", timeout_s=2)
    with pytest.raises((errors.NoQuorum, errors.TimedOut)):
        asker.get_register(nodes[leader].address, "r", timeout_s=2)
    nodes.network.heal_all()
    wait_leader(asker, nodes)
    wait_for(lambda: equal_everywhere(asker, nodes, "r", b"new"), "all have it")


@pytest.mark.parametrize("deaf", ["leader", "follower"])
def test_one_way(three: tuple[HostNodes, Asker], deaf: str) -> None:
    """F24, H08: one node sends and hears nothing: there is one leader that acknowledges, and elections end."""
    nodes, asker = three
    leader = wait_leader(asker, nodes)
    name = leader if deaf == "leader" else next(node.name for node in nodes if node.name != leader)
    others = [node for node in nodes if node.name != name]
    for other in others:
        nodes.network.cut(other.name, name)
    put_until_done(asker, lambda: [node.address for node in others], "r", b"v")
    settled = wait_leader(asker, nodes, [node.name for node in others])
    term = asker.status(nodes[settled].address)["term"]
    for number in range(10):
        asker.put_register(nodes[settled].address, "more", b"%d" % number)
    assert asker.status(nodes[settled].address)["term"] == term
    nodes.network.heal_all()
    wait_for(lambda: equal_everywhere(asker, nodes, "more", b"9"), "all have it")


def test_a_bridge(three: tuple[HostNodes, Asker]) -> None:
    """F25: two nodes do not hear each other, a third hears both: writes go on."""
    nodes, asker = three
    leader = wait_leader(asker, nodes)
    other = next(node for node in nodes if node.name != leader)
    nodes.network.split([leader], [other.name])
    put_until_done(asker, lambda: [node.address for node in nodes], "r", b"v")
    nodes.network.heal_all()
    wait_leader(asker, nodes)
    wait_for(lambda: equal_everywhere(asker, nodes, "r", b"v"), "all have it")


def test_five_split_in_two_and_three(tmp_path: Path) -> None:
    """H09, K19: the two cannot write nor remove members, the three can; healed, all are equal."""
    with hosts(tmp_path, 5) as nodes, Asker(enter=nodes.network.enter) as asker:
        leader = wait_leader(asker, nodes)
        names = sorted(nodes.nodes, key=lambda name: name != leader)
        two, many = names[:2], names[2:]
        nodes.network.split(two, many)
        put_until_done(asker, lambda: [nodes[name].address for name in many], "r", b"three")
        for name in two:
            with pytest.raises((errors.NoQuorum, errors.TimedOut)):
                asker.put_register(nodes[name].address, "r", b"two", timeout_s=2)
        nodes.network.heal_all()
        wait_leader(asker, nodes)
        wait_for(lambda: equal_everywhere(asker, nodes, "r", b"three"), "all have it")
        assert len({asker.members(node.address).digest for node in nodes}) == 1


def test_removed_while_away(three: tuple[HostNodes, Asker]) -> None:
    """F32: a node is removed while it is cut off; back again it is told so, ends with exit code 12, and no election was
    disturbed.
    """
    nodes, asker = three
    leader = wait_leader(asker, nodes)
    away = next(node for node in nodes if node.name != leader)
    nodes.network.isolate(away.name)
    wait_for(lambda: not rows_of(asker, nodes[leader].address)[away.name]["alive"], "the leader sees it dead")
    with pytest.raises(errors.MemberNotFound):
        asker.remove(nodes[leader].address, "node-9")
    asker.remove(nodes[leader].address, away.name)
    term = asker.status(nodes[leader].address)["term"]
    nodes.network.heal_all()
    assert away.wait() == 12, away.log_tail()
    assert asker.status(nodes[leader].address)["term"] == term
