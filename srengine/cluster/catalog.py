"""The catalog: which databases, tables and tablets exist, and where their replicas should be.

::

    Database -> Table -> Partition -> Index -> Tablet -> Replica
    shop        orders   p0 (all keys)  base     0..7      node-1 (leads), node-2, node-3

A table has one partition that spans all keys, and one index, ``base``, which is the table itself; both stand in the
tree so that range partitions and secondary indexes find their place. A key belongs to tablet ``XXH3-64(key, seed 0) mod
count``, and the count is fixed when the partition is made.

A tablet's lineage and seed are minted by the proposer and stand in its catalog entry: every replica makes the same
empty tablet by itself. NB: the seed is a secret of the cluster; it is never logged and never leaves in answers to
clients.

Changes are commands of the journal (`CreateDatabase`, `CreateTable`), decided when applied: equal everywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import msgspec

from srengine import errors, limits, types
from srengine.cluster.placement import place

DATABASE_TABLE: Final = "databases"
TABLE_TABLE: Final = "tables"
CREATE_DATABASE: Final = "cluster.create_database"
CREATE_TABLE: Final = "cluster.create_table"


class Replica(msgspec.Struct, frozen=True):
    """One node's copy of a tablet; ``node`` is a member's name."""

    node: str


class Tablet(msgspec.Struct, frozen=True):
    """One tablet: ``replicas[0]`` leads."""

    id: str
    number: int
    lineage: str
    seed: bytes
    replicas: tuple[Replica, ...]

    @property
    def leader(self) -> str:
        """Name of the node that leads."""
        return self.replicas[0].node

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that hold a replica, the leader's first."""
        return tuple(replica.node for replica in self.replicas)

    def __repr__(self) -> str:
        return f"Tablet(id={self.id!r}, number={self.number}, nodes={self.nodes!r})"


class Index(msgspec.Struct, frozen=True):
    """The tablets that hold one index of a partition; ``base`` is the records themselves."""

    name: str
    tablets: tuple[Tablet, ...]


class Partition(msgspec.Struct, frozen=True):
    """A range of keys, ``start`` inclusive to ``stop`` exclusive, None: unbounded."""

    name: str
    indexes: tuple[Index, ...]
    start: bytes | None = None
    stop: bytes | None = None


class Table(msgspec.Struct, frozen=True):
    """One table. ``name`` is ``database.table``; ``created_index``: of the journal, orders tables by age."""

    name: str
    replicas: int
    partitions: tuple[Partition, ...]
    created_index: int = 0

    @property
    def database(self) -> str:
        """Name of its database."""
        return self.name.partition(".")[0]

    @property
    def tablets(self) -> tuple[Tablet, ...]:
        """Tablets of the base index in the order of their numbers."""
        return self.partitions[0].indexes[0].tablets


class Database(msgspec.Struct, frozen=True):
    """A name space of tables."""

    name: str
    created_index: int = 0


class CreateDatabase(msgspec.Struct, frozen=True):
    """Command: `Conflict` when it exists."""

    name: str


class CreateTable(msgspec.Struct, frozen=True):
    """Command: `NotFound` without the database, `Conflict` when the table exists."""

    table: Table


class Rows(Protocol):
    """Tables of the metadata store as this room reads them."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """Return a value, None without one."""
        ...

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order, ``start`` inclusive, ``stop`` exclusive."""
        ...


class WritableRows(Rows, Protocol):
    """The same inside a transaction."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set a value."""
        ...


def check_table_name(name: str) -> str:
    """Return ``name`` if it is ``database.table``; `InvalidValue` otherwise. The database's name has no dot.

    >>> check_table_name("shop.orders")
    'shop.orders'
    """
    database, dot, table = name.partition(".")
    if not dot:
        raise errors.InvalidValue(f"table {name[:80]!r} is not written DATABASE.TABLE", name=name[:80])
    types.check_name(database, "database")
    types.check_name(table, "table")
    return name


def design_table(name: str, *, tablets: int, replicas: int, members: Sequence[str]) -> Table:
    """Return a new table with fresh tablet ids, lineages and seeds, placed on ``members`` (the first leads).

    Raises `InvalidValue` for a bad name, count of tablets or of replicas.
    """
    check_table_name(name)
    if not 1 <= tablets <= limits.TABLETS_PER_TABLE_MAX:
        raise errors.InvalidValue(
            f"a table has 1 to {limits.TABLETS_PER_TABLE_MAX} tablets, not {tablets}", tablets=tablets
        )
    made = []
    for number in range(tablets):
        tablet_id = secrets.token_hex(16)
        nodes = place(tablet_id, members, replicas)
        made.append(
            Tablet(
                id=tablet_id,
                number=number,
                lineage=secrets.token_hex(16),
                seed=secrets.token_bytes(8),
                replicas=tuple(Replica(node) for node in nodes),
            )
        )
    return Table(name, replicas, (Partition("p0", (Index("base", tuple(made)),)),))


class CatalogApplier:
    """Applies the catalog's commands; see `srengine.ha.metadata.Applier`."""

    kinds: Sequence[str] = (CREATE_DATABASE, CREATE_TABLE)
    tables: Sequence[str] = (DATABASE_TABLE, TABLE_TABLE)

    def apply(self, tables: WritableRows, index: int, kind: str, body: bytes) -> None:
        """Change the catalog, or refuse."""
        if kind == CREATE_DATABASE:
            self._create_database(tables, index, msgspec.msgpack.decode(body, type=CreateDatabase))
        else:
            self._create_table(tables, index, msgspec.msgpack.decode(body, type=CreateTable).table)

    def _create_database(self, tables: WritableRows, index: int, command: CreateDatabase) -> None:
        # A dot would make "a.b" both a database and a table.
        if "." in types.check_name(command.name, "database"):
            raise errors.InvalidValue(f"the name of database {command.name} must not contain a dot", name=command.name)
        key = command.name.encode()
        if tables.get(DATABASE_TABLE, key) is not None:
            raise errors.Conflict(f"database {command.name} exists", name=command.name)
        tables.put(DATABASE_TABLE, key, msgspec.msgpack.encode(Database(command.name, index)))

    def _create_table(self, tables: WritableRows, index: int, table: Table) -> None:
        check_table_name(table.name)
        if tables.get(DATABASE_TABLE, table.database.encode()) is None:
            raise errors.NotFound(f"there is no database {table.database}", name=table.database)
        key = table.name.encode()
        if tables.get(TABLE_TABLE, key) is not None:
            raise errors.Conflict(f"table {table.name} exists", name=table.name)
        tables.put(TABLE_TABLE, key, msgspec.msgpack.encode(msgspec.structs.replace(table, created_index=index)))


def read_databases(rows: Rows) -> list[Database]:
    """Return all databases in order of their names."""
    return [msgspec.msgpack.decode(value, type=Database) for _, value in rows.scan(DATABASE_TABLE)]


def read_tables(rows: Rows) -> list[Table]:
    """Return all tables in order of their names."""
    return [msgspec.msgpack.decode(value, type=Table) for _, value in rows.scan(TABLE_TABLE)]
