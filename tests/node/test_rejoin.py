"""Three real nodes: one dies, misses writes, comes back, and ships only what differs."""

from __future__ import annotations

import shutil

import pytest

from srengine import errors
from tests.node.cluster import Asker, numbered
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def test_rejoin_story(nodes: Nodes, asker: Asker) -> None:
    """K01: a replica that was killed never says NOT_FOUND for what it missed, and ends equal; deleted keys stay
    deleted.
    """
    one, three = nodes["node-1"].address, nodes["node-3"].address
    asker.create(one, TABLE)
    expected = numbered(1, 101)
    asker.write(one, TABLE, expected)
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes["node-3"].kill()
    for changes in (
        numbered(101, 151),
        numbered(1, 11, "changed"),
        dict.fromkeys(b"key-%06d" % number for number in range(50, 55)),
    ):
        asker.write(one, TABLE, changes)
        expected.update(changes)
    nodes["node-3"].start().wait_ready()
    answers = []
    late = iter(range(1000, 2000))
    while not answers or isinstance(answers[-1], errors.Error):
        more = numbered(number := next(late), number + 1)
        asker.write(one, TABLE, more)
        expected.update(more)
        try:
            answers.append(asker.read(three, TABLE, [b"key-000125"], consistency="local")[b"key-000125"])
        except (errors.NotReady, errors.Unreachable) as error:
            answers.append(error)
    assert answers[-1] == b"v-125", answers
    assert asker.read(three, TABLE, [b"key-000052"], consistency="local") == {b"key-000052": None}
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    live = {key: value for key, value in expected.items() if value is not None}
    for address in (one, three):
        assert asker.everything(address, TABLE) == live
        assert asker.everything(address, TABLE, consistency="local") == live


def test_restart_inside_the_detection_window(nodes: Nodes, asker: Asker) -> None:
    """K02: killed and restarted at once, with writes between: the same."""
    one, three = nodes["node-1"].address, nodes["node-3"].address
    asker.create(one, TABLE)
    asker.write(one, TABLE, numbered(1, 101))
    nodes["node-3"].kill()
    nodes["node-3"].start()
    asker.write(one, TABLE, numbered(90, 140, "new"))
    nodes["node-3"].wait_ready()
    assert asker.read(three, TABLE, [b"key-000125"])[b"key-000125"] == b"new-125"
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    assert asker.everything(three, TABLE, consistency="local") == asker.everything(one, TABLE)


def test_short_outage_ships_only_what_was_missed(nodes: Nodes, asker: Asker) -> None:
    """K05, K23: 300 missed changes after 20 000 records come as a delta of their own size; the leader goes on
    meanwhile.
    """
    one, three = nodes["node-1"].address, nodes["node-3"].address
    asker.create(one, TABLE, tablets=1)
    value = "x" * 100
    for first in range(0, 20_000, 5_000):
        asker.write(one, TABLE, numbered(first, first + 5_000, value))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes["node-3"].kill()
    missed = numbered(10_000, 10_300, "y" * 100)
    asker.write(one, TABLE, missed)
    nodes["node-3"].start().wait_ready()
    asker.write(one, TABLE, numbered(30_000, 30_001))
    replicas = wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    (three_state,) = [replica for replica in replicas if replica["node"] == "node-3"]
    changed = sum(len(key) + len(value or b"") for key, value in missed.items())
    assert three_state["path"] == "delta", three_state
    # NB: 24 B a record of row header, the one key written since, request rows and state; a full copy is 2.5 MB.
    assert changed <= three_state["bytes_received_total"] <= 1.1 * (changed + 24 * 300) + 2_000, three_state
    assert asker.read(three, TABLE, list(missed), consistency="local") == missed


def test_far_behind_replica_copies_in_bulk(nodes: Nodes, asker: Asker) -> None:
    """K23: more missed changes than fit into one answer travel over the bulk port as a delta; the replica ends
    equal.
    """
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=1)
    asker.write(one, TABLE, numbered(0, 10_000, "old"))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    nodes["node-3"].kill()
    for first in range(0, 10_000, 2_000):
        asker.write(one, TABLE, numbered(5_000 + first, 7_000 + first, "n" * 600))
    nodes["node-3"].start().wait_ready()
    replicas = wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    (three_state,) = [replica for replica in replicas if replica["node"] == "node-3"]
    assert three_state["path"] == "delta", three_state
    assert "more changes than fit" in three_state["reason"], three_state
    assert three_state["bytes_received_total"] > 0, three_state


def test_wiped_replica_takes_a_full_copy(nodes: Nodes, asker: Asker) -> None:
    """F13: a wiped node comes back under its name with another id, SEEDING, and is never asked as if it were
    current.
    """
    one, three = nodes["node-1"].address, nodes["node-3"].address
    asker.create(one, TABLE, tablets=1)
    expected = numbered(0, 10_000, "v" * 600)
    for first in range(0, 10_000, 2_500):
        asker.write(one, TABLE, dict(list(expected.items())[first : first + 2_500]))
    before = {node["name"]: node["id"] for node in asker.status(one)["nodes"]}
    nodes["node-3"].kill()
    shutil.rmtree(nodes["node-3"].data)
    nodes["node-3"].start().wait_ready()
    replicas = wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    (three_state,) = [replica for replica in replicas if replica["node"] == "node-3"]
    assert three_state["path"] == "full", three_state
    assert asker.everything(three, TABLE, consistency="local") == expected
    after = {node["name"]: node["id"] for node in asker.status(one)["nodes"]}
    assert after["node-3"] != before["node-3"]
    assert after["node-1"] == before["node-1"]
