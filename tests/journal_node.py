"""One node of the journal alone, as a process: a backend of coordination, registers, and a client port; no tablets.

For what concerns the journal only: benchmarks against etcd, histories of registers, and claims of epochs on real
processes. Started as ``python -m tests.journal_node SPECIFICATION``, JSON with ``directory``, ``number`` (from 0),
``ports`` (the first of three for each node), ``backend`` and ``settings``. Says on stdout ``{"event": "ready"}`` when
it knows a leader, and ``{"event": "fenced", "seconds": …}`` after each fencing that succeeded. SIGTERM: hands the
leadership over and stops; SIGUSR1: gives it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from srengine import errors
from srengine.clock import SystemClock
from srengine.ha import members as m
from srengine.ha.backends import HAOptions, Surroundings, find_backend
from srengine.ha.epochs import EpochsApplier
from srengine.ha.journal import Command
from srengine.ha.members import MembersApplier
from srengine.ha.metadata import MetadataMachine
from srengine.ha.protocol import Role
from srengine.ha.register_service import GetJournal, GetRegister, PutRegister, RegisterService
from srengine.ha.registers import RegistersApplier
from srengine.metrics import Metrics
from srengine.node.interpreter import take_over_interpreter
from srengine.node.loop import new_event_loop
from srengine.storage import MetadataStore
from srengine.transport import Endpoint, Identity, Reply
from srengine.types import NodeId
from tests.contending import Claim, Epochs, GetEpoch
from tests.ha.contract.wire import BookWire

CLUSTER = "c" * 32
TRANSFER_S = 5.0


def node_id(number: int) -> NodeId:
    return NodeId(f"{number + 1:032x}")


def address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def bootstrap(ports: list[int]) -> Command:
    """Return the first entry, the same on every node."""
    members = tuple(
        m.Member(f"node-{number + 1}", address(port), number, node_id=node_id(number))
        for number, port in enumerate(ports)
    )
    return Command(m.BOOTSTRAP, msgspec.msgpack.encode(m.Bootstrap(m.Cluster(CLUSTER, "journal"), members)))


def prepare(specification: dict[str, Any]) -> Path:
    """Return the node's directory; a first node's is founded."""
    directory = Path(specification["directory"])
    if not directory.exists():
        directory.mkdir(mode=0o700)
        if specification["backend"] == "raft":
            from srengine.ha.backends.raft import found

            found(directory, bootstrap(specification["ports"]))
    return directory


class JournalNode:
    """One process's node."""

    def __init__(
        self, specification: dict[str, Any], directory: Path, tell: Callable[[str, float], None] | None = None
    ) -> None:
        """``tell(event, seconds)``: told what a process says on stdout."""
        self._tell = tell
        self.number: int = specification["number"]
        self.ports: list[int] = specification["ports"]
        name = f"node-{self.number + 1}"
        own = node_id(self.number)
        self.endpoint = Endpoint(Identity(node_id=own, name=name, cluster_id=CLUSTER))
        self.store = MetadataStore(directory / "meta")
        self.machine = MetadataMachine(self.store, [MembersApplier(), EpochsApplier(), RegistersApplier()])
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.known = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        book = {
            node_id(other): {"peer": address(port + 1), "bulk": address(port + 2)}
            for other, port in enumerate(self.ports)
        }
        self.protocol = find_backend(specification["backend"])(
            Surroundings(
                name=name,
                node_id=own,
                address=address(self.ports[self.number]),
                data_dir=directory,
                machine=self.machine,
                wire=BookWire(self.endpoint, book),
                clock=SystemClock(),
                spawn=self._spawn,
                alarm=lambda event, text: logging.getLogger("alarm").warning("%s: %s", event, text),
                metrics=Metrics(),
                options=HAOptions(settings=specification["settings"]),
                trusted=True,
            )
        )

    def _spawn(self, work: Any, what: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            self.failed.set_exception(task.exception())

    async def start(self) -> None:
        service = RegisterService(self.protocol, self.machine.store)
        epochs = Epochs(self.protocol, self.machine.store)
        for kind, handler in (
            (PutRegister, service.put),
            (GetRegister, service.get),
            (GetJournal, service.journal),
            (Claim, epochs.claim),
            (GetEpoch, epochs.newest),
        ):

            async def answer(_: Any, message: Any, __: Any, handler: Any = handler) -> Reply:
                return Reply(await handler(message))

            self.endpoint.serve(kind, answer, ports=("client",))
        for port, kind in enumerate(("client", "peer", "bulk")):
            await self.endpoint.listen(kind, address(self.ports[self.number] + port))
        await self.protocol.start()
        self._spawn(self._follow(), "follow")

    async def _follow(self) -> None:
        with contextlib.suppress(errors.Closed):
            async for observed in self.protocol.observe():
                if observed.leader is not None:
                    self.known.set()
                if observed.role is Role.LEADER:
                    await self._fence()

    async def _fence(self) -> None:
        began = time.perf_counter()
        if await self.protocol.fencing():
            if self._tell is not None:
                self._tell("fenced", time.perf_counter() - began)
        else:
            await self.protocol.resign("fencing failed")

    def give_up(self) -> None:
        self._spawn(self.protocol.resign("asked to"), "resign")

    async def stop(self) -> None:
        if self.protocol.epoch:
            with contextlib.suppress(errors.Error):
                await self.protocol.transfer_leader(timeout_s=TRANSFER_S)
        await self.protocol.stop()
        for task in list(self._tasks):
            task.cancel()
        await self.endpoint.close()
        self.store.close()


def say(event: str, **facts: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


async def run(specification: dict[str, Any], directory: Path) -> None:
    node = JournalNode(specification, directory, lambda event, seconds: say(event, seconds=seconds))
    await node.start()
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, node.give_up)
    await node.known.wait()
    take_over_interpreter()
    say("ready")
    stopping = asyncio.create_task(asked.wait())
    await asyncio.wait({stopping, node.failed}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if node.failed.done():
        node.failed.result()
    await node.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    given = json.loads(sys.argv[1])
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run(given, prepare(given)))
