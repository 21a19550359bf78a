"""The command line in this process: against a cluster in memory, with its output and exit code."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from srengine.cli import main
from srengine.cli.settings import Settings
from srengine.client import Client
from tests.client.fake import ADDRESSES, FakeCluster


@dataclass
class Result:
    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def errors(self) -> str:
        return self.stderr.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@pytest.fixture
def cluster(monkeypatch) -> FakeCluster:
    """A cluster with the table shop.orders; every command of the test talks to it."""
    cluster = FakeCluster({"shop.orders": 4})

    def connect(self: Settings) -> Client:
        values = self._completed()
        return Client(values.endpoint or ADDRESSES, source=cluster.source, timeout_s=values.timeout or 2)

    monkeypatch.setattr(Settings, "connect", connect)
    return cluster


@pytest.fixture
def run(monkeypatch, capfdbinary):
    """Run the command line in this process."""
    for name in ("ENDPOINT", "TIMEOUT", "TOKEN", "KEY_FILE", "SERVER_KEY", "CONTEXT"):
        monkeypatch.delenv(f"SRENGINE_{name}", raising=False)

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        sys.stdout.flush()
        captured = capfdbinary.readouterr()
        return Result(ended.value.code or 0, captured.out, captured.err)

    return run
