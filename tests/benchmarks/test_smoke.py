"""The benchmarks run and compare. How fast anything is, no test asserts: `make bench` on a quiet machine says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120

TARGETED = (
    "exchange: equality check / XXH3 of 64 bytes",
    "exchange: leaves built / C cursor loop over headers",
    "exchange: warm leaves adjusted / the durable put_many beside it",
    "exchange: bytes at d = 10 / the table's",
    "journal: fencing, 1 node, median / one durable metadata transaction",
    "journal: fencing, 3 nodes, median / one durable metadata transaction",
    "durable put_many, inserts / C loop",
    "durable put_many, inserts / py-lmdb",
    "durable put_many, overwrites / C loop",
    "digests and root, same batch / without them",
    "get, warm / py-lmdb begin + get",
    "scan verifying every checksum / C cursor loop",
    "rejoin after 1 % changed: bytes / (records + 24 B each)",
    "rejoin of a node killed under load: bytes / (records + 24 B each)",
    "16 threads of single durable puts / one thread",
    "snapshot written, uncompressed / C loop into 1 MiB blocks",
    "snapshot written, zstd 1 / bare zstd on the same blocks",
    "snapshot applied to an empty tablet / C MDB_APPEND loop",
    "shipping between two processes, plain / raw pyzmq",
    "shipping between two processes, CURVE / raw pyzmq",
    "write, ship, apply together, none: wall / slowest stage",
    "write, ship, apply together, auto: wall / slowest stage",
    "write, ship, apply together, zstd: wall / slowest stage",
    "write, ship, apply together, none: memory / 64 MiB",
    "write, ship, apply together, auto: memory / 64 MiB",
    "write, ship, apply together, zstd: memory / 64 MiB",
)


COORDINATION = (
    "journal: one sequential write over a connection, median / etcd",
    "journal: one sequential write over a connection, p99 / etcd",
    "journal: writes a second, 32 connections / etcd",
    "journal: one sequential write over a connection, median / backend etcd",
    "journal: one sequential write over a connection, p99 / backend etcd",
    "journal: writes a second, 32 connections / backend etcd",
    "journal: one sequential write, embedded, median / etcd",
    "journal: one sequential write, embedded, p99 / etcd",
    "journal: writes a second, 32 embedded callers / etcd",
    "journal: leader discovery, p99 / 100 ms",
    "journal: outage by SIGKILL of the leader / etcd",
    "journal: outage by SIGTERM of the leader / allowed",
    "journal: 200 missed entries caught up / the rate of writing them",
)


@pytest.mark.processes
def test_every_benchmark_yields_a_ratio(tmp_path: Path) -> None:
    """Every row that has a target yields a ratio and both values, with sizes that take seconds."""
    rows = run(tmp_path, "not bench_coordination", TARGETED)
    bytes_row = rows["rejoin after 1 % changed: bytes / (records + 24 B each)"]
    assert bytes_row["ratio"] <= 1.1, bytes_row


@pytest.mark.processes
@pytest.mark.requires_tool("etcd")
def test_the_journal_is_compared_with_etcd(tmp_path: Path) -> None:
    """So does every row of coordination, against a real etcd."""
    run(tmp_path, "bench_coordination", COORDINATION)


@pytest.mark.processes
def test_without_etcd_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    """Without an etcd on the machine the rows of coordination are skipped with a notice; the run succeeds."""
    environment = _environment(tmp_path, PATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", "-rs", "benchmarks/bench_coordination.py"],
        cwd=ROOT,
        env=environment,
        check=False,
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "there is no etcd on this machine" in done.stdout


def run(tmp_path: Path, pattern: str, targeted: Sequence[str]) -> dict[str, Any]:
    """Run the benchmarks that match; return the rows, each proved to say something."""
    result = tmp_path / "table.json"
    environment = _environment(tmp_path, SRENGINE_BENCH_JSON=str(result))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "-k", pattern],
        cwd=ROOT,
        env=environment,
        check=False,
        timeout=TIMEOUT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    rows = {row["name"]: row for row in json.loads(result.read_text(encoding="utf-8"))}
    missing = [name for name in targeted if name not in rows]
    assert not missing, (missing, sorted(rows))
    for name, row in rows.items():
        assert row["ratio"] is not None and row["ratio"] > 0, (name, row)
        assert row["ours"] and row["reference"], (name, row)
    return rows


def _environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Return what small benchmarks see: not the worker of pytest-xdist, in which pytest-benchmark measures nothing."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {**usual, "SRENGINE_BENCH_SIZE": "tiny", "SRENGINE_BENCH_DIRECTORY": str(tmp_path), **more}
