"""Fixtures of this room."""

from __future__ import annotations

import pytest

from tests.ha.agreed import agreed


@pytest.fixture
def node(tmp_path):
    """The agreed state of one node."""
    tmp_path.chmod(0o700)
    with agreed(tmp_path / "node") as made:
        yield made


@pytest.fixture
def other(tmp_path):
    """The agreed state of another node."""
    tmp_path.chmod(0o700)
    with agreed(tmp_path / "other") as made:
        yield made
