"""Who is who: process numbers of nodes, without I/O. Finds restored, cloned and doubled nodes, and who is reachable.

A node is a random id in its data directory; every start raises its *boot number* durably and draws a *nonce*. The pair
tells one process of a node from another. Whoever talks to a node remembers, durably and before answering, the highest
pair it saw: so a directory that was put back to an older state shows itself by a boot number that others have already
seen.

====================================================  ============================================================
a node shows                                          verdict
====================================================  ============================================================
the process that we know                              ACCEPTED
same id, higher boot number, directory not copied     ACCEPTED: it restarted (its lock file says the old one is dead)
same id, higher boot number, copied, old one heard    DUPLICATE
same id, boot number seen before, old one silent      STALE_BOOT: raise it above ``highest`` and trust nothing
same id, boot number seen before, old one heard       DUPLICATE
same id and nonce, higher boot number                 ACCEPTED: it has raised its number, nobody else runs
another id under a known name, old one silent         ACCEPTED: the node was wiped
another id under a known name, old one heard          DUPLICATE
====================================================  ============================================================

"Heard" means within ``CONTACT_S``. A process that was accepted once and is later told STALE_BOOT or DUPLICATE has been
replaced and must stop.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from srengine import limits


@dataclass(frozen=True, slots=True)
class Process:
    """One run of a node. ``boot_number`` counts from 1; ``nonce`` is random for each run."""

    node_id: str
    boot_number: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself with every question. ``copied``: the identity file is not the one that was written."""

    name: str
    process: Process
    copied: bool = False


class Verdict(enum.Enum):
    """What becomes of a process that talks to us, see the module's table."""

    ACCEPTED = "accepted"
    STALE_BOOT = "stale_boot"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Judged:
    """``highest``: the highest boot number seen of this id. ``persist``: write it down before anything is answered."""

    verdict: Verdict
    highest: int
    persist: Process | None = None


@dataclass(slots=True)
class _Live:
    process: Process
    heard_at: float


class RosterMachine:
    """Remembers the processes of all peers. ``seen``: what was persisted, (name, process), one for each node id."""

    def __init__(self, seen: Iterable[tuple[str, Process]]) -> None:
        self._seen: dict[str, Process] = {}
        self._ids: dict[str, str] = {}
        for name, process in seen:
            self._seen[process.node_id] = process
            self._ids[name] = process.node_id
        self._live: dict[str, _Live] = {}

    def hear(self, hello: Hello, now: float) -> Judged:
        """Judge a node that talks to us, and note that it is reachable if it is accepted."""
        process = hello.process
        live = self._live.get(hello.name)
        if live is not None and live.process == process:
            live.heard_at = now
            return Judged(Verdict.ACCEPTED, process.boot_number)
        heard = live is not None and now - live.heard_at <= limits.CONTACT_S
        living = heard and live is not None and not _is_same_run(live.process, process)
        seen = self._seen.get(process.node_id)
        highest = seen.boot_number if seen is not None else 0
        if seen is not None and seen != process and process.boot_number <= seen.boot_number:
            return Judged(Verdict.DUPLICATE if living else Verdict.STALE_BOOT, highest)
        if living and (hello.copied or (live is not None and live.process.node_id != process.node_id)):
            return Judged(Verdict.DUPLICATE, highest)
        self._live[hello.name] = _Live(process, now)
        if seen == process:
            return Judged(Verdict.ACCEPTED, highest)
        self._seen[process.node_id] = process
        self._ids[hello.name] = process.node_id
        return Judged(Verdict.ACCEPTED, process.boot_number, persist=process)

    def learn(self, name: str, process: Process) -> bool:
        """Note a process that answered us; return whether it is new and must be persisted before it is used."""
        self._ids[name] = process.node_id
        seen = self._seen.get(process.node_id)
        if seen is not None and process.boot_number <= seen.boot_number:
            return False
        self._seen[process.node_id] = process
        return True

    def seen(self, name: str) -> Process | None:
        """Return the highest process seen of the node that last bore the name."""
        return self._seen.get(self._ids.get(name, ""))

    def node_id(self, name: str) -> str | None:
        """Return the id under which a name was last heard in this run."""
        live = self._live.get(name)
        return None if live is None else live.process.node_id

    def alive(self, name: str, now: float) -> bool:
        """Return whether the node was heard within ``CONTACT_S``."""
        live = self._live.get(name)
        return live is not None and now - live.heard_at <= limits.CONTACT_S


def _is_same_run(one: Process, other: Process) -> bool:
    return (one.node_id, one.nonce) == (other.node_id, other.nonce)
