"""db and table: what the cluster holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from srengine.cli.application import Group
from srengine.cli.settings import Settings, pass_settings

if TYPE_CHECKING:
    from srengine.client.messages import TableInfo


@click.group(cls=Group)
def db() -> None:
    """Databases: names above tables."""


@db.command("create")
@click.argument("name")
@pass_settings
def create_database(settings: Settings, *, name: str) -> None:
    """Create the database NAME; exit code 5 when it exists."""
    with settings.connect() as cluster:
        cluster.create_database(name)
    settings.out.one({"name": name}, name)


@db.command("list")
@pass_settings
def list_databases(settings: Settings) -> None:
    """Print the names of all databases."""
    with settings.connect() as cluster:
        names = cluster.list_databases()
    settings.out.many(({"name": name} for name in names), ["name"])


@click.group(cls=Group)
def table() -> None:
    """Tables: records in tablets, tablets on nodes."""


@table.command("create")
@click.argument("name", metavar="DB.TABLE")
@click.option(
    "--replicas", type=click.IntRange(1, 9), default=3, show_default=True, help="Nodes that hold each tablet."
)
@click.option("--tablets", type=click.IntRange(1, 4096), default=8, show_default=True, help="Parts; fixed for ever.")
@pass_settings
def create_table(settings: Settings, *, name: str, replicas: int, tablets: int) -> None:
    """Create DB.TABLE; exit code 5 when it exists, 10 without the database."""
    with settings.connect() as cluster:
        info = cluster.create_table(name, tablets=tablets, replicas=replicas)
    settings.out.one(_summary(info), f"{info.name}\t{len(info.tablets)}\t{info.replicas}")


@table.command("list")
@click.argument("database", required=False, default="")
@pass_settings
def list_tables(settings: Settings, *, database: str) -> None:
    """Print all tables, or those of DATABASE: name, tablets, replicas."""
    with settings.connect() as cluster:
        tables = cluster.list_tables(database)
    settings.out.many((_summary(info) for info in tables), ["name", "tablets", "replicas"])


@table.command("describe")
@click.argument("name", metavar="DB.TABLE")
@pass_settings
def describe_table(settings: Settings, *, name: str) -> None:
    """Print where each tablet of DB.TABLE is: index, id, leader, replicas."""
    with settings.connect() as cluster:
        info = cluster.describe_table(name)
    tablets = [
        {"tablet": index, "id": tablet.id, "leader": tablet.leader, "replicas": list(tablet.replicas)}
        for index, tablet in enumerate(info.tablets)
    ]
    out = settings.out
    if out.format == "text":
        out.many(
            tablets,
            ["tablet", "id", "leader", "replicas"],
            lambda value: [value["tablet"], value["id"], value["leader"] or None, ",".join(value["replicas"])],
        )
    else:
        out.one({**_summary(info), "placement": tablets}, "")


def _summary(info: TableInfo) -> dict[str, Any]:
    return {"name": info.name, "tablets": len(info.tablets), "replicas": info.replicas}
