"""member: who belongs to the cluster, and who leads it."""

from __future__ import annotations

import click

from srengine.cli.application import Group
from srengine.cli.settings import Settings, pass_settings

_COLUMNS = ("name", "id", "address", "role", "state", "alive", "stable", "journal_lag")
_ROLES = click.Choice(["follower", "observer"])


@click.group(cls=Group)
def member() -> None:
    """Members: the nodes of the cluster."""


@member.command("list")
@pass_settings
def list_members(settings: Settings) -> None:
    """Print each member: name, id, address, role, state, whether it is alive and stable, how far its journal lags."""
    with settings.connect() as cluster:
        rows = cluster.members()
    settings.out.many(({name: row.get(name) for name in _COLUMNS} for row in rows), list(_COLUMNS))


@member.command("add")
@click.argument("name")
@click.option("--role", type=_ROLES, default="follower", show_default=True, help="Whether it will vote.")
@click.option(
    "--key", "public_key", default="", metavar="KEY", help="Public key of the new node, as node init prints it."
)
@pass_settings
def add(settings: Settings, *, name: str, role: str, public_key: str) -> None:
    """Print a one-time ticket with which a new node NAME may join: node start --join … --ticket TICKET.

    Where the cluster runs with keys, KEY is needed: nodes let the new one in by it. Exit code 5 when a living member
    has the name. A member whose directory was lost is let in again with a new ticket.
    """
    with settings.connect() as cluster:
        ticket = cluster.add_member(name, role=role, public_key=public_key)
    settings.out.one({"name": name, "role": role, "ticket": ticket}, ticket)


@member.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also when those left alive are no majority. Nothing can be written then.")
@pass_settings
def remove(settings: Settings, *, name: str, force: bool) -> None:
    """Remove the member NAME; its process ends with exit code 12.

    Exit codes: 13 for the leader (transfer-leader first), 10 when there is no such member, 4 when a majority would be
    lost.
    """
    with settings.connect() as cluster:
        cluster.remove_member(name, force=force)
    settings.out.one({"name": name, "removed": True}, name)


@member.command("update-address")
@click.argument("name")
@click.argument("address", metavar="tcp://HOST:PORT")
@pass_settings
def update_address(settings: Settings, *, name: str, address: str) -> None:
    """Say where clients reach the member NAME now; exit code 5 when another member has the address."""
    with settings.connect() as cluster:
        cluster.update_address(name, address)
    settings.out.one({"name": name, "address": address}, f"{name}\t{address}")


@member.command("set-role")
@click.argument("name")
@click.argument("role", type=_ROLES)
@pass_settings
def set_role(settings: Settings, *, name: str, role: str) -> None:
    """Make the member NAME a follower (votes) or an observer (never votes); exit code 13 for the leader."""
    with settings.connect() as cluster:
        cluster.set_role(name, role)
    settings.out.one({"name": name, "role": role}, f"{name}\t{role}")


@member.command("transfer-leader")
@click.argument("target", required=False)
@pass_settings
def transfer_leader(settings: Settings, *, target: str | None) -> None:
    """Hand leadership to TARGET, or to the member that holds most; print the new leader.

    Exit code 13 when that is not possible now; the leader stays then.
    """
    with settings.connect() as cluster:
        leader = cluster.transfer_leader(target)
    settings.out.one({"leader": leader}, leader)
