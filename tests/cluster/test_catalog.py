"""The catalog and placement: names, conflicts, where replicas are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from srengine import errors
from srengine.cluster import catalog
from srengine.cluster.placement import place

MEMBERS = ["node-1", "node-2", "node-3", "node-4", "node-5"]


class Rows:
    """Tables as dictionaries."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[bytes, bytes]] = {}

    def get(self, table: str, key: bytes) -> bytes | None:
        return self.tables.get(table, {}).get(key)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self.tables.setdefault(table, {})[key] = value

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(self.tables.get(table, {})):
            if (start is None or key >= start) and (stop is None or key < stop):
                yield key, self.tables[table][key]


def create_database(rows: Rows, name: str) -> None:
    body = msgspec.msgpack.encode(catalog.CreateDatabase(name))
    catalog.CatalogApplier().apply(rows, 1, catalog.CREATE_DATABASE, body)


def create_table(rows: Rows, table: catalog.Table, index: int = 2) -> None:
    catalog.CatalogApplier().apply(
        rows, index, catalog.CREATE_TABLE, msgspec.msgpack.encode(catalog.CreateTable(table))
    )


def test_a_table_comes_back_as_designed() -> None:
    """Tree, ids, lineages, seeds and replicas survive the journal; the index of its entry is noted."""
    rows = Rows()
    create_database(rows, "shop")
    table = catalog.design_table("shop.orders", tablets=4, replicas=3, members=MEMBERS)
    create_table(rows, table, 7)
    (found,) = catalog.read_tables(rows)
    assert found == msgspec.structs.replace(table, created_index=7)
    assert [database.name for database in catalog.read_databases(rows)] == ["shop"]
    assert [tablet.number for tablet in found.tablets] == [0, 1, 2, 3]
    assert len({tablet.id for tablet in found.tablets} | {tablet.lineage for tablet in found.tablets}) == 8
    assert all(tablet.leader == "node-1" for tablet in found.tablets)


def test_refusals() -> None:
    """Twice the same name is Conflict; no database is NotFound; a name that cannot be is InvalidValue; nothing
    changes.
    """
    rows = Rows()
    table = catalog.design_table("shop.orders", tablets=1, replicas=1, members=MEMBERS)
    with pytest.raises(errors.NotFound):
        create_table(rows, table)
    create_database(rows, "shop")
    create_table(rows, table)
    before = {name: dict(content) for name, content in rows.tables.items()}
    with pytest.raises(errors.Conflict):
        create_database(rows, "shop")
    with pytest.raises(errors.Conflict):
        create_table(rows, catalog.design_table("shop.orders", tablets=2, replicas=1, members=MEMBERS))
    for name in ("", "a/b", "../x", "a.b", ".a", "x" * 129):
        with pytest.raises(errors.InvalidValue):
            create_database(rows, name)
    assert rows.tables == before


@pytest.mark.parametrize(
    "name", ["orders", "shop.", ".orders", "shop.or ders", "shop./etc", "shop.x\x00", "a" * 200 + ".b"]
)
def test_table_names_that_cannot_be(name: str) -> None:
    """F40: a table is DATABASE.TABLE, both of plain names."""
    with pytest.raises(errors.InvalidValue):
        catalog.design_table(name, tablets=1, replicas=1, members=MEMBERS)


@pytest.mark.parametrize(("tablets", "replicas"), [(0, 1), (1025, 1), (1, 0), (1, 6)])
def test_counts_that_cannot_be(tablets: int, replicas: int) -> None:
    """More replicas than members, or no tablets, is refused before anything is proposed."""
    with pytest.raises(errors.InvalidValue):
        catalog.design_table("shop.orders", tablets=tablets, replicas=replicas, members=MEMBERS)


def test_the_seed_is_not_shown() -> None:
    """F51: the secret seed of a tablet is in no rendering of the catalog."""
    table = catalog.design_table("shop.orders", tablets=1, replicas=1, members=MEMBERS)
    assert repr(table.tablets[0].seed) not in repr(table)
    assert table.tablets[0].seed.hex() not in repr(table)


def test_every_replica_set_holds_the_first_member() -> None:
    """The first member leads every tablet; the others share the rest evenly and everybody computes the same."""
    ids = [f"{number:032x}" for number in range(400)]
    placed = [place(tablet_id, MEMBERS, 3) for tablet_id in ids]
    assert all(nodes[0] == "node-1" and len(set(nodes)) == 3 for nodes in placed)
    assert placed == [place(tablet_id, list(MEMBERS), 3) for tablet_id in ids]
    counts = Counter(node for nodes in placed for node in nodes[1:])
    assert set(counts) == set(MEMBERS[1:])
    assert all(130 < count < 270 for count in counts.values()), counts


def test_a_lost_member_moves_only_what_it_held() -> None:
    """Rendezvous: without one member every other replica stays where it is."""
    for number in range(200):
        tablet_id = f"{number:032x}"
        before = set(place(tablet_id, MEMBERS, 3))
        after = set(place(tablet_id, MEMBERS[:-1], 3))
        assert before - {"node-5"} <= after
