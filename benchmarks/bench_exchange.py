"""The exchange: equality, leaves and sketches beside plain C loops; bytes against a level-by-level Merkle walk."""

from __future__ import annotations

import functools
import json
import random
import shutil
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import merkle_walk, settings, synthetic_leaves
from benchmarks._reference import hash_64_bytes
from benchmarks.data import Data, Sizes
from benchmarks.race import race
from benchmarks.stores import Loaded
from benchmarks.table import Row, at_least, at_most
from srengine.storage import Tablet
from srengine.storage.merkle import Moment
from srengine.sync.exchange_machine import Figures, Initiator, Responder

Report = Callable[[Row], None]
CHECKS = 20_000


class Side:
    """A tablet as the machine sees it."""

    def __init__(self, tablet: Tablet) -> None:
        self.tablet = tablet

    @property
    def place(self) -> tuple[bytes, int, int]:
        position = self.tablet.position
        return position.root, position.count, position.sequence

    def stands_at(self, where: bytes) -> bool:
        return self.tablet.stands_at(where)

    def moment(self, *, recount: bool = False) -> AbstractContextManager[Moment]:
        return self.tablet.leaves.moment(recount=recount)


def locate(here: Tablet, there: Tablet, seed: int, *, records: bool = False) -> tuple[Any, Figures]:
    """Run an exchange up to the repair, which is returned, not applied."""
    initiator = Initiator("t", Side(here), random.Random(seed), prefer_records=records)
    responder = Responder(Side(there))
    initiator.start()
    while True:
        effects = initiator.drain()
        if effects.announce is not None:
            responder.step(effects.announce.message)
            initiator.announced()
        elif effects.send is None:
            return effects.apply or effects.outcome, initiator.figures
        else:
            initiator.step(*responder.step(effects.send.message))


def locate_together(here: Tablet, there: Tablet, seed: int, *, records: bool) -> tuple[Any, Figures]:
    """Do the same with each side in a thread of its own, as two nodes do."""
    initiator = Initiator("t", Side(here), random.Random(seed), prefer_records=records)
    responder = Responder(Side(there))
    with ThreadPoolExecutor(1) as there_only:
        initiator.start()
        while True:
            effects = initiator.drain()
            if effects.announce is not None:
                there_only.submit(responder.step, effects.announce.message)
                initiator.announced()
            elif effects.send is None:
                return effects.apply or effects.outcome, initiator.figures
            else:
                initiator.step(*there_only.submit(responder.step, effects.send.message).result())


def processor_of_sides(here: Tablet, there: Tablet, seed: int, *, records: bool) -> tuple[float, float, Any]:
    """Do the same one step after the other; return the processor time of each side and the repair."""
    sides = [Side(here), Side(there)]
    initiator, responder = Initiator("t", sides[0], random.Random(seed), prefer_records=records), Responder(sides[1])
    spent = [0.0, 0.0]

    def measured(side: int, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        spent[side] += time.process_time() - start
        return result

    measured(0, initiator.start)
    while True:
        effects = initiator.drain()
        if effects.announce is not None:
            message = effects.announce.message
            measured(1, functools.partial(responder.step, message))
            measured(0, initiator.announced)
        elif effects.send is None:
            return spent[0], spent[1], effects.apply or effects.outcome
        else:
            reply = measured(1, functools.partial(responder.step, effects.send.message))
            measured(0, functools.partial(initiator.step, *reply))


def repair(tablet: Tablet, work: Any) -> None:
    """Apply what `locate` found."""
    tablet.repair(work.rows, work.removed, work.meta, work.state, replace_rows=work.replace_rows, base=work.base)


def differ(one: Tablet, other: Tablet, keys: list[bytes], count: int, seed: int) -> list[bytes]:
    """Make one third only here, one third only there, one third updated; return the keys that are only there."""
    rng = random.Random(f"{count}/{seed}")
    third = count // 3
    there = []
    if third:
        one.put_many([(rng.randbytes(24), b"here") for _ in range(third)])
        there = [rng.randbytes(24) for _ in range(third)]
        other.put_many([(key, b"there") for key in there])
    if count > 2 * third:
        other.put_many([(key, b"%d" % seed) for key in rng.sample(keys, count - 2 * third)])
    return there


def take_back(tablets: tuple[Tablet, Tablet], keys: list[bytes]) -> None:
    """Remove keys from two equal tablets without a trace, so that every run is one between as many records."""
    first = tablets[0].sequence + 1
    rows = b"".join(
        struct.pack("<BBHIQQ", 1, 0, len(key), 0, first + number, (first + number) << 16) + key
        for number, key in enumerate(keys)
    )
    for tablet in tablets:
        tablet._environment.apply_rows(rows, [], True, None, None)
        tablet.purge(tablet.sequence)
    assert tablets[0].root == tablets[1].root


@pytest.fixture(scope="module")
def twins(place: Path, data: Data, sizes: Sizes) -> Iterator[tuple[Tablet, Tablet, list[bytes]]]:
    """Two equal tablets with all records, and their keys."""
    paths = [place / "twin-a", place / "twin-b"]
    paths[0].mkdir()
    made = Tablet.create(paths[0], "00" * 16, lineage="ab" * 16, seed=b"12345678", map_bytes=settings.MAP_BYTES)
    for start in range(0, data.count, sizes.load_batch):
        made.put_many(data.pairs(start, min(start + sizes.load_batch, data.count)))
    made.close()
    shutil.copytree(paths[0], paths[1])
    one, other = (Tablet.open(path, "00" * 16, map_bytes=settings.MAP_BYTES) for path in paths)
    yield one, other, [data.key(number) for number in range(data.count)]
    one.close()
    other.close()
    for path in paths:
        shutil.rmtree(path)


def bench_equality(benchmark: Any, report: Report, loaded: Loaded, sizes: Sizes) -> None:
    """Compare root, count and sequence: independent of the size."""
    tablet = loaded.tablet
    where = tablet.root + tablet.count.to_bytes(8, "little") + tablet.sequence.to_bytes(8, "little")
    stands_at = tablet._environment.stands_at
    assert stands_at(where)

    def ours(_: int) -> None:
        for _ in range(CHECKS):
            stands_at(where)

    times = race(benchmark, ours, {"XXH3": lambda _: hash_64_bytes(CHECKS)}, rounds=sizes.rounds)
    report(
        Row(
            "exchange: equality check / XXH3 of 64 bytes",
            at_most(20),
            1 / times.ratio("XXH3"),
            f"{times.ours_s / CHECKS * 1e9:.0f} ns",
            f"{times.reference_s('XXH3') / CHECKS * 1e9:.1f} ns",
        )
    )


def bench_build(benchmark: Any, report: Report, loaded: Loaded, data: Data, sizes: Sizes) -> None:
    """Build the leaves by one walk, against a C loop that reads every header; then by two."""
    leaves = loaded.tablet.leaves

    def build(threads: int) -> None:
        with leaves.moment(recount=True, threads=threads) as moment:
            assert moment.actual.root == moment.root

    build(1)
    loaded.reference.scan_headers()
    times = race(
        benchmark,
        lambda _: build(1),
        {"C loop": lambda _: loaded.reference.scan_headers(), "two": lambda _: build(2)},
        rounds=sizes.rounds,
    )
    processor = [(processor_s(lambda: build(2)), processor_s(lambda: build(1))) for _ in range(sizes.rounds)]
    leaves.drop()
    nanoseconds = {name: times.reference_s(name) / data.count * 1e9 for name in ("C loop", "two")}
    report(
        Row(
            "exchange: leaves built / C cursor loop over headers",
            at_least(0.65),
            times.ratio("C loop"),
            f"{times.ours_s / data.count * 1e9:.0f} ns/rec",
            f"{nanoseconds['C loop']:.0f} ns/rec",
        )
    )
    report(
        Row(
            "exchange: leaves built by two threads / by one",
            at_least(1.5),
            1 / times.ratio("two"),
            f"{nanoseconds['two']:.0f} ns/rec",
            f"{times.ours_s / data.count * 1e9:.0f} ns/rec",
        )
    )
    report(
        Row(
            "exchange: leaves built by two threads, processor time / by one",
            None,
            statistics.median(two / one for two, one in processor),
            f"{statistics.median(two for two, _ in processor) / data.count * 1e9:.0f} ns/rec",
            f"{statistics.median(one for _, one in processor) / data.count * 1e9:.0f} ns/rec",
        )
    )


def processor_s(work: Callable[[], None]) -> float:
    """Return the processor time of all threads for some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def bench_adjust(benchmark: Any, report: Report, loaded: Loaded, data: Data, sizes: Sizes) -> None:
    """Adjust warm leaves for a durable batch, against the batch itself."""
    tablet = loaded.tablet
    rng = random.Random(9)
    with tablet.leaves.moment():
        pass

    def put(number: int) -> None:
        tablet.put_many(data.changed(rng.sample(range(data.count), sizes.batch), seed=number))

    def adjust(_: int) -> None:
        with tablet.leaves.moment():
            pass

    times = race(benchmark, adjust, {"put": put}, rounds=sizes.rounds)
    tablet.leaves.drop()
    report(
        Row(
            "exchange: warm leaves adjusted / the durable put_many beside it",
            at_most(0.05),
            1 / times.ratio("put"),
            f"{times.ours_s / sizes.batch * 1e9:.0f} ns/rec",
            f"{times.reference_s('put') / sizes.batch * 1e9:.0f} ns/rec",
        )
    )


def cold_records(*tablets: Tablet) -> None:
    """Forget what an earlier comparison read of all records; the leaves stay warm."""
    for tablet in tablets:
        tablet.leaves.scan = tablet.leaves.prepared = None


class Differing:
    """Two warm tablets that differ by ``count`` records, other ones each round."""

    def __init__(self, twins: tuple[Tablet, Tablet, list[bytes]]) -> None:
        """Take two equal tablets."""
        self.one, self.other, self._keys = twins
        self.count = min(100, len(self._keys) // 20)
        self.work: Any = None

    def prepare(self, number: int) -> None:
        """Make the tablets equal, then different again."""
        self.finish()
        differ(self.one, self.other, self._keys, self.count, number)
        for tablet in (self.one, self.other):
            with tablet.leaves.moment():
                pass

    def finish(self) -> None:
        """Make the tablets equal."""
        if self.work is not None:
            repair(self.one, self.work)
            self.work = None
        assert self.one.root == self.other.root


def bench_diff_by_leaf(
    benchmark: Any, report: Report, twins: tuple[Tablet, Tablet, list[bytes]], loaded: Loaded, sizes: Sizes
) -> None:
    """Find 100 differences between warm tablets, one side after the other, against one C loop over all headers."""
    pair = Differing(twins)

    def ours(number: int) -> None:
        pair.work = locate(pair.one, pair.other, number)[0]

    loop = {"C loop": lambda _: loaded.reference.scan_headers()}
    times = race(benchmark, ours, loop, rounds=sizes.rounds, before=pair.prepare)
    pair.finish()
    report(
        Row(
            f"exchange: {pair.count} differences found, leaf mode, both sides / C cursor loop over headers",
            at_most(0.15),
            1 / times.ratio("C loop"),
            f"{times.ours_s * 1e3:.1f} ms",
            f"{times.reference_s('C loop') * 1e3:.1f} ms",
        )
    )


def bench_diff_by_record(
    benchmark: Any, report: Report, twins: tuple[Tablet, Tablet, list[bytes]], loaded: Loaded, sizes: Sizes
) -> None:
    """Find 100 differences record by record, the sides in a thread each as they are in a node each, against a C loop.

    Reported beside it: the same one side after the other, and the processor time of each.
    """
    pair = Differing(twins)
    sides: list[tuple[float, float, float]] = []

    def processor(number: int) -> None:
        cold_records(pair.one, pair.other)
        here, there, _ = processor_of_sides(pair.one, pair.other, number, records=True)
        sides.append((here, there, processor_s(loaded.reference.scan_headers)))

    def in_turn(number: int) -> None:
        cold_records(pair.one, pair.other)
        locate(pair.one, pair.other, number, records=True)

    def ours(number: int) -> None:
        cold_records(pair.one, pair.other)
        pair.work = locate_together(pair.one, pair.other, number, records=True)[0]

    references = {
        "processor": processor,
        "in turn": in_turn,
        "C loop": lambda _: loaded.reference.scan_headers(),
    }
    times = race(benchmark, ours, references, rounds=sizes.rounds, before=pair.prepare)
    pair.finish()
    turns, loops = times.references["in turn"], times.references["C loop"]
    label = f"exchange: {pair.count} differences found, record mode"
    loop_ms = f"{times.reference_s('C loop') * 1e3:.1f} ms"
    report(
        Row(
            f"{label}, both sides at once / C cursor loop over headers",
            at_most(2),
            1 / times.ratio("C loop"),
            f"{times.ours_s * 1e3:.1f} ms",
            loop_ms,
        )
    )
    report(
        Row(
            f"{label}, one side after the other / the loop",
            None,
            statistics.median(turn / loop for turn, loop in zip(turns, loops, strict=True)),
            f"{times.reference_s('in turn') * 1e3:.1f} ms",
            loop_ms,
        )
    )
    for side, who in enumerate(("initiator", "responder")):
        report(
            Row(
                f"{label}, processor time of the {who} / of the loop",
                None,
                statistics.median(spent[side] / spent[2] for spent in sides),
                f"{statistics.median(spent[side] for spent in sides) * 1e3:.1f} ms",
                f"{statistics.median(spent[2] for spent in sides) * 1e3:.1f} ms",
            )
        )


# --- bytes and rounds against a level-by-level walk ------------------------------------------------------------------

LIMITS = {1: 475, 10: 1450, 100: 7800, 1000: 90_000, 10_000: 300_000, 100_000: 3_000_000}
RECORD_LIMITS = {100: 4100, 1000: 32_000}
UNLIMITED = (20, 50)
"""Between the numbers of the table: reported alone."""
SEEDS = 101
SMALL = 100
TEN_MILLION = 10_000_000
CURVES = "exchange-*.json"
ROUNDS_WANTED = 2


@dataclass
class Costs:
    """What runs of one kind cost."""

    bytes: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    extended: int = 0

    def note(self, figures: Figures, seconds: float) -> None:
        """Add a run."""
        self.bytes.append(figures.locating_bytes)
        self.rounds.append(figures.locating_rounds)
        self.seconds.append(seconds)
        self.extended += bool(figures.extended)

    def tail(self) -> int:
        """Return the 95th percentile of the bytes."""
        return sorted(self.bytes)[int(len(self.bytes) * 0.95)]


def run_many(twins: tuple[Tablet, Tablet, list[bytes]], count: int, seeds: int, *, records: bool) -> Costs:
    """Make ``count`` records differ, find them, repair, take back what was added; ``seeds`` times."""
    one, other, keys = twins
    costs = Costs()
    for seed in range(seeds):
        there = differ(one, other, keys, count, seed)
        for tablet in (one, other):
            with tablet.leaves.moment():
                pass
        start = time.perf_counter()
        work, figures = locate(one, other, seed, records=records)
        costs.note(figures, time.perf_counter() - start)
        repair(one, work)
        assert one.root == other.root
        if there:
            take_back((one, other), there)
    return costs


def bench_bytes(benchmark: Any, report: Report, twins: tuple[Tablet, Tablet, list[bytes]], sizes: Sizes) -> None:
    """Count bytes and round trips for d = 1 ... n/10, and draw them beside a Merkle walk of fan-out 16 and 256."""
    _, _, keys = twins
    curves: dict[str, list[tuple[int, float, int, float]]] = {}
    full = sizes.name == "full"

    def note(name: str, count: int, costs: list[int], rounds: int, seconds: float) -> None:
        curves.setdefault(name, []).append((count, statistics.median(costs), rounds, seconds))

    def run() -> None:
        for count in sorted((*LIMITS, *UNLIMITED)):
            if count > len(keys) // 10:
                continue
            for records in (False, True):
                if records and count not in RECORD_LIMITS:
                    continue
                costs = run_many(twins, count, SEEDS if sizes.name != "tiny" else 3, records=records)
                mode = "exchange, record mode" if records else "exchange"
                median, tail = statistics.median(costs.bytes), costs.tail()
                note(mode, count, costs.bytes, max(costs.rounds), statistics.median(costs.seconds))
                limit = (RECORD_LIMITS if records else LIMITS).get(count)
                label = f"exchange: bytes at d = {count}{', record mode' if records else ''}"
                more = sum(rounds > ROUNDS_WANTED for rounds in costs.rounds)
                what = f"{len(costs.rounds)} runs, {more} of more than two round trips, {costs.extended} of two tables"
                if limit is None:
                    report(Row(label, None, median, f"{median:.0f} B, 95 % {tail} B", what))
                    continue
                one, most = (at_most(1), at_most(1.3)) if full else (None, None)
                report(Row(f"{label} / the table's", one, median / limit, f"{median:.0f} B", what))
                report(Row(f"{label}, 95 % / the table's", most, tail / limit, f"{tail} B", f"{limit} B"))

    benchmark.pedantic(run, rounds=1, iterations=1)
    merkle_curves(keys, note, tiny=sizes.name == "tiny")
    for name, points in curves.items():
        benchmark.extra_info[name] = points
    target = settings.output("JSON")
    if target is not None:
        name = CURVES.replace("*", str(len(keys)))
        target.with_name(name).write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
        draw(target.parent)


def bench_ten_million(benchmark: Any, report: Report, sizes: Sizes) -> None:
    """Count bytes at ten million records of which only what differs is made up (synthetic_leaves.py)."""

    def run() -> None:
        for count in (1, 10, 100, 1000, 10_000, 100_000):
            for records in (False, True):
                if (records and count not in RECORD_LIMITS) or (sizes.name == "tiny" and count > SMALL):
                    continue
                seeds = 3 if sizes.name == "tiny" else SEEDS if count <= SMALL * 10 else 11
                costs = Costs()
                for seed in range(seeds):
                    world = synthetic_leaves.make(TEN_MILLION, count, seed)
                    start = time.perf_counter()
                    costs.note(synthetic_leaves.locate(world, seed, records=records), time.perf_counter() - start)
                limit = (RECORD_LIMITS if records else LIMITS)[count]
                median = statistics.median(costs.bytes)
                report(
                    Row(
                        f"exchange: bytes at d = {count} of 10^7{', record mode' if records else ''} / the table's",
                        at_most(1.05),
                        median / limit,
                        f"{median:.0f} B, 95 % {costs.tail()} B",
                        f"{seeds} runs, at most {max(costs.rounds)} round trips, {costs.extended} of two tables",
                    )
                )

    benchmark.pedantic(run, rounds=1, iterations=1)


def merkle_curves(keys: list[bytes], note: Callable[[str, int, list[int], int, float], None], *, tiny: bool) -> None:
    """Cost the walk for the same numbers of differences, each found to be complete."""
    rng = random.Random(3)
    digests = {key: rng.getrandbits(64) for key in keys}
    for fan_out in (16, 256):
        one = merkle_walk.Tree(dict(digests), fan_out, len(keys))
        other = merkle_walk.Tree(dict(digests), fan_out, len(keys))
        for count in (1, 10, 100, 1000, 10_000, 100_000):
            if count > len(keys) // 10 or (tiny and count > 10):
                continue
            third = count // 3
            changed = rng.sample(keys, count - 2 * third)
            fresh = [rng.randbytes(24) for _ in range(2 * third)]
            for key in changed:
                other.move(key, rng.getrandbits(64))
            for at, key in enumerate(fresh):
                (one if at % 2 else other).move(key, rng.getrandbits(64))
            start = time.perf_counter()
            cost = merkle_walk.walk(one, other)
            seconds = time.perf_counter() - start
            assert cost.found == {*changed, *fresh}
            note(f"Merkle walk, fan-out {fan_out}", count, [cost.bytes], cost.rounds, seconds)
            for key in changed:
                other.move(key, one.records[key])
            for at, key in enumerate(fresh):
                (one if at % 2 else other).move(key, None)


def draw(place: Path) -> None:
    """Draw bytes over differences, both axes logarithmic, one panel for each number of records that was measured."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    runs = {int(path.stem.removeprefix("exchange-")): json.loads(path.read_text()) for path in place.glob(CURVES)}
    figure, panels = pyplot.subplots(1, len(runs), figsize=(7 * len(runs), 5), sharey=True, squeeze=False)
    for axes, records in zip(panels[0], sorted(runs), strict=True):
        for name, points in runs[records].items():
            counts, sizes = [point[0] for point in points], [point[1] for point in points]
            axes.loglog(counts, sizes, marker="o", label=f"{name}: {max(point[2] for point in points)} round trips")
        axes.set_xlabel(f"records that differ, of {records}")
        axes.set_ylabel("bytes to find them, both ways")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(place / "exchange.png", dpi=110)
    pyplot.close(figure)
