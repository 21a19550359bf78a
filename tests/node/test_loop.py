"""The event loop that waits busily: the same events as the standard one, and asleep for whatever comes rarely."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import selectors
import signal
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine._native.poll import Poller
from srengine.node.loop import BUSY_S, BusySelector, default_busy_s, loop_factory, new_event_loop

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is no epoll here")
ENDS = 4


@contextlib.contextmanager
def sockets(count):
    """Pairs of connected sockets, none of which blocks."""
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        for pair in pairs:
            for end in pair:
                end.setblocking(False)
        yield pairs
    finally:
        for pair in pairs:
            for end in pair:
                end.close()


@contextlib.contextmanager
def selector(busy_s):
    made = BusySelector(busy_s)
    try:
        yield made
    finally:
        made.close()


def ready(watching):
    """What a selector says now, as a set."""
    return {(key.fd, key.events, key.data, events) for key, events in watching.select(0)}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("watch"), st.integers(0, ENDS - 1), st.sampled_from([1, 2, 3])),
        st.tuples(st.just("leave"), st.integers(0, ENDS - 1), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, ENDS - 1), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, ENDS - 1), st.just(0)),
        st.tuples(st.just("shut"), st.integers(0, ENDS - 1), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(steps, st.sampled_from([0.0, 1.0]))
def test_the_same_events_as_the_standard_selector(wanted, busy_s):
    """Whatever is watched, changed, forgotten, written, read and shut down: both say the same after each step."""
    with sockets(ENDS) as pairs, selector(busy_s) as ours, selectors.EpollSelector() as standard:
        for what, number, events in wanted:
            end, other = pairs[number]
            if what == "watch":
                for each in (ours, standard):
                    change = each.modify if end in each.get_map() else each.register
                    assert change(end, events, number) == (end, end.fileno(), events, number)
            elif what == "leave":
                for each in (ours, standard):
                    if end in each.get_map():
                        each.unregister(end)
            elif what == "write":
                with contextlib.suppress(OSError):
                    other.send(b"x")
            elif what == "read":
                with contextlib.suppress(OSError):
                    end.recv(1)
            else:
                with contextlib.suppress(OSError):
                    other.shutdown(socket.SHUT_WR)
            assert ready(ours) == ready(standard)


@pytest.mark.parametrize("reads", [False, True])
def test_an_end_is_an_event(reads):
    """A pipe whose other end is closed says nothing but that: whoever reads or writes hears of it."""
    reader, writer = os.pipe()
    mine, other = (reader, writer) if reads else (writer, reader)
    try:
        os.close(other)
        with selector(0.001) as ours, selectors.EpollSelector() as standard:
            for each in (ours, standard):
                each.register(mine, selectors.EVENT_READ if reads else selectors.EVENT_WRITE)
            assert ready(ours) == ready(standard) != set()
    finally:
        os.close(mine)


def test_a_short_wait_makes_the_next_one_busy():
    """A wait that took no longer than the bound: the next one finds what comes without having slept."""
    with sockets(1) as [(end, other)], selector(1.0) as ours:
        ours.register(end, selectors.EVENT_READ)
        for _ in range(5):
            other.send(b"x")
            assert [key.fd for key, _ in ours.select(30)] == [end.fileno()]
            end.recv(1)
            assert ours.poller.sleeps == 1  # the first one, of which nothing was known
        assert ours.select(0) == []
        assert (ours.poller.sleeps, ours.poller.busy_waits) == (1, 4)
        writer = threading.Timer(0.05, other.send, [b"x"])
        writer.start()
        assert [key.fd for key, _ in ours.select(30)] == [end.fileno()]
        writer.join()


def test_whatever_comes_rarely_is_waited_for_asleep():
    """A wait that took longer than the bound: the next one sleeps at once, until one is short again."""
    with sockets(1) as [(end, other)], selector(0.3) as ours:
        ours.register(end, selectors.EVENT_READ)
        for turn in (1, 2):
            assert ours.select(0.4) == []
            assert (ours.poller.sleeps, ours.poller.busy_waits) == (turn, 0)
        other.send(b"x")
        assert len(ours.select(30)) == 1  # there already: short
        assert (ours.poller.sleeps, ours.poller.busy_waits) == (3, 0)
        end.recv(1)
        assert ours.select(0.4) == []  # busy at first, then asleep
        assert (ours.poller.sleeps, ours.poller.busy_waits) == (4, 1)
        assert ours.select(0.4) == []
        assert (ours.poller.sleeps, ours.poller.busy_waits) == (5, 1)


def test_without_busy_waits_every_wait_sleeps():
    """A bound of nothing."""
    with sockets(1) as [(end, other)], selector(0.0) as ours:
        ours.register(end, selectors.EVENT_READ)
        other.send(b"x")
        for turn in range(1, 4):
            assert len(ours.select(30)) == 1
            assert ours.poller.sleeps == turn


@pytest.mark.parametrize("busy_s", [0.0, 0.001, 1.0])
def test_a_wait_is_never_shorter_than_its_time_out(busy_s):
    """Neither asleep nor busy, nor a part of each; and it ends."""
    with selector(busy_s) as ours:
        for timeout_s in (0.0, 0.0001, 0.005, 0.003, -1.0):
            start = time.monotonic()
            assert ours.select(timeout_s) == []
            assert time.monotonic() - start >= timeout_s


@pytest.mark.parametrize("busy_s", [0.0, 1.0])
def test_a_signal_ends_a_wait(busy_s):
    """Its handler runs, and what the handler raises is raised."""
    handled = []

    def handle(number, _):
        handled.append(number)
        if len(handled) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with selector(busy_s) as ours:
            for turn in range(2):
                timer = threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGUSR1])
                timer.start()
                with pytest.raises(KeyboardInterrupt) if turn else contextlib.nullcontext():
                    deadline = time.monotonic() + 30
                    while len(handled) <= turn and time.monotonic() < deadline:
                        assert ours.select(0.5) == []
                timer.join()
            assert handled == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_many_at_once():
    """More than are asked for in one call: none is left out for long."""
    with sockets(200) as pairs, selector(0.001) as ours:
        for end, other in pairs:
            ours.register(end, selectors.EVENT_READ)
            other.send(b"x")
        seen = set()
        for _ in range(4):
            seen |= {key.fd for key, _ in ours.select(30)}
        assert seen == {end.fileno() for end, _ in pairs}
        assert len(ours.select(30)) == 200


def test_what_is_no_descriptor_is_an_error():
    """A closed one, and bounds that cannot be meant."""
    with pytest.raises(OSError, match="cannot wait"):
        Poller(1 << 20, 0.0).wait(0.0)
    for busy_s in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="at most a second"):
            Poller(0, busy_s)


@pytest.mark.parametrize("busy_s", [0.0, 0.001, 0.01])
def test_asyncio_runs_on_it(busy_s):
    """Timers, threads, sockets, child processes and cancellation."""

    async def main():
        loop = asyncio.get_running_loop()
        assert isinstance(loop._selector, BusySelector) == (busy_s > 0)
        order, answered = [], asyncio.Event()

        async def answer(reader, writer):
            while line := await reader.readline():
                writer.write(line)
            writer.close()
            await writer.wait_closed()
            answered.set()

        loop.call_later(0.02, order.append, "later")
        loop.call_later(0.01, order.append, "soon")
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for number in range(50):
            writer.write(b"%d\n" % number)
            assert await reader.readline() == b"%d\n" % number
        assert await asyncio.to_thread(lambda: 7) == 7
        child = await asyncio.create_subprocess_exec("true")
        assert await child.wait() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await reader.read()
        assert order == ["soon", "later"]
        writer.close()
        await writer.wait_closed()
        await answered.wait()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=loop_factory(busy_s)) as runner:
        runner.run(main())


def group(root, lines, **files):
    """A directory that looks like a root with control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {}, BUSY_S),
        ("0::/\n", {"cpu_max": "max 100000\n"}, BUSY_S),
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 0.0),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000\n", "a__cpu_max": "max 100000\n"}, BUSY_S),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000\n", "a__cpu_max": "50000 100000\n"}, 0.0),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu__x__cfs_quota_us": "-1\n"}, BUSY_S),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu__x__cfs_quota_us": "20000\n"}, 0.0),
        ("nonsense", {"cpu_max": ""}, BUSY_S),
    ],
)
def test_where_processor_time_is_bounded_nobody_waits_busily(tmp_path, lines, files, expected):
    """Control groups of both versions, of the process and above it; what says nothing bounds nothing."""
    group(tmp_path, lines, **files)
    assert default_busy_s(tmp_path) == expected
    assert default_busy_s(tmp_path / "none") == BUSY_S


def test_the_default_is_that_of_this_machine():
    """None stands for it."""
    loop = new_event_loop()
    try:
        assert isinstance(loop._selector, BusySelector) == bool(default_busy_s())
    finally:
        loop.close()
