"""Three real nodes: records rot on a disk, one node or another, and all end equal by themselves."""

from __future__ import annotations

import json
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


class Repaired:
    """True once a copy was repaired and two whole scrubs after that found nothing more to repair."""

    def __init__(self, asker: Asker, address: str, name: str) -> None:
        self._asker, self._address, self._name = asker, address, name
        self._repairs = 0
        self._scrubs: set[float] = set()

    def __call__(self) -> bool:
        rows = self._asker.settled(self._address, TABLE)
        if not rows:
            return False
        (row,) = [row for row in rows if row["node"] == self._name]
        if row["repairs"] != self._repairs:
            self._repairs, self._scrubs = row["repairs"], set()
        if row["scrubbed_at"]:
            self._scrubs.add(row["scrubbed_at"])
        # The first of them may stand from before the last repair, the second may have begun before it.
        return bool(self._repairs) and len(self._scrubs) >= 3


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


def everything(data: Path, tablet_id: str) -> None:
    """Let rot on several records each what can rot."""
    rot.add(data, tablet_id, {b"a": KEYS[0], b"key-000150x": KEYS[1], b"z": KEYS[2]})
    rot.flip_value(data, tablet_id, [b"key-000010", b"key-000011"])
    rot.flip_header(data, tablet_id, [b"key-000020", b"key-000290"])
    rot.remove(data, tablet_id, KEYS)
    rot.lose_change(data, tablet_id, 100)


ROT["everything"] = everything


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("value", "node-1"),
        ("removed", "node-1"),
        ("added", "node-3"),
        ("change", "node-3"),
        ("header", "node-2"),
        ("everything", "node-1"),
        ("everything", "node-2"),
        ("everything", "node-3"),
    ],
)
def test_rot_is_found_by_the_scrub_and_repaired(scrubbed: Nodes, asker: Asker, kind: str, name: str) -> None:
    """K11, T11, F10: three records flipped, removed or added behind the engine on any node, the first member too: the
    scrub finds it, the right side is kept, all copies end sound and equal.
    """
    one = scrubbed["node-1"].address
    tablet_id, expected = filled(asker, one)
    node = scrubbed[name]
    node.kill()
    ROT[kind](node.data, tablet_id)
    node.start().wait_ready()

    wait_for(Repaired(asker, one, name), f"{name} repaired", 60.0)
    assert asker.everything(one, TABLE) == expected
    assert asker.everything(node.address, TABLE, consistency="local") == expected
    clean(scrubbed, tablet_id)


@pytest.mark.parametrize("name", ["node-1", "node-2"])
def test_a_read_that_meets_a_damaged_record_is_right_and_repairs_it(nodes: Nodes, asker: Asker, name: str) -> None:
    """K10, F10, T11: a value rotten on a node's disk is answered from another replica, by look-ups and by scans,
    and is right on the disk afterwards.
    """
    node, one = nodes[name], nodes["node-1"].address
    tablet_id, expected = filled(asker, one)
    node.kill()
    rot.flip_value(node.data, tablet_id, KEYS)
    node.start().wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    how = "quorum" if name == "node-1" else "local"
    assert asker.read(node.address, TABLE, KEYS[:1], consistency=how) == {KEYS[0]: expected[KEYS[0]]}
    assert asker.everything(node.address, TABLE, consistency=how) == expected
    (row,) = [row for row in asker.replicas(one, TABLE) if row["node"] == name]
    assert row["repairs"] == 3, row
    clean(nodes, tablet_id)


@pytest.mark.parametrize("name", ["node-1", "node-3"])
def test_a_damaged_page_is_replaced_by_a_copy(scrubbed: Nodes, asker: Asker, name: str) -> None:
    """T11, F10: a page that cannot be read is found by the scrub; the copy is replaced by a proved full one."""
    one, node = scrubbed["node-1"].address, scrubbed[name]
    tablet_id, expected = filled(asker, one)
    node.kill()
    rot.break_pages(node.data, tablet_id, KEYS[1])
    node.start().wait_ready()

    def replaced() -> bool:
        rows = asker.settled(one, TABLE)
        return bool(rows) and any(row["node"] == name and row["path"] == "full" for row in rows)

    wait_for(replaced, f"{name} replaced", 60.0)
    assert asker.everything(one, TABLE) == expected
    assert asker.everything(node.address, TABLE, consistency="local") == expected
    clean(scrubbed, tablet_id)


@pytest.mark.parametrize(("kind", "name"), [("removed", "node-1"), ("value", "node-3")])
def test_a_read_at_all_repairs_what_it_finds(nodes: Nodes, asker: Asker, name: str, kind: str) -> None:
    """K10: a look-up at `all` reads every replica's records; one that rotted or is missing on any of them, which
    nothing else has looked at, is right there afterwards, and the answer is the right one.
    """
    node, one = nodes[name], nodes["node-1"].address
    tablet_id, expected = filled(asker, one)
    node.kill()
    ROT[kind](node.data, tablet_id)
    node.start().wait_ready()
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    wanted = {key: expected[key] for key in KEYS}

    def answered() -> dict[bytes, bytes | None] | None:
        try:
            return asker.read(one, TABLE, KEYS, consistency="all", timeout_s=5.0)
        except (errors.NotReady, errors.NoQuorum):
            return None

    assert wait_for(answered, "an answer") == wanted

    def repaired() -> bool:
        return any(row["node"] == name and row["repairs"] for row in asker.replicas(one, TABLE))

    wait_for(repaired, f"{name} repaired")
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    clean(nodes, tablet_id)


def test_records_lost_under_writes_are_found_by_acknowledgements(nodes: Nodes, asker: Asker) -> None:
    """K11: records that the first member lost are missed by the next write to them: its replicas cannot follow, all
    prove themselves, and the first member becomes equal to a replica. Nothing acknowledged is lost.
    """
    one = nodes["node-1"]
    tablet_id, expected = filled(asker, one.address)
    one.kill()
    rot.remove(one.data, tablet_id, KEYS)
    one.start().wait_ready()
    for number in range(3):
        # Until the first member is repaired a write may end without an answer; the client's next attempt is a new one.
        changes: dict[bytes, bytes | None] = dict.fromkeys(KEYS, b"written-%d" % number)

        def written(changes: dict[bytes, bytes | None] = changes) -> bool:
            try:
                asker.write(one.address, TABLE, changes, timeout_s=3.0)
            except errors.Error:
                return False
            return True

        wait_for(written, "written", 60.0)
        expected |= changes
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal")
    assert asker.everything(one.address, TABLE) == expected
    (row,) = [row for row in asker.replicas(one.address, TABLE) if row["node"] == "node-1"]
    assert (row["path"], row["repairs"]) == ("sketch", 1), row
    clean(nodes, tablet_id)


def test_a_damaged_first_member_seeds_nobody(scrubbed: Nodes, asker: Asker) -> None:
    """K04: while the first member's copy is damaged it is no source; a wiped node is seeded once it was repaired."""
    one, three = scrubbed["node-1"], scrubbed["node-3"]
    tablet_id, expected = filled(asker, one.address)
    one.kill()
    three.kill()
    rot.remove(one.data, tablet_id, KEYS)
    shutil.rmtree(three.data)
    one.start().wait_ready()
    three.start().wait_ready()
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal", 60.0)

    def repaired() -> bool:
        return any(row["node"] == "node-1" and row["repairs"] for row in asker.replicas(one.address, TABLE))

    wait_for(repaired, "node-1 repaired", 60.0)
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal", 60.0)
    assert asker.everything(three.address, TABLE, consistency="local") == expected
    clean(scrubbed, tablet_id)


def test_a_directory_of_yesterday_takes_a_delta(nodes: Nodes, asker: Asker) -> None:
    """F14: a directory put back to an older state of the same lineage ends equal by what changed since, no copy."""
    one, three = nodes["node-1"].address, nodes["node-3"]
    tablet_id, expected = filled(asker, one)
    three.stop()
    shutil.copytree(three.data, three.data.with_name("yesterday"))
    three.start().wait_ready()
    changes = numbered(100, 140, "new")
    asker.write(one, TABLE, changes)
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    three.kill()
    shutil.rmtree(three.data)
    shutil.copytree(three.data.with_name("yesterday"), three.data)
    three.start().wait_ready()
    rows = wait_for(lambda: asker.settled(one, TABLE), "all replicas equal again")
    (row,) = [row for row in rows if row["node"] == "node-3"]
    assert row["path"] == "delta", row
    assert asker.everything(three.address, TABLE, consistency="local") == expected | changes
    clean(nodes, tablet_id)


def test_below_the_purge_mark_an_exchange_helps(nodes: Nodes, asker: Asker) -> None:
    """K05, K09: a replica from before the purge mark becomes equal by an exchange, with the reason; what was deleted
    and purged meanwhile does not come back.
    """
    one, two, three = nodes["node-1"], nodes["node-2"], nodes["node-3"]
    tablet_id, expected = filled(asker, one.address, 3000)
    three.kill()
    gone = dict.fromkeys(KEYS)
    asker.write(one.address, TABLE, gone)

    def followed() -> bool:
        return any(row["node"] == "node-2" and row["behind"] == 0 for row in asker.replicas(one.address, TABLE))

    wait_for(followed, "node-2 has it")
    one.stop()
    two.stop()
    with Store(one.data) as source, Store(two.data) as target:
        theirs, ours = source.open_tablet(tablet_id), target.open_tablet(tablet_id)
        theirs.purge(theirs.sequence)
        delta = theirs.delta_since(ours.sequence, bytes_max=1 << 20)
        assert delta is not None
        ours.apply_delta(delta)
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_ready()
    rows = wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal again")
    (row,) = [row for row in rows if row["node"] == "node-3"]
    assert row["path"] == "sketch", row
    assert "purge mark" in row["reason"], row
    assert row["bytes_received"] < 20_000, row
    assert asker.everything(three.address, TABLE, consistency="local") == {
        key: value for key, value in expected.items() if key not in gone
    }
    clean(nodes, tablet_id)


def test_sync_run_checks_compares_and_repairs(nodes: Nodes, asker: Asker) -> None:
    """K11, K27: a round reads every replica whole and says what came of each; a comparison of equal ones finds nothing;
    rot is named and repaired.
    """
    one, three = nodes["node-1"], nodes["node-3"]
    tablet_id, _ = filled(asker, one.address)
    rounds = run_round(asker, one.address)
    assert {
        name: (each["outcome"], each["records"], each["damages"]) for name, each in rounds.items()
    } == dict.fromkeys(NODES, ("equal", 300, 0))
    assert all(row["scrubbed_at"] for row in asker.replicas(one.address, TABLE))
    three.kill()
    rot.remove(three.data, tablet_id, KEYS[:1])
    rot.flip_value(three.data, tablet_id, KEYS[1:])
    three.start().wait_ready()
    wait_for(lambda: asker.settled(one.address, TABLE), "all replicas equal")
    found = run_round(asker, one.address)["node-3"]
    assert (found["outcome"], found["path"], found["repaired"]) == ("repaired", "sketch", 1), found
    again = run_round(asker, one.address)["node-3"]
    assert (again["outcome"], again["path"], again["repaired"]) == ("healed", "record", 2), again
    assert run_round(asker, nodes["node-2"].address)["node-3"]["outcome"] == "equal"
    clean(nodes, tablet_id)
