"""A seed plays again exactly, here and in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.story import run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from tests.simulator.story import run; print(run(int(sys.argv[1])).digest)"


@pytest.mark.parametrize("seed", [1, 7, 42])
def test_same_seed_same_trace(seed: int) -> None:
    """Two runs of a seed do the same, step by step."""
    first, second = [], []
    assert run(seed, show=first.append) == run(seed, show=second.append)
    assert first == second
    assert len(first) > 100


def test_other_seed_other_trace() -> None:
    """Two seeds do not do the same."""
    assert run(1).digest != run(2).digest


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_other_process_same_trace(hash_seed: str) -> None:
    """Another process, whose strings and sets hash otherwise, does the same."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, "7"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == run(7).digest
