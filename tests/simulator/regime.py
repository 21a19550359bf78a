"""What a seed stands for: how many nodes and groups, how fast things are, which faults come and how often.

Each seed draws its own weights, most of them zero (swarm testing, Groce et al. 2012): runs that are full of one fault
reach states that runs with a little of everything never do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from srengine import limits
from srengine.consensus.effects import Timing
from tests.simulator.network import Weather

FAULTS = (
    "crash",
    "crash between",
    "crash all",
    "crash others",
    "young leader",
    "pause",
    "freeze",
    "isolate",
    "split",
    "one way",
    "bridge",
    "flap",
    "storm",
    "replay",
    "slow disk",
    "hung disk",
    "failing disk",
    "full disk",
    "damage",
    "restore",
    "wipe",
    "clock",
    "hint",
    "member",
    "transfer",
    "step down",
    "camps",
    "swing",
    "leap",
    "amnesia",
)


@dataclass(frozen=True, slots=True)
class Regime:
    """Times in seconds of true time. ``weights``: of the faults, as often as the numbers say relative to each other."""

    hosts: int
    voters: int
    groups: int
    clients: int
    registers: int
    length_s: float
    """How long faults and clients go on before everything is healed."""
    fault_every_s: float
    fault_lasts_s: float
    think_s: float
    patience_s: float
    timing: Timing
    clock_drift: float
    """How far the rates of two clocks may be apart. With lease reads not more than ``Timing.drift``, which they rely
    on.
    """
    weather: Weather
    disk_s: tuple[float, float]
    apply_s: float
    kept: int
    """Entries kept in the log behind what is applied."""
    torn: float
    """That a transaction under way at a crash leaves a damaged tail."""
    metadata: bool
    """The state machine is `ha.metadata.MetadataMachine` with its epochs and outcomes; else the simulator's own."""
    limits: tuple[tuple[str, int], ...]
    """Bounds of `srengine.limits` that are small here, so that what seldom happens happens often."""
    weights: tuple[tuple[str, float], ...]
    mix: tuple[int, int, int] = (4, 3, 2)
    """How many reads, writes, compare-and-sets clients do relative to each other."""
    roams: float = 0.1
    """That a client asks any host instead of the leader that it knows."""


@contextmanager
def shrunk(regime: Regime) -> Iterator[None]:
    """Let the regime's limits hold."""
    usual = [(name, getattr(limits, name)) for name, _ in regime.limits]
    for name, value in regime.limits:
        setattr(limits, name, value)
    try:
        yield
    finally:
        for name, value in usual:
            setattr(limits, name, value)


def regime_of(seed: int) -> Regime:
    """Return the regime of a seed."""
    return draw(random.Random(f"{seed} regime"))


def draw(source: random.Random) -> Regime:
    """Return the regime of a seed."""
    voters = source.choices((1, 2, 3, 4, 5), (2, 2, 60, 6, 20))[0]
    hosts = voters + source.choices((0, 1, 2), (4, 4, 2))[0]
    groups = source.choices((1, 2, 3), (80, 10, 10))[0]
    lease_reads = source.random() < 0.4
    weights = []
    for fault in FAULTS:
        weight = source.random() ** 2 * 3 if source.random() < 0.4 else 0.0
        if fault in {"member", "wipe"} and hosts == 1:
            weight = 0.0
        weights.append((fault, weight))
    bad = source.random() < 0.5
    lease_s, election_s_min, election_s_max = source.choice(((0.5, 1.0, 2.0), (0.3, 0.4, 0.9), (0.2, 0.25, 0.6)))
    timing = Timing(
        lease_s=lease_s, election_s_min=election_s_min, election_s_max=election_s_max, lease_reads=lease_reads
    )
    weather = Weather(
        loss=source.choice((0.0, 0.01, 0.1, 0.25)) if bad else 0.0,
        duplicate=source.choice((0.0, 0.02, 0.2)) if bad else 0.0,
        late=source.choice((0.0, 0.0, 0.002, 0.02)) if bad else 0.0,
        delay_s_min=0.000_2,
        delay_s_max=source.choice((0.001, 0.005, 0.04, lease_s * 0.4)),
        in_order=source.random() < 0.6,
    )
    regime = Regime(
        hosts=hosts,
        voters=voters,
        groups=groups,
        clients=source.choice((1, 2, 3, 4)),
        registers=source.choice((1, 2, 4)),
        length_s=source.uniform(6.0, 13.0) / (1 if groups == 1 else 1.6),
        fault_every_s=source.choice((0.2, 0.5, 1.2)),
        fault_lasts_s=source.choice((0.3, 0.8, 2.0)),
        think_s=source.choice((0.02, 0.05, 0.2)),
        patience_s=source.choice((0.5, 2.0)),
        timing=timing,
        clock_drift=timing.drift if lease_reads else source.choice((0.0, timing.drift, 0.5)),
        weather=weather,
        disk_s=source.choice(((0.000_1, 0.000_5), (0.001, 0.01), (0.001, 0.08))),
        apply_s=source.choice((0.000_2, 0.01, 0.2)),
        kept=source.choice((0, 3, 20, 1_000)),
        torn=source.choice((0.0, 0.2)),
        metadata=source.random() < 0.5,
        limits=(
            ("APPEND_BYTES_MAX", source.choice((1, 300, limits.APPEND_BYTES_MAX))),
            ("IN_FLIGHT_MESSAGES_MAX", source.choice((1, 3, limits.IN_FLIGHT_MESSAGES_MAX))),
            ("ROUNDS_KEPT_MAX", source.choice((4, limits.ROUNDS_KEPT_MAX))),
        ),
        weights=tuple(weights),
    )
    # Drawn last, so that a seed's other dice are what they were before there was such a thing.
    news_s = source.choice((0.0, 0.01, timing.heartbeat_s))
    return replace(regime, timing=replace(timing, news_s=news_s))
