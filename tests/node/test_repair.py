"""Three real nodes: records rot on a disk, one node or another, and all end equal by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srengine import errors
from srengine.client import messages
from srengine.storage import Store
from tests.node import rot
from tests.node.cluster import Asker, numbered
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"
NODES = ["node-1", "node-2", "node-3"]


@pytest.fixture
def scrubbed(tmp_path: Path) -> Iterator[Nodes]:
    """Nodes that scrub all the time."""
    with Nodes(tmp_path, arguments=["--scrub-interval-s", "0.3"]) as started:
        yield started.start_all()


def filled(asker: Asker, address: str, count: int = 300) -> tuple[str, dict[bytes, bytes | None]]:
    """Make a table of one tablet; return the tablet's id and what is in it."""
    asker.create(address, TABLE, tablets=1)
    expected = numbered(0, count)
    asker.write(address, TABLE, expected)
    replicas = wait_for(lambda: asker.settled(address, TABLE), "all replicas equal")
    return str(replicas[0]["tablet_id"]), expected


def run_round(asker: Asker, address: str) -> dict[str, dict[str, object]]:
    import json

    reply = asker.ask(address, messages.SyncRun(TABLE, 60.0), timeout_s=70.0)
    return {each["node"]: each for each in json.loads(reply.message.rounds)}


def clean(nodes: Nodes, tablet_id: str) -> None:
    """Stop all nodes; each copy is sound from end to end, and all have one root."""
    roots = set()
    for node in nodes:
        node.stop()
        with Store(node.data) as store:
            tablet = store.open_tablet(tablet_id)
            report = tablet.verify()
            assert report.clean, (node.name, report.damages)
            roots.add((tablet.sequence, tablet.root))
    assert len(roots) == 1, roots


KEYS = [b"key-000003", b"key-000150", b"key-000299"]
ROT: dict[str, Callable[[Path, str], None]] = {
    "value": lambda data, tablet_id: rot.flip_value(data, tablet_id, KEYS),
    "header": lambda data, tablet_id: rot.flip_header(data, tablet_id, KEYS),
    "removed": lambda data, tablet_id: rot.remove(data, tablet_id, KEYS),
    "added": lambda data, tablet_id: rot.add(
        data, tablet_id, dict(zip([b"a", b"key-000150x", b"z"], KEYS, strict=True))
    ),
    "change": lambda data, tablet_id: rot.lose_change(data, tablet_id, 150),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("kind", sorted(ROT))
def test_rot_is_found_by_the_scrub_and_repaired(scrubbed: Nodes, asker: Asker, kind: str, name: str) -> None:
    """K11, T11, F10: three records flipped, removed or added behind the engine on any node, the first member too: the scrub
    finds it, the right side is kept, all copies end sound and equal.
    """
    one = scrubbed["node-1"].address
    tablet_id, expected = filled(asker, one)
    node = scrubbed[name]
    node.kill()
    ROT[kind](node.data, tablet_id)
    node.start().wait_ready()

    def repaired() -> bool:
        rows = asker.settled(one, TABLE)
        return bool(rows) and any(row["node"] == name and row["repairs"] for row in rows)

    wait_for(repaired, f"{name} repaired", 60.0)
    assert asker.everything(one, TABLE) == expected
    assert asker.everything(node.address, TABLE, consistency="local") == expected
    clean(scrubbed, tablet_id)
