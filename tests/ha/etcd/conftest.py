"""One etcd for the tests that only use it; those that break it start their own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from srengine.ha.backends.etcd_client import EtcdOptions
from tests.conftest import need_tool
from tests.etcd import Etcd


@pytest.fixture(scope="session")
def one_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """Return a running server; nobody stops it."""
    need_tool("etcd")
    directory: Path = tmp_path_factory.mktemp("etcd")
    with Etcd(directory) as etcd:
        yield etcd


@pytest.fixture
def options(one_etcd: Etcd) -> EtcdOptions:
    return EtcdOptions(one_etcd.urls)


@pytest.fixture
def prefix() -> bytes:
    """Return keys that no other test uses."""
    return f"test/{secrets.token_hex(8)}/".encode()
