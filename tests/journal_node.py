"""One node of the journal alone, as a process: a backend of coordination, registers, and a client port; no tablets.

For what concerns the journal only: benchmarks against etcd and histories of registers on real processes. Started as
``python -m tests.journal_node SPECIFICATION``, JSON with ``directory``, ``number`` (from 0), ``ports`` (first of three for
each node), ``backend`` and ``settings``. Says ``{"event": "ready"}`` on stdout when it knows a leader. SIGTERM: hands the
leadership over, stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
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
from srengine.storage import MetadataStore
from srengine.transport import Endpoint, Identity, Reply
from srengine.types import NodeId
from tests.ha.contract.wire import BookWire

CLUSTER = "c" * 32
TRANSFER_S = 5.0


def node_id(number: int) -> NodeId:
    return NodeId(f"{number + 1:032x}")


def address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def bootstrap(ports: list[int]) -> Command:
    """The first entry: the same on every node."""
    members = tuple(
        m.Member(f"node-{number + 1}", address(port), number, node_id=node_id(number))
        for number, port in enumerate(ports)
    )
    return Command(m.BOOTSTRAP, msgspec.msgpack.encode(m.Bootstrap(m.Cluster(CLUSTER, "journal"), members)))


async def run(specification: dict[str, Any]) -> None:
    directory, number = Path(specification["directory"]), specification["number"]
    ports: list[int] = specification["ports"]
    fresh = not directory.exists()
    directory.mkdir(mode=0o700, exist_ok=True)
    if fresh and specification["backend"] == "raft":
        from srengine.ha.backends.raft import found

        found(directory, bootstrap(ports))
    name = f"node-{number + 1}"
    book = {node_id(other): {"peer": address(port + 1), "bulk": address(port + 2)} for other, port in enumerate(ports)}
    endpoint = Endpoint(Identity(node_id=node_id(number), name=name, cluster_id=CLUSTER))
    store = MetadataStore(directory / "meta")
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks: set[asyncio.Task[Any]] = set()

    def spawn(work: Any, what: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=what)
        tasks.add(task)
        task.add_done_callback(ended)
        return task

    def ended(task: asyncio.Task[Any]) -> None:
        tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not failed.done():
            failed.set_exception(task.exception())

    protocol = find_backend(specification["backend"])(
        Surroundings(
            name=name,
            node_id=node_id(number),
            address=address(ports[number]),
            data_dir=directory,
            machine=MetadataMachine(store, [MembersApplier(), EpochsApplier(), RegistersApplier()]),
            wire=BookWire(endpoint, book),
            clock=SystemClock(),
            spawn=spawn,
            alarm=lambda event, text: logging.getLogger("alarm").warning("%s: %s", event, text),
            metrics=Metrics(),
            options=HAOptions(settings=specification["settings"]),
            trusted=True,
        )
    )
    service = RegisterService(protocol, store)
    for kind, handler in ((PutRegister, service.put), (GetRegister, service.get), (GetJournal, service.journal)):

        async def answer(_: Any, message: Any, __: Any, handler: Any = handler) -> Reply:
            return Reply(await handler(message))

        endpoint.serve(kind, answer, ports=("client",))
    for port, kind in enumerate(("client", "peer", "bulk")):
        await endpoint.listen(kind, address(ports[number] + port))
    await protocol.start()
    known = asyncio.Event()

    async def follow() -> None:
        with contextlib.suppress(errors.Closed):
            async for observed in protocol.observe():
                if observed.leader is not None:
                    known.set()
                if observed.role is Role.LEADER and not await protocol.fencing():
                    await protocol.resign("fencing failed")

    spawn(follow(), "follow")
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await known.wait()
    print('{"event": "ready"}', flush=True)
    stopping = asyncio.create_task(asked.wait())
    await asyncio.wait({stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if failed.done():
        failed.result()
    if protocol.epoch:
        with contextlib.suppress(errors.Error):
            await protocol.transfer_leader(timeout_s=TRANSFER_S)
    await protocol.stop()
    for task in list(tasks):
        task.cancel()
    await endpoint.close()
    store.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(run(json.loads(sys.argv[1])))
