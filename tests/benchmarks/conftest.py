"""The reference loops of the benchmarks, built once for the tests here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "benchmarks" / "build.py"


@pytest.fixture(scope="session", autouse=True)
def reference_built():
    """Build benchmarks._reference unless it is up to date."""
    done = subprocess.run([sys.executable, str(BUILD)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
