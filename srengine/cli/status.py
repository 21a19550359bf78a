"""status and sync status: the cluster at a glance, and each replica of each tablet."""

from __future__ import annotations

from typing import Any

import click

from srengine import errors
from srengine.cli.application import Command, Group
from srengine.cli.output import one_line
from srengine.cli.settings import Settings, pass_settings, suggestion

_NODE_COLUMNS = ("name", "address", "role", "state", "alive", "sync", "disk_used", "disk_free")
_REPLICA_COLUMNS = (
    "table",
    "tablet",
    "node",
    "leader",
    "term",
    "state",
    "sequence",
    "behind",
    "root",
    "verified_at",
    "bytes_received",
    "path",
    "reason",
    "scrubbed_at",
    "scrub_records",
    "repairs",
    "quarantined",
)
_ROUND_COLUMNS = (
    "table",
    "tablet",
    "node",
    "leader",
    "outcome",
    "records",
    "damages",
    "repaired",
    "bytes",
    "rounds",
    "path",
    "reason",
)
_RIGHT = frozenset({"equal", "healed", "repaired", "moving"})


@click.command(cls=Command)
@click.option("--node", "name", default="", metavar="NAME", help="Only this node.")
@pass_settings
def status(settings: Settings, *, name: str) -> None:
    """Print the cluster at a glance: who leads, which nodes are there, which tables."""
    with settings.connect() as cluster:
        seen = cluster.status(name)
    if name:
        nodes = {node["name"]: node for node in seen.get("nodes", [])}
        if name not in nodes:
            raise errors.NotFound(f"there is no node {name!r}{suggestion(name, nodes)}", node=name)
        seen["nodes"] = [nodes[name]]
    settings.out.one(seen, lambda: _as_text(seen))


def _as_text(seen: dict[str, Any]) -> str:
    cluster = seen.get("cluster", {})
    first = (
        f"cluster\t{one_line(cluster.get('name'))}\tid={one_line(cluster.get('id'))}\tleader={one_line(seen.get('leader'))}"
        f"\tepoch={one_line(seen.get('epoch'))}\tterm={one_line(seen.get('term'))}"
        f"\tconfig_version={one_line(seen.get('config_version'))}"
    )
    lines = [first]
    for node in seen.get("nodes", []):
        facts = "\t".join(f"{name}={one_line(node.get(name))}" for name in _NODE_COLUMNS[1:])
        lines.append(f"node\t{one_line(node.get('name'))}\t{facts}")
    for table in seen.get("tables", []):
        facts = "\t".join(f"{name}={one_line(value)}" for name, value in table.items() if name != "name")
        lines.append(f"table\t{one_line(table.get('name'))}\t{facts}")
    return "\n".join(lines)


@click.group(cls=Group)
def sync() -> None:
    """Replicas: how far each one is."""


@sync.command("status")
@click.argument("table", required=False, default="")
@pass_settings
def sync_status(settings: Settings, *, table: str) -> None:
    """Print each replica of each tablet (of TABLE): state, position, what the last catch-up moved and why."""
    with settings.connect() as cluster:
        replicas = cluster.sync_status(table)
    settings.out.many(replicas, _REPLICA_COLUMNS)


@sync.command("run")
@click.argument("table", required=False, default="")
@click.option("--wait", "wait_s", type=float, default=600.0, show_default=True, metavar="S", help="Time for the round.")
@click.pass_context
@pass_settings
def sync_run(settings: Settings, context: click.Context, *, table: str, wait_s: float) -> None:
    """Read every replica (of TABLE) whole now, compare it with its leader, repair it; print what came of each.

    Ends with 7 when a replica is not right afterwards.
    """
    with settings.connect() as cluster:
        rounds = cluster.sync_run(table, timeout_s=wait_s)
    settings.out.many(rounds, _ROUND_COLUMNS)
    if any(each["outcome"] not in _RIGHT for each in rounds):
        context.exit(errors.CorruptionError.exit_code)
