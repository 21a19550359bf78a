"""Real nodes whose journal is in an etcd."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.etcd import Etcd
from tests.node.cluster import Asker
from tests.node.coordination import put_until_done, wait_leader
from tests.processes import Nodes

pytestmark = [pytest.mark.processes, pytest.mark.requires_tool("etcd")]


def test_nodes_on_an_etcd(tmp_path: Path) -> None:
    """B33, H01: with --ha etcd three nodes found a cluster, agree on a leader, and another leads when it is killed."""
    for part in ("etcd", "nodes"):
        (tmp_path / part).mkdir()
    with Etcd(tmp_path / "etcd") as etcd:
        arguments = ["--ha", "etcd", "--etcd", ",".join(etcd.urls)]
        with Nodes(tmp_path / "nodes", arguments=arguments) as nodes, Asker() as asker:
            nodes.start_all()
            leader = wait_leader(asker, nodes)
            asker.put_register(nodes["node-2"].address, "r", b"old")
            asker.create(nodes["node-1"].address, "shop.orders")
            assert asker.get_register(nodes["node-3"].address, "r") == b"old"
            nodes[leader].kill()
            alive = [node.address for node in nodes if node.alive]
            put_until_done(asker, lambda: alive, "r", b"new")
            for address in alive:
                assert asker.get_register(address, "r") == b"new"
