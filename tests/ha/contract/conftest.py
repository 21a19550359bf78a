"""The contract suite runs each scenario on a cluster of each backend."""

from __future__ import annotations

import asyncio

import pytest

from tests.ha.contract.clusters import KINDS


def pytest_generate_tests(metafunc) -> None:
    """Run a test on every backend, or on those that its mark ``backends`` names."""
    if "on" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("backends")
        metafunc.parametrize("kind", list(mark.args) if mark is not None else list(KINDS))


@pytest.fixture
def on(kind, tmp_path):
    """Run ``scenario(cluster)`` on ``count`` nodes of a backend."""

    def run(scenario, count: int = 3, **more) -> None:
        async def all_of_it() -> None:
            cluster = KINDS[kind](tmp_path, **more)
            try:
                await cluster.begin(count)
                await scenario(cluster)
            finally:
                await cluster.end()

        asyncio.run(all_of_it())

    return run
