"""The seeds of the gate: nodes of the real machines keep every promise under faults, and make progress after them."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulator.breakages import BREAKAGES, NONE
from tests.simulator.network import Weather
from tests.simulator.regime import FAULTS, draw
from tests.simulator.story import Failure, run
from tests.simulator.workers import one

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 10


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_seeds_keep_every_promise(first: int) -> None:
    """F21, F23 to F27, F29, F32, H06, H09, H11, H28, B20: no seed breaks a promise, and after the heal all goes on."""
    reports = [run(seed) for seed in range(first, first + BLOCK)]
    assert sum(report.acknowledged for report in reports) > 3 * BLOCK
    assert sum(report.answered for report in reports) > 6 * BLOCK


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_survived(fault: str) -> None:
    """Nothing else goes wrong, and this happens: the group of three with two spares keeps its promises."""
    regime = draw(random.Random(f"{fault} alone"))
    regime = replace(
        regime,
        hosts=5,
        voters=3,
        groups=1,
        clients=2,
        length_s=8.0,
        fault_every_s=0.5,
        fault_lasts_s=0.3,
        think_s=0.05,
        patience_s=0.5,
        disk_s=(0.001, 0.01),
        weather=Weather(),
        weights=((fault, 1.0),),
    )
    report = run(1, regime=regime)
    assert dict(report.faults)[fault] >= 1
    assert report.acknowledged >= 1


@pytest.mark.parametrize(
    "name",
    ["skip term checks", "no promise", "no promise after a start", "several voters at once", "count untrusted"],
)
def test_regime_of_a_breakage_is_survived_by_the_whole(name: str) -> None:
    """F14, F24, F27: what is made to find a broken machine finds nothing where nothing is broken."""
    for seed in range(3):
        report = one((seed, NONE.name, name))
        assert not isinstance(report, Failure), (seed, report)
        assert report.acknowledged >= 1


def test_groups_on_one_disk_keep_every_promise() -> None:
    """Three groups of a node share its disk, its transactions and its end."""
    acknowledged = 0
    for seed in range(3):
        regime = replace(draw(random.Random(f"groups {seed}")), hosts=4, voters=3, groups=3, length_s=6.0)
        acknowledged += run(seed, regime=regime).acknowledged
    assert acknowledged > 10


def test_failure_says_how_to_play_it_again() -> None:
    """A failing seed prints itself, the commit, the rule and the command that repeats it."""
    command = [sys.executable, "-m", "tests.simulator", "--seeds", "40", "--jobs", "1", "--breakage", "act unfenced"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    found = next(line for line in ended.stdout.splitlines() if line.startswith("seed "))
    seed = int(found.split()[1])
    assert f"seed {seed} at commit " in found
    assert "epochs: group g" in ended.stdout
    assert f"""play it again: make sim SEED={seed} SEEDS=1 ARGS='--breakage "act unfenced"'""" in ended.stdout
    with pytest.raises(Failure, match="epochs"):
        run(seed, breakage=BREAKAGES["act unfenced"])


def test_failure_survives_the_way_between_processes() -> None:
    """What a worker found is what is told: seed, rule, text and trace."""
    failure = Failure(7, "epochs", "epochs: two owners", ["one line", "another"])
    other = pickle.loads(pickle.dumps(failure))
    assert (other.seed, other.rule, str(other), other.last) == (7, "epochs", "epochs: two owners", failure.last)
