"""node: make a node's directory, and run a node in the foreground."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import click

from srengine import errors, types
from srengine.cli.application import Group
from srengine.cli.output import dump
from srengine.cli.settings import Settings, pass_settings

_PR_SET_PDEATHSIG: Final = 1


@click.group(cls=Group)
def node() -> None:
    """Nodes: the processes that hold the data."""


@node.command("init")
@click.option("--data", required=True, metavar="DIR", help="Directory of the node; made if it is not there.")
@click.option("--cluster", required=True, metavar="NAME", help="Cluster that the node is for.")
@click.option("--name", required=True, metavar="NAME", help="Name of the node.")
@pass_settings
def init(settings: Settings, *, data: str, cluster: str, name: str) -> None:
    """Make a node's directory (0700) with identity and keys; print its id and public key.

    Exit code 5 when the directory has an identity already; nothing is changed then.
    """
    from srengine.node.identity import load_identity, new_identity, save_identity
    from srengine.security import ensure_node_keys
    from srengine.storage.files import make_private_directory

    types.check_name(name, "node")
    types.check_name(cluster, "cluster")
    directory = Path(data).absolute()
    make_private_directory(directory)
    known = load_identity(directory)
    if known is not None:
        raise errors.Conflict(
            f"{directory} is the directory of node {known.identity.name} already", path=str(directory)
        )
    keys = ensure_node_keys(directory)
    identity = new_identity(name, cluster)
    save_identity(directory, identity)
    facts = {
        "name": name,
        "cluster": cluster,
        "node_id": identity.node_id,
        "public_key": keys.public.hex(),
        "data": str(directory),
    }
    settings.out.one(facts, "\t".join(f"{key}={value}" for key, value in facts.items()))


def _node_option(name: str, help_text: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option that may also come from the environment, else from the file."""
    environment = "SRENGINE_" + name.removeprefix("--").upper().replace("-", "_")
    return click.option(name, help=help_text, default=None, envvar=environment, show_envvar=True, **attributes)


@node.command("start")
@_node_option("--name", "Name of the node.", metavar="NAME")
@_node_option("--data", "Directory of the node.", metavar="DIR")
@_node_option("--listen", "Address for clients; peers use the next port, bulk the one after.", metavar="tcp://H:P")
@_node_option("--peer-listen", "Address for other nodes.", metavar="tcp://H:P")
@_node_option("--bulk-listen", "Address for copies between nodes.", metavar="tcp://H:P")
@_node_option("--cluster", "Name of the cluster; a directory of another one is refused.", metavar="NAME")
@_node_option(
    "--initial", "All first members, the same at each; the first one leads the tablets.", metavar="N=tcp://H:P[#KEY],…"
)
@_node_option("--join", "A member of the running cluster to enter.", metavar="tcp://H:P[#KEY]")
@_node_option("--ticket", "What member add printed for this node.", metavar="TICKET")
@_node_option("--role", "Whether the node votes.", type=click.Choice(["follower", "observer"]))
@_node_option("--ha", "Backend of coordination: raft, etcd, or one of an installed package.", metavar="NAME")
@_node_option("--etcd", "The cluster's etcd, for --ha etcd.", metavar="http://H:P[,…]")
@_node_option("--insecure", "Listen on routable addresses without keys, accept open permissions.", is_flag=True)
@_node_option("--allow-remote-fs", "Accept a network file system. Locks and fsync may lie there.", is_flag=True)
@_node_option("--map-bytes", "First size of each tablet's memory map.", type=click.IntRange(min=1), metavar="N")
@_node_option(
    "--scrub-bytes-s", "Bytes a second that are read to look for rot; 0: none.", type=click.IntRange(min=0), metavar="N"
)
@_node_option(
    "--scrub-interval-s",
    "Seconds in which each tablet is read whole once.",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
)
@_node_option("--config", "Options from FILE (TOML), by their names.", metavar="FILE")
@click.option("--with-parent", is_flag=True, hidden=True, help="End with the process that started this one.")
@pass_settings
def start(settings: Settings, *, config: str | None, with_parent: bool, **given: Any) -> None:
    """Run a node in the foreground until SIGTERM or Ctrl-C, which end it in order.

    Prints one JSON line {"event": "ready", …} on stdout when it can serve; its diary is JSON lines on stderr.
    Precedence: option, environment, --config FILE, default. The file may set more (docs/cli.md, Options of a node).
    """
    from srengine.node import NodeOptions, load_options_file, log_to_stderr, parse_initial, run_node

    if with_parent:
        _end_with_parent()
    values = {} if config is None else load_options_file(Path(config))
    values.update({name: value for name, value in given.items() if value is not None})
    missing = [name for name in ("name", "data", "listen") if not values.get(name)]
    if missing:
        raise click.UsageError(f"--{missing[0]} is missing")
    if isinstance(values.get("initial"), str):
        values["initial"] = parse_initial(values["initial"])
    known = {field.name for field in fields(NodeOptions)}
    assert set(values) <= known, (set(values), known)
    values["data"] = Path(values["data"]).absolute()
    log_to_stderr(values["name"])

    def ready(event: dict[str, Any]) -> None:
        # Machines wait for this line whatever the format: it is JSON in all of them.
        settings.out.line(dump(event))
        settings.out.flush()

    run_node(NodeOptions(**values), ready)


def _end_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends, however that happens (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        parent = os.getppid()
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent or parent == 1:  # It ended before we could ask.
            sys.exit(errors.Error.exit_code)
