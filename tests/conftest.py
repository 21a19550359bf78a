"""What every test gets: requirements on the machine, and Hypothesis' profiles.

A test that needs a program of the machine or root says so::

    @pytest.mark.requires_tool("strace")
    @pytest.mark.requires_root

Missing, it is skipped with the name of what is missing; under ``CI=true`` (.ci/run installs everything) it fails, so
that a gate never becomes green by skipping. The fixture `requires_tool` does the same from inside a test.
"""

from __future__ import annotations

import os
import shutil
import signal
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

# A shell that runs the suite in the background makes it ignore Ctrl-C, and every process that a test starts inherits
# that: tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# NB: time decides nothing in a test: the machine may be busy with the other half of the suite.
settings.register_profile("gate", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
# Of one round: `python -m tests.fuzz` goes on with other seeds for as long as it is told.
settings.register_profile("fuzz", parent=settings.get_profile("gate"), max_examples=300)
settings.load_profile(os.environ.get("SRENGINE_HYPOTHESIS", "gate"))


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true promises it", pytrace=False)
    pytest.skip(f"needs {what}")


def need_tool(name: str) -> None:
    """Skip the running test, or fail it under CI, unless the program ``name`` is on the PATH."""
    if shutil.which(name) is None:
        _missing(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Look at the marks before any fixture is made."""
    for mark in item.iter_markers("requires_tool"):
        for name in mark.args:
            need_tool(name)
    if item.get_closest_marker("requires_root") is not None and os.geteuid() != 0:
        _missing("root")


@pytest.fixture
def requires_tool():
    """Return the function that skips, or fails under CI, when the named program is missing."""
    return need_tool
