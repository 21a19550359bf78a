"""A node whose disk is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from srengine import errors
from srengine.client import messages
from tests.crash.children import small_file_system
from tests.node.cluster import Asker, numbered
from tests.node.coordination import put_until_done, rows_of, wait_leader
from tests.processes import Nodes, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.requires_root, pytest.mark.requires_tool("mount")]
TABLE = "shop.orders"


def fill(path: Path) -> None:
    """Write a file until nothing more goes onto its disk."""
    with path.open("wb", 0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Nodes, Path]]:
    """Three nodes; the directory of the first one is a small file system of its own."""
    with small_file_system(tmp_path / "node-1", "64m") as mount, Nodes(tmp_path) as nodes:
        yield nodes.start_all(), mount


def test_a_leader_whose_disk_is_full(small: tuple[Nodes, Path], asker: Asker) -> None:
    """H26, F07: nothing more goes onto the leader's disk: it gives up and says why, another one leads, and nothing that
    was acknowledged is lost. Its tables can be read and refuse writes. With space again it takes part by itself; its
    process is the same all the time.
    """
    nodes, mount = small
    one, two = nodes["node-1"], nodes["node-2"]
    process = one.process
    asker.create(one.address, TABLE)
    asker.write(one.address, TABLE, numbered(0, 100))
    if wait_leader(asker, nodes) != one.name:
        asker.ask(one.address, messages.TransferLeader(one.name))
        wait_for(lambda: wait_leader(asker, nodes) == one.name, "the first node leads")
    fill(mount / "ballast")
    acknowledged: list[str] = []

    def another_leads() -> bool:
        with contextlib.suppress(errors.Error):
            name = f"r{len(acknowledged)}"
            asker.put_register(one.address, name, os.urandom(60_000), timeout_s=2)
            acknowledged.append(name)
        return asker.leader(two.address) not in {None, one.name}

    wait_for(another_leads, "another one leads", 60)
    put_until_done(asker, lambda: [two.address], "after", b"v")
    wait_for(lambda: rows_of(asker, two.address)[one.name]["state"] == "UNKNOWN", "it follows nobody")
    row = rows_of(asker, two.address)[one.name]
    assert row["alive"] and not row["ready"], row
    assert any(alarm.startswith("journal_disk_full: ") for alarm in row["alarms"]), row
    with pytest.raises(errors.DiskFull):
        asker.write(one.address, TABLE, numbered(0, 3000, "x" * 500))
    assert asker.read(one.address, TABLE, [b"key-000007"]) == {b"key-000007": b"v-7"}
    (mount / "ballast").unlink()
    wait_for(lambda: rows_of(asker, two.address)[one.name]["ready"], "it takes part again")
    assert one.process is process
    assert one.alive
    for name in acknowledged:
        assert len(asker.get_register(one.address, name)) == 60_000
    assert asker.get_register(one.address, "after") == b"v"
    asker.write(one.address, TABLE, numbered(0, 3000, "y" * 500))
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal")
    assert asker.everything(two.address, TABLE) == numbered(0, 3000, "y" * 500)
