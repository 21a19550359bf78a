"""A store and its place."""

from __future__ import annotations

import pytest

from tests.storage.logged.stores import opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    with opened(path) as found:
        yield found
