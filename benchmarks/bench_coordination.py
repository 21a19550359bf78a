"""The journal against etcd: three processes of each on loopback, the same disk, the same run.

Rounds alternate (etcd, ours, etcd, ours); both clusters live through all of them and the one that is not measured is
idle. *Etcd* is asked by a client that does no more than it must; *backend etcd* is what a program has of ours on top of
the same servers, over the same connection. Without an etcd on the machine the rows are skipped with a notice.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coordination
from benchmarks.coordination import Cluster, EtcdBackedCluster, EtcdCluster, JournalCluster, percentile
from benchmarks.data import Sizes
from benchmarks.table import Row, Target, at_least, at_most
from srengine.node.loop import new_event_loop

CLIENTS = 32
TERM_FLOOR_S = 0.030
"""Below this an outage by SIGTERM is short enough, whatever etcd does."""

Report = Callable[[Row], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for each size of a run."""

    kills: int
    terms: int
    writes: int
    """Sequential ones, of each round."""
    write_rounds: int
    """Of them: many, because a 99th percentile is a few writes of a round."""
    rounds: int
    """Of everything else."""
    seconds: float
    questions: int
    missed: int
    """Entries that a follower misses."""


EFFORTS = {
    "full": Effort(20, 10, 500, 25, 5, 4.0, 999, 100_000),
    "quick": Effort(5, 5, 300, 15, 3, 2.0, 300, 10_000),
    "tiny": Effort(1, 1, 20, 1, 1, 0.2, 9, 200),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Both clusters, running."""

    etcd: EtcdCluster
    ours: Cluster


@pytest.fixture(scope="module")
def pair(place: Path) -> Iterator[Pair]:
    """Return both clusters."""
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd on this machine (Debian: apt install etcd-server); nothing to compare with")
    directory = Path(tempfile.mkdtemp(prefix="coordination-", dir=place))
    clusters = EtcdCluster(directory / "etcd"), JournalCluster(directory / "srengine")
    try:
        for cluster in clusters:
            cluster.start()
        yield Pair(*clusters)
    finally:
        for cluster in clusters:
            cluster.stop()


@pytest.fixture(scope="module")
def on_etcd(pair: Pair, place: Path) -> Iterator[Cluster]:
    """Return nodes like ours whose backend is that etcd."""
    directory = Path(tempfile.mkdtemp(prefix="on-etcd-", dir=place))
    cluster = EtcdBackedCluster(directory, pair.etcd)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def effort(sizes: Sizes) -> Effort:
    """Return how much this run does."""
    return EFFORTS[sizes.name]


Measure = Callable[[Cluster], Awaitable[Any]]


def alternate(
    benchmark: Any, clusters: tuple[Cluster, Cluster], measure: Measure, rounds: int
) -> tuple[list[Any], list[Any]]:
    """Return what ``rounds`` rounds of (the other, ours) gave: (the other's, ours)."""
    theirs: list[Any] = []
    ours: list[Any] = []

    def work() -> None:
        for _ in range(rounds):
            for cluster, found in zip(clusters, (theirs, ours), strict=True):
                found.append(asyncio.run(measure(cluster)))

    benchmark.pedantic(work, rounds=1, iterations=1)
    return theirs, ours


def milliseconds(seconds: float) -> str:
    """Show a time."""
    return f"{seconds * 1e3:.3g} ms"


def compared(name: str, target: Target | None, ours: float, theirs: float, note: str = "") -> Row:
    """Return a row of two times."""
    return Row(name, target, ours / theirs, milliseconds(ours), milliseconds(theirs), note)


def report_times(
    report: Report, what: str, theirs: Sequence[list[float]], ours: Sequence[list[float]], *, to: str = "etcd"
) -> None:
    """Report median and p99 of the times of writes, each the median over the rounds, against those ``to`` another."""
    for name, share in (("median", 0.5), ("p99", 0.99)):
        mine = [percentile(taken, share) for taken in ours]
        other = [percentile(taken, share) for taken in theirs]
        ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        values = milliseconds(statistics.median(mine)), milliseconds(statistics.median(other))
        report(Row(f"journal: {what}, {name} / {to}", at_most(1.0), ratio, *values))


def report_rates(
    report: Report, what: str, theirs: Sequence[float], ours: Sequence[float], *, to: str = "etcd"
) -> None:
    """Report writes a second, the median over the rounds, against those ``to`` another."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    values = f"{statistics.median(ours):.0f}/s", f"{statistics.median(theirs):.0f}/s"
    report(Row(f"journal: {what} / {to}", at_least(1.0), ratio, *values))


def bench_sequential_writes(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """One client at the leader writes 128 bytes, one write after the other."""
    theirs, ours = alternate(
        benchmark,
        (pair.etcd, pair.ours),
        lambda cluster: coordination.sequential(cluster, effort.writes),
        effort.write_rounds,
    )
    report_times(report, "one sequential write over a connection", theirs, ours)


def bench_concurrent_writes(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """32 clients at the leader write 128 bytes each, as fast as they are acknowledged."""
    theirs, ours = alternate(
        benchmark,
        (pair.etcd, pair.ours),
        lambda cluster: coordination.concurrent(cluster, CLIENTS, effort.seconds),
        effort.rounds,
    )
    report_rates(report, f"writes a second, {CLIENTS} connections", theirs, ours)


def bench_backends(benchmark: Any, report: Report, pair: Pair, on_etcd: Cluster, effort: Effort) -> None:
    """Write over connections to nodes of either backend: what a client gains or loses by the choice."""

    async def measure(cluster: Cluster) -> tuple[list[float], float]:
        return (
            await coordination.sequential(cluster, effort.writes),
            await coordination.concurrent(cluster, CLIENTS, effort.seconds),
        )

    theirs, ours = alternate(benchmark, (on_etcd, pair.ours), measure, effort.rounds)
    their_times, their_rates = zip(*theirs, strict=True)
    times, rates = zip(*ours, strict=True)
    report_times(report, "one sequential write over a connection", their_times, times, to="backend etcd")
    report_rates(report, f"writes a second, {CLIENTS} connections", their_rates, rates, to="backend etcd")


def bench_embedded_writes(benchmark: Any, report: Report, pair: Pair, place: Path, effort: Effort) -> None:
    """Write from the process that the leading node is embedded in, as a service does; to etcd over its gateway."""
    directory = Path(tempfile.mkdtemp(prefix="embedded-", dir=place))
    cluster = JournalCluster(directory)

    async def rounds() -> tuple[list[Any], list[Any]]:
        leader = await coordination.find_leader(pair.etcd)
        async with (
            cluster.embedded() as ours,
            coordination.writers(pair.etcd, [leader]) as (theirs,),
            coordination.writers(pair.etcd, [leader] * CLIENTS) as many,
        ):
            times = [
                [await coordination.one_by_one(writer, effort.writes) for writer in (theirs, ours)]
                for _ in range(effort.write_rounds)
            ]
            rates = [
                [await coordination.side_by_side(all_, effort.seconds) for all_ in (many, [ours] * CLIENTS)]
                for _ in range(effort.rounds)
            ]
        return times, rates

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:  # a node's, for both
            times, rates = benchmark.pedantic(lambda: runner.run(rounds()), rounds=1, iterations=1)
    finally:
        cluster.stop()
    report_times(report, "one sequential write, embedded", *zip(*times, strict=True))
    report_rates(report, f"writes a second, {CLIENTS} embedded callers", *zip(*rates, strict=True))


def bench_discovery(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """Any node is asked who leads."""
    theirs, ours = alternate(
        benchmark, (pair.etcd, pair.ours), lambda cluster: coordination.discovery(cluster, effort.questions), 1
    )
    mine, other = percentile(ours[0], 0.99), percentile(theirs[0], 0.99)
    report(Row("journal: leader discovery, p99 / 100 ms", at_most(1.0), mine / 0.1, milliseconds(mine), "100 ms"))
    report(compared("journal: leader discovery, p99 / etcd", None, mine, other))


def bench_killed_leader(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """SIGKILL of the leader: the longest time without an acknowledged write."""
    theirs, ours = alternate(
        benchmark,
        (pair.etcd, pair.ours),
        lambda cluster: coordination.outages(cluster, signal.SIGKILL, 1),
        effort.kills,
    )
    mine, other = (statistics.median(taken for (taken,) in each) for each in (ours, theirs))
    report(compared("journal: outage by SIGKILL of the leader / etcd", at_most(0.5), mine, other))


def bench_terminated_leader(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """SIGTERM of the leader: the longest time without an acknowledged write."""
    theirs, ours = alternate(
        benchmark,
        (pair.etcd, pair.ours),
        lambda cluster: coordination.outages(cluster, signal.SIGTERM, 1),
        effort.terms,
    )
    mine, other = (statistics.median(taken for (taken,) in each) for each in (ours, theirs))
    allowed = max(0.2 * other, TERM_FLOOR_S)
    report(
        Row(
            "journal: outage by SIGTERM of the leader / allowed",
            at_most(1.0),
            mine / allowed,
            milliseconds(mine),
            milliseconds(allowed),
            note=f"Allowed: a fifth of etcd's ({milliseconds(other)}), at least {milliseconds(TERM_FLOOR_S)}.",
        )
    )


def bench_catching_up(benchmark: Any, report: Report, pair: Pair, effort: Effort) -> None:
    """Measure a follower that was killed, missed entries, and comes back."""
    theirs, ours = alternate(
        benchmark, (pair.etcd, pair.ours), lambda cluster: coordination.catch_up(cluster, effort.missed, CLIENTS), 1
    )
    (etcd_writing, etcd_catching), (writing, catching) = theirs[0], ours[0]
    report(
        Row(
            f"journal: {effort.missed} missed entries caught up / the rate of writing them",
            at_least(10.0),
            catching / writing,
            f"{catching:.0f}/s",
            f"{writing:.0f}/s",
            note=(
                "From the start of the process until all is applied."
                f" Etcd: {etcd_catching:.0f}/s against {etcd_writing:.0f}/s written."
            ),
        )
    )
