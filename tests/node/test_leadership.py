"""Who leads when nodes die, stand still, hand over and return: real processes, real signals."""

from __future__ import annotations

import signal

import pytest

from srengine import errors
from tests.node.cluster import Asker
from tests.node.coordination import Writer, command, put_until_done, rows_of, wait_leader
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes


def test_another_node_leads_after_a_kill(nodes: Nodes, asker: Asker) -> None:
    """H01, H11: the leader is killed again and again: each time another one leads, and no acknowledged entry is lost.

    ``make soak`` runs it for 200 kills.
    """
    with Writer(nodes) as writer:
        for _ in range(3):
            leader = wait_leader(asker, nodes)
            writer.wait_more(3)
            nodes[leader].kill()
            wait_leader(asker, nodes, but=leader)
            writer.wait_more(3)
            nodes[leader].start().wait_ready()
    leader = wait_leader(asker, nodes)
    for node in nodes:
        writer.check(asker, node.address)
    terms = asker.status(nodes[leader].address)
    assert terms["term"] >= 4
    assert terms["epoch"] >= 4


def test_states_are_shown(nodes: Nodes, asker: Asker) -> None:
    """H02, B07: status shows LEADER and FOLLOWER, the same leader at every node; without a majority UNKNOWN, nobody
    leads, and who asks for a change is told so.
    """
    leader = wait_leader(asker, nodes)
    expected = {other.name: "LEADER" if other.name == leader else "FOLLOWER" for other in nodes}
    for node in nodes:
        wait_for(
            lambda at=node.address: {name: row["state"] for name, row in rows_of(asker, at).items()} == expected,
            "each node shows the role that it has",
        )
    left = next(node for node in nodes if node.name != leader)
    for node in nodes:
        if node is not left:
            node.kill()
    wait_for(lambda: rows_of(asker, left.address)[left.name]["state"] == "UNKNOWN", "the last one knows no leader")
    assert asker.leader(left.address) is None
    for ask in (
        lambda: asker.put_register(left.address, "r", b"v", timeout_s=1),
        lambda: asker.get_register(left.address, "r", timeout_s=1),
        lambda: asker.members(left.address),
    ):
        with pytest.raises((errors.NoQuorum, errors.TimedOut)):
            ask()


def test_a_paused_leader_changes_nothing(nodes: Nodes, asker: Asker) -> None:
    """F21, H06, B06: a leader that stood still while another one acted serves no old value and overwrites nothing."""
    leader = wait_leader(asker, nodes)
    others = [node for node in nodes if node.name != leader]
    asker.put_register(nodes[leader].address, "r", b"old")
    epoch = asker.status(nodes[leader].address)["epoch"]
    nodes[leader].pause()
    put_until_done(asker, lambda: [node.address for node in others], "r", b"new")
    nodes[leader].go_on()
    # Asked at once, while it may still believe that it leads.
    for _ in range(20):
        try:
            assert asker.get_register(nodes[leader].address, "r", timeout_s=2) == b"new"
        except (errors.NoQuorum, errors.TimedOut, errors.Conflict):
            continue
    after = wait_leader(asker, nodes)
    assert asker.status(nodes[after].address)["epoch"] > epoch
    for node in nodes:
        assert asker.get_register(node.address, "r") == b"new"
    assert nodes[leader].alive


def test_leadership_is_handed_over(nodes: Nodes, asker: Asker) -> None:
    """H07: transfer-leader: the other one leads, the old process lives on as FOLLOWER, and no write is lost."""
    leader = wait_leader(asker, nodes)
    target = next(node.name for node in nodes if node.name != leader)
    process = nodes[leader].process
    with Writer(nodes) as writer:
        writer.wait_more(3)
        done = command(nodes[leader].address, "member", "transfer-leader", target)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == target
        writer.wait_more(3)
    assert wait_leader(asker, nodes) == target
    assert nodes[leader].process is process
    assert nodes[leader].alive
    assert rows_of(asker, nodes[target].address)[leader]["state"] == "FOLLOWER"
    writer.check(asker, nodes[leader].address)
    missing = command(nodes[target].address, "member", "transfer-leader", "node-9")
    assert missing.returncode == 10


def test_sigterm_hands_over_first(nodes: Nodes, asker: Asker) -> None:
    """H22: SIGTERM of the leader: it hands over before it ends with 0, so nobody has to find out by waiting."""
    leader = wait_leader(asker, nodes)
    assert nodes[leader].stop() == 0
    text = nodes[leader].log_tail(100_000)
    assert '"event": "leader_transferred"' in text
    after = wait_leader(asker, nodes, but=leader)
    assert "leader_lost" not in nodes[after].log_tail(100_000)


def test_rolling_restart(nodes: Nodes, asker: Asker) -> None:
    """H23: all nodes are restarted one after the other under load: nothing acknowledged is lost."""
    with Writer(nodes) as writer:
        for node in nodes:
            writer.wait_more(3)
            assert node.stop() == 0
            node.start().wait_ready()
            writer.wait_more(3)
    for node in nodes:
        writer.check(asker, node.address)


def test_whole_cluster_dies_and_returns(nodes: Nodes, asker: Asker) -> None:
    """K20, B20: all killed: registers, epochs and members are what they were, on every node the same."""
    wait_leader(asker, nodes)
    one = nodes["node-1"].address
    for number in range(20):
        asker.put_register(one, f"r{number}", b"%d" % number)
    before = asker.members(one)
    epoch = asker.status(one)["epoch"]
    for node in nodes:
        node.signal(signal.SIGKILL)
    for node in nodes:
        node.kill()
        node.start()
    for node in nodes:
        node.wait_ready()
    leader = wait_leader(asker, nodes)
    for node in nodes:
        for number in range(20):
            assert asker.get_register(node.address, f"r{number}") == b"%d" % number
        assert asker.members(node.address).digest == before.digest
    assert asker.status(nodes[leader].address)["epoch"] > epoch


def test_follower_reads_what_it_wrote(nodes: Nodes, asker: Asker) -> None:
    """H16: put through a follower, get through the same follower at once: the value is there."""
    leader = wait_leader(asker, nodes)
    follower = next(node for node in nodes if node.name != leader)
    for number in range(30):
        asker.put_register(follower.address, "r", b"%d" % number)
        assert asker.get_register(follower.address, "r") == b"%d" % number


def test_conditions_decide_once(nodes: Nodes, asker: Asker) -> None:
    """A register's condition is decided when its entry is applied: of two writers with one version one wins."""
    wait_leader(asker, nodes)
    one, two = nodes["node-1"].address, nodes["node-2"].address
    version = asker.put_register(one, "r", b"first", if_version=0)
    asker.put_register(two, "r", b"second", if_version=version)
    with pytest.raises(errors.Conflict):
        asker.put_register(one, "r", b"third", if_version=version)
    assert asker.get_register(one, "r") == b"second"
