"""demo: the main job on real input, with three real processes on this machine.

    1  three nodes start; a table of 8 tablets, a replica of each on every node
    2  every named character of the Unicode database goes in
    3  keys are added, changed and deleted, without a pause until step 6
    4  node-3 is killed with SIGKILL in the middle of it, and stays away for a while
    5  node-3 starts again; keys added while it was away are read at node-3 (consistency local) all the time
    6  node-3 is SYNCED, the writer stops, all roots become equal
    7  every record is read back from every node and compared with a Python dict

It fails unless all replicas are equal, every record is as the dict says, deleted keys stayed deleted, and no read at
node-3 ever said that there is no such key. Everything that is waited for is a condition; nothing waits for a time.
"""

from __future__ import annotations

import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import click
import msgspec

from srengine import errors
from srengine.cli.application import Command
from srengine.cli.output import Output
from srengine.cli.settings import Settings, pass_settings
from srengine.cli.supervisor import LocalCluster, NodeProcess, interrupted_by_termination, wait_until
from srengine.client import Client, Table, connect

TABLE: Final = "demo.unicode"
TABLETS: Final = 8
VICTIM: Final = "node-3"
LOAD_BATCH_RECORDS: Final = 4000
ADDED, CHANGED, DELETED = 50, 10, 5
"""Of each round of the writer, as in the rejoin scenario that every cluster has to survive."""
CALL_TIMEOUT_S: Final = 15.0
READ_TIMEOUT_S: Final = 0.5
"""Of one read at node-3: short, so that "I am not ready" is seen, too, not only waiting."""
WAITED_S: Final = 0.05
REJOIN_TIMEOUT_S: Final = 300.0
ROW_HEADER_BYTES: Final = 24
"""Of a record on the wire beside its key and value (docs/formats.md)."""


@click.command(cls=Command)
@click.option("--records", type=click.IntRange(min=100), metavar="N", help="Only the first N characters.")
@click.option("--keep", is_flag=True, help="Keep the nodes' directories and logs.")
@click.pass_context
@pass_settings
def demo(settings: Settings, context: click.Context, *, records: int | None, keep: bool) -> None:
    """Show a node that is killed under load come back: three processes, real records, proof that all are equal."""
    out = settings.out
    with interrupted_by_termination(), LocalCluster(3, name="demo", keep=keep) as nodes:
        if keep:
            out.event("directory", f"directories and logs: {nodes.directory}", directory=str(nodes.directory))
        summary = Demo(nodes, out).run(records)
    summary["directory"] = str(nodes.directory) if keep else None
    out.one(summary, lambda: _as_text(summary))
    context.exit(0 if summary["equal"] and not summary["problems"] else 1)


def characters() -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of every named character: the code point, and what the Unicode database says, as JSON."""
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        name = unicodedata.name(character, None)
        if name is not None:
            yield (
                b"U+%04X" % point,
                msgspec.json.encode(
                    {
                        "name": name,
                        "category": unicodedata.category(character),
                        "bidirectional": unicodedata.bidirectional(character),
                        "width": unicodedata.east_asian_width(character),
                        "decomposition": unicodedata.decomposition(character),
                        "numeric": unicodedata.numeric(character, None),
                    }
                ),
            )


class Writer:
    """Adds, changes and deletes keys without a pause; what is in ``model`` was acknowledged.

    A call that fails in a way that may pass is made again until acknowledged: its effect is the same however often.
    """

    def __init__(self, table: Table, model: dict[bytes, bytes]) -> None:
        self.model = model
        """Belongs to the writer's thread while it runs."""
        self.acknowledged = 0
        """Operations acknowledged so far."""
        self.added: list[bytes] = []
        """New keys in the order of their acknowledgement; never deleted by the writer."""
        self.deleted: set[bytes] = set()
        self.failure: BaseException | None = None
        self._table = table
        self._old = list(model)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-writer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the round that is under way; raise what made it fail."""
        self._stop.set()
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what made the writer fail."""
        if self.failure is not None:
            raise self.failure

    def reached(self, operations: int) -> bool:
        """Return whether so many operations are acknowledged."""
        self.check()
        return self.acknowledged >= operations

    def _run(self) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                self._round(number)
                number += 1
        except (errors.Error, OSError) as error:
            self.failure = error

    def _round(self, number: int) -> None:
        added = {b"new-%08d" % (number * ADDED + i): b"added in round %d" % number for i in range(ADDED)}
        changed = {self._old[(number * CHANGED + i) * 7919 % len(self._old)]: b"changed in round %d" % number
                   for i in range(CHANGED)}  # fmt: skip
        doomed = [self._old[(number * DELETED + i) * 104729 % len(self._old)] for i in range(DELETED)]
        pairs = {**added, **{key: value for key, value in changed.items() if key not in self.deleted}}
        while not self._acknowledged(lambda: self._table.put_many(pairs)):
            pass
        self.model.update(pairs)
        self.added.extend(added)
        self.acknowledged += len(pairs)
        doomed = [key for key in dict.fromkeys(doomed) if key in self.model]
        while not self._acknowledged(lambda: self._table.delete_many(doomed)):
            pass
        for key in doomed:
            del self.model[key]
        self.deleted.update(doomed)
        self.acknowledged += len(doomed)

    def _acknowledged(self, call: Any) -> bool:
        try:
            call()
        except errors.Error as error:
            if not error.retryable or self._stop.is_set():
                raise
            return False
        return True


@dataclass(slots=True)
class Reader:
    """Reads keys at one node that were added while it was away, and counts what it says."""

    node: NodeProcess
    keys: list[bytes]
    model_value: dict[bytes, bytes]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="demo-reader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def answered(self) -> int:
        """Reads that gave the right value."""
        return self.counts["right"] + self.counts["waited"]

    def _run(self) -> None:
        with connect(self.node.address, timeout_s=READ_TIMEOUT_S) as cluster:
            table = cluster.table(TABLE)
            number = 0
            while not self._stop.is_set():
                self._read(table, self.keys[number * 31 % len(self.keys)])
                number += 1

    def _read(self, table: Table, key: bytes) -> None:
        began = time.monotonic()
        try:
            value = table.get(key, consistency="local")
        except errors.NotReady:
            self.counts["not_ready"] += 1
        except (errors.Unreachable, errors.TimedOut):
            self.counts["unreachable"] += 1
        except errors.NoQuorum:
            self.counts["no_quorum"] += 1
        except errors.Error as error:
            self.counts["failed"] += 1
            self._note(f"a read of {key.decode()} at {self.node.name} failed: {error.message} ({error.code})")
        else:
            if value is None:
                self.counts["not_found"] += 1
                self._note(f"{self.node.name} said that there is no {key.decode()}")
            elif value != self.model_value[key]:
                self.counts["wrong"] += 1
                self._note(f"{self.node.name} gave a wrong value for {key.decode()}")
            else:
                self.counts["waited" if time.monotonic() - began >= WAITED_S else "right"] += 1
                return
        self._stop.wait(WAITED_S)

    def _note(self, problem: str) -> None:
        if len(self.wrong) < 10:
            self.wrong.append(problem)


class Demo:
    """The steps of the module's head, on nodes that are not started yet."""

    def __init__(self, nodes: LocalCluster, out: Output) -> None:
        self._nodes = nodes
        self._out = out
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def run(self, records: int | None) -> dict[str, Any]:
        """Return the summary; raise a typed error when a step cannot be done."""
        began = time.monotonic()
        self._event("starting", "starting three nodes")
        self._nodes.start()
        self._lap("start")
        with connect(self._nodes.endpoints, timeout_s=CALL_TIMEOUT_S) as cluster:
            cluster.create_database("demo")
            cluster.create_table(TABLE, tablets=TABLETS, replicas=3)
            table = cluster.table(TABLE)
            model = self._load(table, records)
            writer = Writer(table, model)
            writer.start()
            try:
                reader, missed, shipped = self._rejoin(cluster, writer)
            finally:
                writer.stop()
            wait_until(lambda: _all_equal(cluster), "all replicas SYNCED with equal roots", REJOIN_TIMEOUT_S)
            self._event("equal", "all roots are equal")
            self._lap("equal")
        problems = [*reader.wrong, *self._compare(model, writer.deleted)]
        self._lap("verify")
        self._seconds["total"] = round(time.monotonic() - began, 3)
        return {
            "records": len(model),
            "missed": missed,
            "bytes_shipped": sum(int(row["bytes_received"]) for row in shipped),
            "bytes_full_copy": sum(ROW_HEADER_BYTES + len(key) + len(value) for key, value in model.items()),
            "equal": not problems,
            "operations": writer.acknowledged,
            "deleted": len(writer.deleted),
            "path": ",".join(sorted({str(row["path"]) for row in shipped})),
            "reads_at_node_3": dict(sorted(reader.counts.items())),
            "problems": problems,
            "seconds": self._seconds,
        }

    def _load(self, table: Table, records: int | None) -> dict[bytes, bytes]:
        model: dict[bytes, bytes] = {}
        pairs = islice(characters(), records)
        while batch := dict(islice(pairs, LOAD_BATCH_RECORDS)):
            table.put_many(batch)
            model.update(batch)
            self._event("loading", f"loaded {len(model)} records", records=len(model))
        self._lap("load")
        return model

    def _rejoin(self, cluster: Client, writer: Writer) -> tuple[Reader, int, list[dict[str, Any]]]:
        """Kill node-3 under load, let it miss something, bring it back until it is SYNCED.

        Return what was read there meanwhile, how many operations it missed, and what its replicas said when they were
        SYNCED: what they received until then is what the rejoin has cost.
        """
        victim = self._nodes.nodes[VICTIM]
        before = max(ADDED, len(writer.model) // 500)
        away = max(2 * ADDED, len(writer.model) // 100)
        wait_until(lambda: writer.reached(before), f"{before} operations", REJOIN_TIMEOUT_S)
        victim.kill()
        killed_at, known = writer.acknowledged, len(writer.added)
        self._event("killed", f"{VICTIM} killed with SIGKILL after {killed_at} operations", acknowledged=killed_at)
        self._lap("kill")
        wait_until(lambda: writer.reached(killed_at + away), f"{away} more operations", REJOIN_TIMEOUT_S)
        # NB: the round under way at the kill may have reached node-3; what comes after it cannot have.
        keys = writer.added[known + ADDED :] or writer.added[known:]
        missed = writer.acknowledged - killed_at
        reader = Reader(victim, keys, {key: writer.model[key] for key in keys})
        victim.start()
        reader.start()
        try:
            self._event("returning", f"{VICTIM} starts again; it missed {missed} operations", missed=missed)
            self._lap("away")
            victim.wait_ready()
            shipped = wait_until(
                lambda: writer.reached(0) and _synced(cluster, VICTIM),
                f"{VICTIM} is SYNCED", REJOIN_TIMEOUT_S,
            )  # fmt: skip
            wait_until(lambda: writer.reached(0) and reader.answered, f"{VICTIM} answers reads", REJOIN_TIMEOUT_S)
        finally:
            reader.stop()
        self._event("synced", f"{VICTIM} is SYNCED: {_counted(reader.counts)}", reads=dict(reader.counts))
        self._lap("rejoin")
        return reader, missed, shipped

    def _compare(self, model: dict[bytes, bytes], deleted: set[bytes]) -> list[str]:
        """Read everything back from each node; return what is not as the dict says."""
        problems = []
        for node in self._nodes.nodes.values():
            with connect(node.address, timeout_s=CALL_TIMEOUT_S) as cluster:
                found = dict(cluster.table(TABLE).scan(consistency="local"))
            risen = [key for key in deleted if key in found and key not in model]
            missing = len(model.keys() - found.keys())
            extra = len(found.keys() - model.keys())
            different = sum(1 for key, value in found.items() if model.get(key, value) != value)
            if risen or missing or extra or different:
                problems.append(
                    f"{node.name}: {missing} records missing, {extra} too many ({len(risen)} of them deleted before), "
                    f"{different} different"
                )
            self._event("compared", f"{node.name}: {len(found)} records compared", node=node.name, records=len(found))
        return problems

    def _event(self, name: str, text: str, **facts: Any) -> None:
        self._out.event(name, text, **facts)

    def _lap(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name] = round(now - self._since, 3)
        self._since = now


def _synced(cluster: Client, node: str) -> list[dict[str, Any]]:
    """Return what the replicas of a node say when all of them are SYNCED, else nothing."""
    rows = [row for row in _rows(cluster) if row["node"] == node]
    return rows if len(rows) == TABLETS and all(row["state"] == "SYNCED" for row in rows) else []


def _all_equal(cluster: Client) -> bool:
    """Return whether each tablet has three SYNCED replicas at one sequence with one root."""
    rows = _rows(cluster)
    replicas = Counter(row["tablet"] for row in rows)
    proofs = {(row["tablet"], row["sequence"], row["root"]) for row in rows}
    return (
        len(replicas) == TABLETS
        and set(replicas.values()) == {3}
        and all(row["state"] == "SYNCED" for row in rows)
        and len(proofs) == TABLETS
    )


def _rows(cluster: Client) -> list[dict[str, Any]]:
    try:
        return cluster.sync_status(TABLE)
    except (errors.NoQuorum, errors.TimedOut, errors.Unreachable):
        return []


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items())) or "nothing read"


def _as_text(summary: dict[str, Any]) -> str:
    share = summary["bytes_shipped"] / max(1, summary["bytes_full_copy"])
    reads = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary["reads_at_node_3"].items())
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())
    lines = [
        f"records\t{summary['records']}",
        f"missed by {VICTIM}\t{summary['missed']} operations",
        f"shipped\t{summary['bytes_shipped']} of {summary['bytes_full_copy']} bytes ({share:.1%}) by {summary['path']}",
        f"reads at {VICTIM}\t{reads}",
        f"seconds\t{seconds}",
        *(f"problem\t{problem}" for problem in summary["problems"]),
        f"equal\t{'yes: all replicas, and every record as written' if summary['equal'] else 'NO'}",
    ]
    return "\n".join(lines)
