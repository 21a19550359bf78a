"""A node's insides in this process: coalescing, supervision, what its parts say when they cannot."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from srengine import errors, limits
from srengine.client import messages
from srengine.ha import leader_machine as lm
from srengine.node import Node, NodeOptions, parse_initial, run_node
from srengine.node.interpreter import SWITCH_S, YOUNG_OBJECTS
from srengine.node.logs import JsonFormatter
from srengine.node.loop import BusySelector, loop_factory
from srengine.node.runtime import Runtime
from srengine.node.supervisor import Supervisor
from srengine.node.watch import Watch
from srengine.storage import Batch, encode_puts
from srengine.sync.leading import TabletLeader
from tests.processes import free_ports

TABLE = "shop.orders"


async def single(directory: Path) -> Runtime:
    port = free_ports()
    address = f"tcp://127.0.0.1:{port}"
    options = NodeOptions("n1", directory, address, cluster="test", initial=parse_initial(f"n1={address}"))
    runtime = Runtime(options)
    await runtime.start()
    return runtime


async def tablet(runtime: Runtime) -> TabletLeader:
    way = runtime.endpoint.channel(runtime.ports.addresses["client"])
    await way.request(messages.CreateDatabase("shop"), timeout_s=10)
    await way.request(messages.CreateTable(TABLE, tablets=1, replicas=1), timeout_s=10)
    (leader,) = runtime.sync.leaders.values()
    return leader


def run(work: Any) -> None:
    asyncio.run(work)


def test_a_process_that_is_a_node_has_the_interpreter_to_itself(tmp_path: Path) -> None:
    """`run_node` sets collector and threads once the node serves; a node inside another program leaves them alone."""
    port = free_ports()
    address = f"tcp://127.0.0.1:{port}"
    options = NodeOptions("n1", tmp_path / "data", address, cluster="test", initial=parse_initial(f"n1={address}"))
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    seen: list[tuple[int, bool, float]] = []

    def ready(_: Any) -> None:
        seen.append((gc.get_threshold()[0], gc.get_freeze_count() > 0, sys.getswitchinterval()))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with Node(options):
            assert gc.get_threshold() == before
            assert gc.get_freeze_count() == 0
            assert sys.getswitchinterval() == interval
        run_node(options, ready)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
    assert seen == [(YOUNG_OBJECTS, True, pytest.approx(SWITCH_S))]


@pytest.mark.parametrize("busy_poll_s", [0.0, 0.002])
def test_a_node_waits_as_it_is_told(tmp_path: Path, busy_poll_s: float) -> None:
    """``busy_poll_s`` decides about the event loop, in the foreground and inside another program."""
    port = free_ports()
    address = f"tcp://127.0.0.1:{port}"
    initial = parse_initial(f"n1={address}")
    options = NodeOptions("n1", tmp_path / "data", address, cluster="test", initial=initial, busy_poll_s=busy_poll_s)
    seen: list[bool] = []
    before, interval = gc.get_threshold(), sys.getswitchinterval()

    def ready(_: Any) -> None:
        seen.append(isinstance(asyncio.get_running_loop()._selector, BusySelector))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with Node(options) as node:
            assert node._loop is not None
            seen.append(isinstance(node._loop._selector, BusySelector))
        run_node(options, ready)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
    assert seen == [busy_poll_s > 0] * 2


def test_a_node_counts_its_waits(tmp_path: Path) -> None:
    """Metrics say how often the event loop has slept and waited busily; of another loop than ours nothing is said."""

    async def story(*, ours: bool) -> None:
        runtime = await single(tmp_path / f"data-{ours}")
        try:
            Watch(runtime)._loop()
            if not ours:
                assert "srengine_node_sleeps" not in runtime.metrics.snapshot()
                return
            before = runtime.metrics.value("srengine_node_sleeps")
            assert before > 0
            await asyncio.sleep(0.05)
            Watch(runtime)._loop()
            assert runtime.metrics.value("srengine_node_sleeps") > before
            assert runtime.metrics.value("srengine_node_busy_waits") > 0
        finally:
            await runtime.stop()

    asyncio.run(story(ours=False))
    with asyncio.Runner(loop_factory=loop_factory(0.001)) as runner:
        runner.run(story(ours=True))


def test_writes_that_arrive_together_share_a_transaction(tmp_path: Path) -> None:
    """Group commit: 300 writes at once take far fewer transactions than 300, and each has its own outcome."""

    async def story() -> None:
        runtime = await single(tmp_path / "data")
        try:
            leader = await tablet(runtime)
            before = leader.slot.opened().counters["commits"]
            batches = [Batch(encode_puts([(b"%04d" % number, b"v")])) for number in range(300)]
            outcomes = await asyncio.gather(*(leader.write(batch, lm.Need.QUORUM, 10) for batch in batches))
            assert len({outcome.first_sequence for outcome in outcomes}) == 300
            assert leader.slot.opened().counters["commits"] - before < 100
            assert leader.slot.opened().live_count == 300
        finally:
            await runtime.stop()

    run(story())


def test_a_malformed_batch_does_not_spoil_its_neighbours(tmp_path: Path) -> None:
    """A batch that the kernel refuses fails alone; those that shared its group are applied."""

    async def story() -> None:
        runtime = await single(tmp_path / "data")
        try:
            leader = await tablet(runtime)
            batches = [Batch(encode_puts([(b"%02d" % number, b"v")])) for number in range(10)]
            batches[5] = Batch(b"\xff" * 40)
            writes = (leader.write(batch, lm.Need.QUORUM, 10) for batch in batches)
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
            assert [isinstance(outcome, errors.InvalidValue) for outcome in outcomes] == [n == 5 for n in range(10)]
            assert leader.slot.opened().live_count == 9
        finally:
            await runtime.stop()

    run(story())


def test_a_stopping_node_takes_nothing_new(tmp_path: Path) -> None:
    """While a node stops, requests get a typed error, and stopping twice is harmless."""

    async def story() -> None:
        runtime = await single(tmp_path / "data")
        await runtime.stop()
        with pytest.raises(errors.NotReady), runtime.working():
            pass
        await runtime.stop()

    run(story())


def test_an_alarm_is_said_once_a_minute_and_kept(tmp_path: Path) -> None:
    """A repeated alarm is counted each time, logged once a minute, and listed once."""

    async def story() -> None:
        runtime = await single(tmp_path / "data")
        try:
            for _ in range(3):
                runtime.alarm("test_event", "the same")
            assert list(runtime.alarm.kept) == ["test_event: the same"]
            assert runtime.metrics.value("srengine_node_alarms_total", event="test_event") == 3
        finally:
            await runtime.stop()

    run(story())


def test_a_task_that_fails_unexpectedly_stops_the_node() -> None:
    """A mistake of ours in any task ends the node with its name; our own errors do with theirs; cancelling does not."""

    async def story() -> None:
        async def fails(error: BaseException) -> None:
            raise error

        for error, said in ((ZeroDivisionError("x"), "ZeroDivisionError"), (errors.DiskFull("full"), "full")):
            supervisor = Supervisor()
            supervisor.spawn(fails(error), "a task")
            reason = await supervisor.failed
            assert said in reason.message
            await supervisor.stop()
        supervisor = Supervisor()
        waiting = supervisor.spawn(asyncio.sleep(limits.CONTACT_S), "waits")
        await supervisor.stop()
        assert waiting.cancelled()
        assert not supervisor.failed.done()

    run(story())


def test_log_lines_are_json() -> None:
    """One object a line, with the facts as fields of their own, whatever is in them."""
    record = logging.LogRecord("srengine.node", logging.ERROR, "f", 1, "cannot %s", ("write",), None)
    record.event = "failed"
    record.odd = {"bytes": b"\x00"}
    line = JsonFormatter("n1").format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["node"], found["level"], found["message"], found["event"]) == (
        "n1",
        "error",
        "cannot write",
        "failed",
    )
