"""Processes that claim the same epoch at the same moment, over real sockets, at nodes of a journal.

`Epochs` is the node's side (tests/journal_node.py), `Contender` one of the processes (tests/contender.py), as the test
sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from typing import Any, Self

import msgspec

from srengine import errors
from srengine.codec import registry
from srengine.ha.epochs import FENCE, Fence, newest_epoch, read_epoch
from srengine.ha.journal import Command
from srengine.ha.protocol import HAProtocol
from srengine.ha.tables import Readable
from tests.processes import ROOT

TIMEOUT_S = 10.0


class Claim(msgspec.Struct, frozen=True):
    """Insert this epoch."""

    fence: Fence
    request: bytes


class Claimed(msgspec.Struct, frozen=True):
    """Whether the claimant owns it now."""

    won: bool


class GetEpoch(msgspec.Struct, frozen=True):
    """Ask for the newest one, linearizably."""


class Newest(msgspec.Struct, frozen=True):
    """``digest``: of its record; ``owner``: the name in it."""

    epoch: int
    term: int
    digest: bytes
    owner: str


for kind, message_type in (
    ("test.claim", Claim),
    ("test.claimed", Claimed),
    ("test.get_epoch", GetEpoch),
    ("test.newest", Newest),
):
    registry.register(kind, message_type)


class Epochs:
    """The node's side."""

    def __init__(self, protocol: HAProtocol, rows: Readable) -> None:
        self._protocol = protocol
        self._rows = rows

    async def claim(self, message: Claim) -> Claimed:
        command = Command(FENCE, msgspec.msgpack.encode(message.fence), request=message.request)
        try:
            await self._protocol.propose(command, timeout_s=TIMEOUT_S)
        except errors.EpochTaken:
            return Claimed(won=False)
        return Claimed(won=True)

    async def newest(self, message: GetEpoch) -> Newest:
        del message
        await self._protocol.read_barrier(timeout_s=TIMEOUT_S)
        epoch, digest = newest_epoch(self._rows)
        record = read_epoch(self._rows, epoch)
        return Newest(epoch, 0 if record is None else record.term, digest, "" if record is None else record.name)


class Contender:
    """One such process."""

    def __init__(self, name: str, address: str) -> None:
        command = [sys.executable, "-m", "tests.contender", name, address]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, newest: Newest) -> None:
        """Let it claim what follows ``newest``."""
        line = {"epoch": newest.epoch, "term": newest.term, "digest": newest.digest.hex()}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def won(self) -> bool:
        """Return what became of it."""
        assert self._process.stdout is not None
        found: bool = json.loads(self._process.stdout.readline())
        return found


async def ask(channel: Any, message: msgspec.Struct) -> Any:
    """Ask until it is answered."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(errors.Unreachable, errors.TimedOut, errors.NoLeader, errors.NotReady):
                channel.wake()
                return (await channel.request(message, timeout_s=TIMEOUT_S)).message
