from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cluster import Asker
from tests.processes import Nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as started:
        yield started.start_all()


@pytest.fixture
def asker() -> Iterator[Asker]:
    with Asker() as made:
        yield made
