"""Replicas that prove different histories are named, and nothing of them is deleted."""

from __future__ import annotations

import pytest

from srengine import errors
from srengine.storage import Store
from tests.node.cluster import Asker, numbered
from tests.processes import NodeProcess, Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"


def tamper(node: NodeProcess, tablet_id: str) -> None:
    """Write to a replica behind the cluster's back."""
    with Store(node.data) as store:
        store.open_tablet(tablet_id).put(b"forged", b"value")


def stray(asker: Asker, address: str) -> dict[str, object] | None:
    (found,) = [row for row in asker.replicas(address, TABLE) if row["node"] == "node-3"]
    return found if "diverged" in str(found["reason"]).lower() else None


@pytest.mark.parametrize("meanwhile", [0, 5])
def test_a_replica_with_another_history_is_named(nodes: Nodes, asker: Asker, meanwhile: int) -> None:
    """P7: a replica ahead of the leader, or with another root at one sequence, is diverged: named, not SYNCED, kept."""
    one, three = nodes["node-1"].address, nodes["node-3"]
    asker.create(one, TABLE, tablets=1)
    asker.write(one, TABLE, numbered(0, 50))
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    tablet_id = asker.replicas(one, TABLE)[0]["tablet_id"]
    three.stop()
    tamper(three, tablet_id)
    if meanwhile:
        asker.write(one, TABLE, numbered(100, 100 + meanwhile))
    three.start().wait_ready()
    row = wait_for(lambda: stray(asker, one), "node-3 is named")
    assert row["state"] == "STALE", row
    # At an end of an entry the leader sees it, inside of one the replica, when the delta does not reach its root.
    alarms = [alarm for node in asker.status(one)["nodes"] for alarm in node["alarms"]]
    assert any("diverged" in alarm.lower() for alarm in alarms), alarms
    with pytest.raises(errors.NotReady, match=r"(?i)diverged"):
        asker.read(three.address, TABLE, [b"forged"], consistency="local", timeout_s=0.5)
    assert asker.read(three.address, TABLE, [b"forged"]) == {b"forged": None}
    asker.write(one, TABLE, numbered(200, 210))
    three.stop()
    with Store(three.data) as store:
        assert store.open_tablet(tablet_id).get(b"forged") == b"value"
