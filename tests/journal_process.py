"""`tests.journal_node` as a child process, with the verbs of `processes.NodeProcess`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.processes import NodeProcess


class JournalProcess(NodeProcess):
    """One node of the journal alone; ``ports``: the first of three for each node of the cluster."""

    def __init__(self, data: Path, number: int, ports: list[int], backend: str, settings: dict[str, Any]) -> None:
        super().__init__(f"node-{number + 1}", data, ports[number])
        self.specification: dict[str, Any] = {
            "directory": str(data),
            "number": number,
            "ports": ports,
            "backend": backend,
            "settings": settings,
        }

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.journal_node", json.dumps(self.specification)]
