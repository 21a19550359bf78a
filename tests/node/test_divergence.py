"""Replicas that prove different histories: named, outvoted when others agree, and otherwise nothing is touched."""

from __future__ import annotations

from typing import Any

import pytest

from srengine import errors
from srengine.storage import Store
from tests.node.cluster import Asker, numbered
from tests.processes import NodeProcess, Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def tamper(node: NodeProcess, tablet_id: str, value: bytes = b"value") -> None:
    """Write to a replica behind the cluster's back: whole, and of another history."""
    with Store(node.data) as store:
        store.open_tablet(tablet_id).put(b"forged", value)


def holds(node: NodeProcess, tablet_id: str) -> bytes | None:
    """Return the forged value on the disk of a stopped node."""
    with Store(node.data) as store:
        return store.open_tablet(tablet_id).get(b"forged")


def alarms(asker: Asker, address: str) -> str:
    return " ".join(alarm for node in asker.status(address)["nodes"] for alarm in node["alarms"]).lower()


def row_of(asker: Asker, address: str, name: str) -> dict[str, Any]:
    (found,) = [row for row in asker.replicas(address, TABLE) if row["node"] == name]
    return found


def filled(asker: Asker, address: str, *, replicas: int = 3) -> str:
    asker.create(address, TABLE, tablets=1, replicas=replicas)
    asker.write(address, TABLE, numbered(0, 50))
    rows = wait_for(lambda: asker.settled(address, TABLE), "all replicas equal")
    return str(rows[0]["tablet_id"])


def test_a_replica_that_is_ahead_waits_to_be_passed(nodes: Nodes, asker: Asker) -> None:
    """P7, F14: a replica ahead of the leader is named and kept, for nothing replaces what is ahead; once the leader has
    passed it, two that agree outvote it and an exchange makes it equal.
    """
    one, three = nodes["node-1"].address, nodes["node-3"]
    tablet_id = filled(asker, one)
    three.stop()
    tamper(three, tablet_id)
    three.start().wait_ready()
    wait_for(lambda: "ahead" in str(row_of(asker, one, "node-3")["reason"]), "node-3 is named")
    assert row_of(asker, one, "node-3")["state"] == "STALE"
    assert "diverged" in alarms(asker, one)
    with pytest.raises(errors.NotReady, match=r"(?i)diverged"):
        asker.read(three.address, TABLE, [b"forged"], consistency="local", timeout_s=0.5)
    assert asker.read(three.address, TABLE, [b"forged"]) == {b"forged": None}
    three.stop()
    assert holds(three, tablet_id) == b"value"
    three.start().wait_ready()
    wait_for(lambda: "ahead" in str(row_of(asker, one, "node-3")["reason"]), "node-3 is named again")
    asker.write(one, TABLE, numbered(200, 210))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    assert row_of(asker, one, "node-3")["path"] == "sketch"
    assert asker.read(three.address, TABLE, [b"forged"], consistency="local") == {b"forged": None}


def test_a_replica_with_another_history_is_outvoted(nodes: Nodes, asker: Asker) -> None:
    """K11: a replica with another root where two agree proves itself, is outvoted, and becomes equal by an exchange."""
    one, three = nodes["node-1"].address, nodes["node-3"]
    tablet_id = filled(asker, one)
    three.stop()
    tamper(three, tablet_id)
    asker.write(one, TABLE, numbered(100, 105))
    three.start().wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    row = row_of(asker, one, "node-3")
    assert (row["path"], row["repairs"]) == ("sketch", 1), row
    assert row["bytes_received"] < 4000, row
    three.stop()
    assert holds(three, tablet_id) is None


def test_an_outvoted_first_member_repairs_itself(nodes: Nodes, asker: Asker) -> None:
    """K11: when the first member's copy tells another history at the sequence at which both others agree, it serves
    nothing until it has become equal to them.
    """
    one, two, three = nodes["node-1"], nodes["node-2"], nodes["node-3"]
    tablet_id = filled(asker, one.address)
    for node in nodes:
        node.stop()
    tamper(one, tablet_id, b"alone")
    tamper(two, tablet_id, b"together")
    with Store(two.data) as source, Store(three.data) as target:
        theirs, ours = source.open_tablet(tablet_id), target.open_tablet(tablet_id)
        delta = theirs.delta_since(ours.sequence, bytes_max=1 << 20)
        assert delta is not None
        ours.apply_delta(delta)
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_ready()
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal again")
    assert asker.read(one.address, TABLE, [b"forged"]) == {b"forged": b"together"}
    assert "leader_in_doubt" in alarms(asker, one.address)
    assert row_of(asker, one.address, "node-1")["path"] == "sketch"


def test_two_whole_histories_stop_a_tablet(nodes: Nodes, asker: Asker) -> None:
    """P7, K11: two replicas, both whole, with different roots at one sequence: an alarm names both, neither serves,
    nothing is deleted.
    """
    one = nodes["node-1"]
    tablet_id = filled(asker, one.address, replicas=2)
    (other,) = [row["node"] for row in asker.replicas(one.address, TABLE) if row["node"] != "node-1"]
    pair = [one, nodes[other]]
    for node in pair:
        node.stop()
    tamper(pair[0], tablet_id, b"one")
    tamper(pair[1], tablet_id, b"two")
    # The first member is not ready while it serves nothing, but it answers what it can.
    pair[1].start()
    pair[0].start()
    pair[1].wait_ready()

    def named() -> bool:
        try:
            said = alarms(asker, pair[1].address)
        except errors.Error:
            return False
        return "two_histories" in said and other in said

    wait_for(named, "an alarm names both", 60.0)
    with pytest.raises(errors.Error):
        asker.write(one.address, TABLE, {b"more": b"value"}, timeout_s=0.5)
    for node in pair:
        with pytest.raises(errors.Error):
            asker.read(node.address, TABLE, [b"forged"], consistency="local", timeout_s=0.5)
    for node in pair:
        node.kill()
    assert [holds(node, tablet_id) for node in pair] == [b"one", b"two"]
