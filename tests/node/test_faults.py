"""Nodes that die together, in the middle of a copy, or with their disks."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from srengine import errors
from tests.node.cluster import Asker, numbered
from tests.node.coordination import put_until_done, wait_leader
from tests.processes import NodeProcess, Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def write_all(asker: Asker, address: str, expected: dict[bytes, bytes], changes: dict[bytes, bytes | None]) -> None:
    """Write, and note what was acknowledged."""
    asker.write(address, TABLE, changes)
    for key, value in changes.items():
        if value is None:
            expected.pop(key, None)
        else:
            expected[key] = value


def test_survivors_go_on_and_one_alone_refuses(nodes: Nodes, asker: Asker) -> None:
    """K17: one of three down: reads and writes go on; two down: both are refused by name; one returns: both go on."""
    one = nodes["node-1"].address
    expected: dict[bytes, bytes] = {}
    asker.create(one, TABLE)
    write_all(asker, one, expected, numbered(0, 50))
    nodes["node-3"].kill()
    write_all(asker, one, expected, numbered(50, 100))
    assert asker.everything(one, TABLE) == expected
    nodes["node-2"].kill()
    wait_for(lambda: refused(asker, one), "the leader alone refuses to read")
    with pytest.raises(errors.NoQuorum):
        asker.write(one, TABLE, numbered(100, 101), timeout_s=2)
    nodes["node-2"].start().wait_ready()
    wait_for(lambda: not refused(asker, one), "two of three serve again")
    write_all(asker, one, expected, numbered(200, 250))
    assert asker.everything(one, TABLE) == expected


def refused(asker: Asker, address: str) -> bool:
    try:
        asker.read(address, TABLE, [b"key-000001"], timeout_s=1)
    except errors.NoQuorum:
        return True
    return False


def test_paused_leader_and_paused_replica(nodes: Nodes, asker: Asker) -> None:
    """F21: a replica that stood still is not current when it wakes; a leader that stood still serves on afterwards."""
    one, two = nodes["node-1"].address, nodes["node-2"].address
    asker.create(one, TABLE)
    asker.write(one, TABLE, numbered(0, 20))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes["node-1"].pause()
    with pytest.raises((errors.NotReady, errors.TimedOut)):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            asker.read(two, TABLE, [b"key-000001"], consistency="local", timeout_s=1)
    nodes["node-1"].go_on()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas current again")
    asker.write(one, TABLE, numbered(20, 40))
    assert asker.read(two, TABLE, [b"key-000030"]) == {b"key-000030": b"v-30"}


@pytest.mark.parametrize("seed", range(2))
def test_whole_cluster_restart(nodes: Nodes, asker: Asker, seed: int) -> None:
    """K20: all killed and started in random order: nothing is cleared, every acknowledged write is there, roots are
    equal.
    """
    chooser = random.Random(seed)
    one = nodes["node-1"].address
    expected: dict[bytes, bytes] = {}
    asker.create(one, TABLE)
    for first in range(0, 500, 50):
        write_all(asker, one, expected, numbered(first, first + 50))
    before = asker.replicas(one, TABLE)
    for node in chooser.sample(list(nodes), 3):
        node.kill()
    for node in chooser.sample(list(nodes), 3):
        node.start()
    for node in nodes:
        node.wait_ready()
    replicas = wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    assert asker.everything(one, TABLE) == expected
    highest = {
        row["tablet"]: max(each["sequence"] for each in before if each["tablet"] == row["tablet"]) for row in before
    }
    assert all(row["sequence"] >= highest[row["tablet"]] for row in replicas)


def test_crash_in_the_middle_of_catching_up(nodes: Nodes, asker: Asker) -> None:
    """K21: node-3 killed at random points of its copy, again and again: it resumes and ends equal."""
    chooser = random.Random(7)
    one = nodes["node-1"].address
    expected: dict[bytes, bytes] = {}
    asker.create(one, TABLE, tablets=2)
    nodes["node-3"].kill()
    for first in range(0, 12_000, 2_000):
        write_all(asker, one, expected, numbered(first, first + 2_000, "z" * 1_500))
    for _ in range(5):
        nodes["node-3"].start()
        with pytest.raises(subprocess.TimeoutExpired):
            nodes["node-3"].wait(0.5 + chooser.random())
        write_all(asker, one, expected, numbered(20_000, 20_000 + chooser.randrange(1, 50), str(chooser.random())))
        nodes["node-3"].kill()
    nodes["node-3"].start().wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again", 60)
    assert asker.everything(nodes["node-3"].address, TABLE, consistency="local") == expected


# --- disks -----------------------------------------------------------------------------------------------------------


def lose(node: NodeProcess, how: str, yesterday: Path) -> None:
    node.kill()
    match how:
        case "wipe":
            shutil.rmtree(node.data)
        case "wipe tablets":
            shutil.rmtree(node.data / "tablets")
        case "wipe meta":
            shutil.rmtree(node.data / "meta")
        case "wipe log":
            shutil.rmtree(node.data / "log")
        case "restore log":
            shutil.rmtree(node.data / "log")
            shutil.copytree(yesterday / "log", node.data / "log")
        case "damage":
            for file in (node.data / "tablets").glob("*/data.mdb"):
                with file.open("r+b") as opened:
                    opened.truncate(file.stat().st_size // 2)
        case "restore meta":
            shutil.rmtree(node.data / "meta")
            shutil.copytree(yesterday / "meta", node.data / "meta")
        case "restore tablets":
            shutil.rmtree(node.data / "tablets")
            shutil.copytree(yesterday / "tablets", node.data / "tablets")
        case "restore":
            shutil.rmtree(node.data)
            shutil.copytree(yesterday, node.data)
        case "restore in place":
            # As a careless restore does: the same files with older bytes.
            shutil.copytree(yesterday, node.data, dirs_exist_ok=True)


LOSSES = ["kill", "wipe", "wipe tablets", "wipe meta", "damage", "restore", "restore in place"]
PARTS = [
    ("node-1", "restore meta"),
    ("node-1", "restore tablets"),
    ("node-3", "restore meta"),
    ("node-3", "restore tablets"),
    ("node-1", "wipe log"),
    ("node-3", "restore log"),
]


FOLLOWER = [("node-2", "wipe"), ("node-2", "restore")]
"""node-2 is to the leader what node-3 is: two losses say that places do not matter."""


@pytest.mark.parametrize(
    ("name", "how"), [*((name, how) for name in ("node-1", "node-3") for how in LOSSES), *PARTS, *FOLLOWER]
)
def test_loss_of_one_directory(nodes: Nodes, asker: Asker, tmp_path: Path, name: str, how: str) -> None:
    """F13, F14: one directory killed, wiped or put back: no acknowledged write is lost while two are intact, or it is
    said.
    """
    one = nodes["node-1"].address
    expected: dict[bytes, bytes] = {}
    asker.create(one, TABLE)
    write_all(asker, one, expected, numbered(0, 60))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes[name].kill()
    yesterday = tmp_path / "yesterday"
    shutil.copytree(nodes[name].data, yesterday)
    nodes[name].start().wait_ready()
    write_all(asker, one, expected, numbered(30, 120, "today"))
    write_all(asker, one, expected, dict.fromkeys(list(expected)[:5]))
    # The other replica of the last majority is the one that must be asked.
    asker.create(one, "shop.late", tablets=1)
    lose(nodes[name], how, yesterday)
    nodes[name].start()
    nodes[name].wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    for node in nodes:
        assert asker.everything(node.address, TABLE) == expected
        assert asker.everything(node.address, TABLE, consistency="local") == expected
    assert asker.everything(nodes[name].address, "shop.late") == {}
    write_all(asker, one, expected, numbered(500, 510))
    assert asker.everything(one, TABLE) == expected


def test_restored_leader_needs_both_others(nodes: Nodes, asker: Asker, tmp_path: Path) -> None:
    """F14: a restored leader does not serve with one other replica, which may not be the one that knows; it says so."""
    one = nodes["node-1"].address
    expected: dict[bytes, bytes] = {}
    asker.create(one, TABLE)
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes["node-1"].kill()
    shutil.copytree(nodes["node-1"].data, tmp_path / "yesterday")
    nodes["node-1"].start().wait_ready()
    nodes["node-3"].kill()
    write_all(asker, one, expected, numbered(0, 100))
    nodes["node-2"].kill()
    lose(nodes["node-1"], "restore", tmp_path / "yesterday")
    nodes["node-1"].start()
    nodes["node-3"].start().wait_ready()
    wait_for(lambda: "nothing counts until it is proved" in nodes["node-1"].log_tail(100_000), "it knows what it is")
    wait_for(lambda: "not ready: " in nodes["node-1"].log_tail(100_000), "the first member says that it waits")
    with pytest.raises((errors.NotReady, errors.TimedOut, errors.Unreachable)):
        asker.read(one, TABLE, [b"key-000001"], timeout_s=1)
    nodes["node-2"].start().wait_ready()
    nodes["node-1"].wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    assert asker.everything(one, TABLE) == expected


@pytest.mark.parametrize("third", ["held all", "was away"])
def test_most_directories_put_back_at_once(nodes: Nodes, asker: Asker, tmp_path: Path, third: str) -> None:
    """F14: two of three directories are put back to yesterday at once. Alone they touch nothing and say what is wrong.
    With the third, intact one they go on, with an alarm, from the furthest state that any of them holds: what the third
    held is there, what it had not is gone.
    """
    one, two, three = nodes
    expected: dict[bytes, bytes] = {}
    asker.create(one.address, TABLE)
    write_all(asker, one.address, expected, numbered(0, 60))
    put_until_done(asker, lambda: [one.address], "r", b"yesterday")
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal")
    for node in nodes:
        node.kill()
    for node in (one, two):
        shutil.copytree(node.data, tmp_path / "yesterday" / node.name)
    running = [one, two, three] if third == "held all" else [one, two]
    for node in running:
        node.start()
    for node in running:
        node.wait_ready()
    today = numbered(30, 120, "today")
    asker.write(one.address, TABLE, today)
    put_until_done(asker, lambda: [one.address, two.address], "r", b"today")
    if third == "held all":
        expected.update(today)
        wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal")
        wait_for(lambda: asker.get_register(three.address, "r") == b"today", "the third has it")
    for node in running:
        node.kill()
    for node in (one, two):
        lose(node, "restore", tmp_path / "yesterday" / node.name)
        node.start()
    for node in (one, two):
        wait_for(lambda node=node: "directory_distrusted" in node.log_tail(100_000), f"{node.name} knows what it is")
    wait_for(lambda: alive(asker, one) and alive(asker, two), "they answer")
    with pytest.raises((errors.NoQuorum, errors.TimedOut)):
        asker.put_register(two.address, "r", b"lost", timeout_s=1)
    with pytest.raises((errors.NotReady, errors.TimedOut)):
        asker.read(one.address, TABLE, [b"key-000001"], timeout_s=1)
    three.start()
    for node in nodes:
        node.wait_ready()
    wait_leader(asker, nodes)
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal again")
    for node in nodes:
        assert node.alive
        assert asker.everything(node.address, TABLE) == expected
        assert asker.get_register(node.address, "r") == (b"today" if third == "held all" else b"yesterday")
    alarms = [alarm for row in asker.status(one.address)["nodes"] for alarm in row["alarms"]]
    for said in ("votes_unproved: only 1 of 3 voters are what they were", "acknowledged_writes_may_be_missing: "):
        assert any(alarm.startswith(said) for alarm in alarms), (said, alarms)
    write_all(asker, one.address, expected, numbered(500, 510))
    assert asker.everything(two.address, TABLE) == expected


def alive(asker: Asker, node: NodeProcess) -> bool:
    try:
        return bool(asker.status(node.address))
    except errors.Error:
        return False


def test_second_process_of_a_copied_directory_is_refused(nodes: Nodes, asker: Asker, tmp_path: Path) -> None:
    """F12: a copy of a living node's directory under another address stops with exit 5 and a sentence; the first lives
    on.
    """
    one, three = nodes["node-1"].address, nodes["node-3"]
    asker.create(one, TABLE)
    asker.write(one, TABLE, numbered(0, 20))
    three.stop()
    shutil.copytree(three.data, tmp_path / "clone")
    three.start().wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    other = Nodes(tmp_path / "elsewhere", 1)["node-1"]
    clone = NodeProcess("node-3", tmp_path / "clone", other.port, three.arguments)
    try:
        clone.start()
        assert clone.wait() == 5, clone.log_tail()
        assert "another process runs as node-3" in clone.log_tail()
    finally:
        clone.kill()
    assert three.alive
    asker.write(one, TABLE, numbered(20, 40), consistency="all")


def test_directory_of_another_node_or_cluster_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    """F12: a node does not start on the directory of another node or of another cluster: exit 5, nothing changed."""
    three = nodes["node-3"]
    three.stop()
    before = (three.data / "identity.json").read_bytes()
    for arguments in (["--name", "node-2"], ["--cluster", "other"]):
        three.start(*arguments)
        assert three.wait() == 5, three.log_tail()
    assert (three.data / "identity.json").read_bytes() == before


def test_directory_of_a_twin_cluster_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    """F12: a directory of another cluster with the same name and node: the leader's cluster id differs: exit 5,
    named.
    """
    (tmp_path / "twin").mkdir()
    with Nodes(tmp_path / "twin") as twins:
        twins.start_all()
        twins["node-3"].stop()
        nodes["node-3"].stop()
        clone = NodeProcess("node-3", twins["node-3"].data, nodes["node-3"].port, nodes["node-3"].arguments)
        try:
            clone.start()
            assert clone.wait() == 5, clone.log_tail()
            assert "belongs to cluster" in clone.log_tail()
        finally:
            clone.kill()
    nodes["node-3"].start().wait_ready()


def test_two_processes_on_one_directory(nodes: Nodes) -> None:
    """A second process on a directory in use stops with exit 5 and a sentence."""
    three = nodes["node-3"]
    second = NodeProcess("node-3", three.data, three.port, three.arguments)
    second.log = three.log.with_suffix(".second")
    try:
        second.start()
        assert second.wait() == 5, second.log_tail()
    finally:
        second.kill()
    assert three.alive
