"""A node that applies nothing any more, though it lives and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from srengine import errors
from tests.node.cluster import Asker
from tests.node.coordination import put_until_done, rows_of, wait_leader
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_node_whose_applying_stands_still_is_not_ready(tmp_path: Path, who: str) -> None:
    """H17: the thread that applies the journal stands still on one node: it stops being ready, says why, and serves no
    old value; a leader gives up, so that the others go on. When the thread goes on the node is ready again.
    """
    (tmp_path / "nodes").mkdir()
    with Nodes(tmp_path / "nodes") as nodes, Asker() as asker:
        for node in nodes:
            node.environment = {
                "SRENGINE_FAILPOINTS": "journal.apply=hold",
                "SRENGINE_FAILPOINTS_HOLD": str(tmp_path / node.name),
            }
        nodes.start_all()
        leader = wait_leader(asker, nodes)
        victim = next(node for node in nodes if (node.name == leader) == (who == "leader"))
        others = [node for node in nodes if node is not victim]

        def ready(name: str) -> bool:
            return bool(rows_of(asker, others[0].address)[name]["ready"])

        for node in nodes:
            wait_for(lambda name=node.name: ready(name), f"{node.name} is ready")
        (tmp_path / victim.name).touch()
        put_until_done(asker, lambda: [node.address for node in nodes], "r", b"new")
        wait_for(lambda: not ready(victim.name), f"{victim.name} is not ready")
        row = rows_of(asker, others[0].address)[victim.name]
        assert row["alive"]
        assert "not what the leader called committed" in row["why_not_ready"]
        wait_leader(asker, nodes, [node.name for node in others], but=victim.name)
        with pytest.raises(errors.TimedOut):
            asker.get_register(victim.address, "r", timeout_s=1)
        for node in others:
            wait_for(lambda name=node.name: ready(name), f"{node.name} is ready")
        (tmp_path / victim.name).unlink()
        wait_for(lambda: ready(victim.name), f"{victim.name} is ready again")
        for node in nodes:
            assert asker.get_register(node.address, "r") == b"new"
