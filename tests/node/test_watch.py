"""What runs out is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.cluster import Asker
from tests.node.coordination import rows_of, wait_leader
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes


def test_what_runs_out_is_an_alarm(tmp_path: Path) -> None:
    """H30: too little space, a slow way to a peer: an alarm in log and status of every node; with room, none."""
    options = tmp_path / "options.toml"
    options.write_text("disk_free_min = 1_000_000_000_000_000\nrtt_s_max = 0.0\n")
    (tmp_path / "nodes").mkdir()
    with Nodes(tmp_path / "nodes", 2, arguments=["--config", str(options)]) as nodes, Asker() as asker:
        nodes.start_all()
        leader = wait_leader(asker, nodes)

        def said(name: str, event: str) -> bool:
            return any(
                alarm.startswith(f"{event}: ") for alarm in rows_of(asker, nodes[leader].address)[name]["alarms"]
            )

        for node in nodes:
            for event in ("disk_low", "peer_slow"):
                wait_for(lambda name=node.name, event=event: said(name, event), f"{node.name} says {event}")
            assert '"event": "disk_low"' in node.log_tail(100_000)
    (tmp_path / "calm").mkdir()
    with Nodes(tmp_path / "calm", 1) as nodes, Asker() as asker:
        nodes.start_all()
        wait_leader(asker, nodes)
        assert rows_of(asker, nodes["node-1"].address)["node-1"]["alarms"] == []
