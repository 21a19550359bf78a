"""The workers of pytest-xdist do not get into each other's way."""

from __future__ import annotations

import itertools

import pytest

from tests import processes


def test_no_port_is_handed_out_by_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker has ports of its own, all of them together are all, and one alone has them all."""
    ports = range(10_000, 32_000)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    assert processes._share(ports) == ports
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    shares = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        shares.append(processes._share(ports))
        first = processes.free_ports(3)
        assert first in shares[-1] and first + 2 in shares[-1]
    assert list(itertools.chain(*shares)) == list(ports)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw4")  # came for another one that ended
    assert processes._share(ports) == shares[1]
