"""dev: a throw-away cluster on this machine that stays up until Ctrl-C."""

from __future__ import annotations

import threading
from pathlib import Path

import click

from srengine.cli.application import Command
from srengine.cli.settings import Settings, pass_settings
from srengine.cli.supervisor import LocalCluster, interrupted_by_termination

POLL_S = 0.5


@click.command(cls=Command)
@click.option("--nodes", "count", type=click.IntRange(1, 9), default=3, show_default=True, help="How many nodes.")
@click.option("--data", metavar="DIR", help="Keep the data here (default: a temporary directory, removed at the end).")
@pass_settings
def dev(settings: Settings, *, count: int, data: str | None) -> None:
    """Start a throw-away cluster, print its endpoints and what to try, and wait for Ctrl-C."""
    directory = None if data is None else Path(data).absolute()
    if directory is not None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with interrupted_by_termination(), LocalCluster(count, name="dev", directory=directory) as nodes:
        nodes.start()
        out = settings.out
        facts = {
            "event": "ready",
            "endpoints": nodes.endpoints,
            "directory": str(nodes.directory),
            "nodes": [
                {"name": node.name, "address": node.address, "pid": node.pid, "log": str(node.log)}
                for node in nodes.nodes.values()
            ],
        }
        out.one(facts, "\n".join(_text(nodes)))
        out.flush()
        ended = threading.Event()
        while not ended.wait(POLL_S):
            for node in nodes.nodes.values():
                if not node.alive:
                    out.event("ended", f"{node.name} has ended: {node.last_words()}", node=node.name)
                    return


def _text(nodes: LocalCluster) -> list[str]:
    return [
        *(f"node\t{node.name}\t{node.address}\tpid={node.pid}\tlog={node.log}" for node in nodes.nodes.values()),
        "",
        "In another terminal:",
        f"  export SRENGINE_ENDPOINT={nodes.endpoints}",
        "  srengine db create shop",
        "  srengine table create shop.orders",
        "  srengine put shop.orders 1001 '3 apples'",
        "  srengine get shop.orders 1001",
        "  srengine status",
        "  srengine sync status",
        "Ctrl-C ends the cluster and removes its data." if not nodes.keep else "Ctrl-C ends the cluster.",
    ]
