"""Fixtures of the benchmarks: the place on the disk, the data, the loaded stores, the table at the end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, settings
from benchmarks.data import Data, Sizes
from benchmarks.stores import Loaded
from benchmarks.table import Row, render

ROWS = pytest.StashKey[list[Row]]()
DISK = pytest.StashKey[machine.Disk]()

Report = Callable[[Row], None]


def pytest_configure(config: pytest.Config) -> None:
    """Begin with an empty table."""
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def place(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Return a fresh directory on the disk under test; gone afterwards."""
    settings.directory().mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="bench-", dir=settings.directory()))
    pytestconfig.stash[DISK] = machine.disk(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def disk(pytestconfig: pytest.Config, place: Path) -> machine.Disk:
    """Return what is known of the disk under test."""
    assert place.is_dir(), place
    return pytestconfig.stash[DISK]


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    """Return the sizes of this run."""
    return settings.sizes()


@pytest.fixture(scope="session")
def data(sizes: Sizes) -> Data:
    """Return the records."""
    return Data(sizes.records)


@pytest.fixture(scope="session")
def loaded(place: Path, data: Data, sizes: Sizes) -> Iterator[Loaded]:
    """Return a tablet, a reference store and a py-lmdb environment that hold all records, written alike."""
    stores = Loaded(place / "loaded", data, sizes.load_batch)
    yield stores
    stores.close()


@pytest.fixture
def scratch(place: Path) -> Iterator[Path]:
    """Return a directory for one benchmark; gone afterwards, so that the next one finds the disk as empty."""
    path = Path(tempfile.mkdtemp(prefix="scratch-", dir=place))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def report(pytestconfig: pytest.Config, benchmark: Any) -> Report:
    """Return the function that adds a row to the table."""

    def add(row: Row) -> None:
        pytestconfig.stash[ROWS].append(row)
        benchmark.extra_info.setdefault("rows", []).append(row.as_dict())

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where the environment says."""
    rows = config.stash[ROWS]
    if not rows:
        return
    head = [f"size: {settings.sizes().name}, {settings.sizes().records} records of 24 + 128 bytes"]
    if DISK in config.stash:
        head = [*machine.describe(config.stash[DISK]), *head]
    terminalreporter.write_line("")
    for line in [*head, "", *render(rows).splitlines()]:
        terminalreporter.write_line(line)
    as_json, as_markdown = settings.output("JSON"), settings.output("MARKDOWN")
    if as_json is not None:
        as_json.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
    if as_markdown is not None:
        text = "\n".join(f"- {line}" for line in head) + "\n\n" + render(rows, markdown=True) + "\n"
        as_markdown.write_text(text, encoding="utf-8")
