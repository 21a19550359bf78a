"""The proxy does what it says, and nothing else: tests that rely on it can."""

from __future__ import annotations

import socket
import threading

import pytest
import zmq

from tests.chaos.proxy import ChaosProxy, Verdict


@pytest.fixture
def echo():
    """A TCP server that sends back what it gets; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()
    threads = []

    def serve(connection):
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                pass

    def accept():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(connection,), daemon=True)
            thread.start()
            threads.append(thread)

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    yield listener.getsockname()[1]
    stop.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join(5)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            break
        data += part
    return data


def connect(proxy: ChaosProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def test_passes_everything(echo):
    """What goes in comes out, in order, when nothing is asked for."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        data = bytes(range(256)) * 4000
        threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
        assert receive(connection, len(data)) == data
        assert proxy.forward.bytes_passed == proxy.backward.bytes_passed == len(data)


def test_delay_and_bandwidth_hold_back(echo):
    """Delayed or slow bytes have not arrived while others' time passes, and arrive whole."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        proxy.forward.delay_s = 0.3
        connection.sendall(b"late")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        connection.settimeout(10)
        assert receive(connection, 4) == b"late"
        proxy.forward.delay_s = 0.0
        proxy.forward.bytes_per_s = 100
        connection.sendall(b"x" * 3_000)
        assert receive(connection, 1) == b"x"
        assert proxy.forward.bytes_passed < 3_000
        proxy.forward.bytes_per_s = None
        assert len(receive(connection, 2_999)) == 2_999


def test_one_way_cut(echo):
    """A black hole in one direction swallows it; the other direction goes on."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        proxy.backward.black_hole = True
        connection.sendall(b"lost")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert proxy.forward.bytes_passed == 5


def test_cut_and_refuse(echo):
    """A cut resets what stands; refusing resets what comes."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        connection.sendall(b"a")
        receive(connection, 1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        proxy.refusing = True
        # NB: the reset may come before connecting has ended here.
        with pytest.raises(ConnectionResetError), connect(proxy) as second:
            second.recv(1)
        proxy.refusing = False
        with connect(proxy) as third:
            third.sendall(b"b")
            assert receive(third, 1) == b"b"
        assert proxy.connections_seen == 3


def test_corrupts_one_bit(echo):
    """A corrupted chunk differs in exactly one bit."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        proxy.forward.corrupt_bytes = 1.0
        connection.sendall(bytes(100))
        assert sum(byte.bit_count() for byte in receive(connection, 100)) == 1


def test_records(echo):
    """A recording has the bytes that passed in that direction."""
    with ChaosProxy("127.0.0.1", echo) as proxy, connect(proxy) as connection:
        proxy.forward.recording = True
        connection.sendall(b"remember")
        receive(connection, 8)
        assert bytes(proxy.forward.recorded) == b"remember"
        assert not proxy.backward.recorded


@pytest.fixture
def pull():
    """A bound PULL socket; yields (socket, port, function that connects a PUSH)."""
    context = zmq.Context()
    receiver = context.socket(zmq.PULL)
    receiver.rcvtimeo = 10_000
    port = receiver.bind_to_random_port("tcp://127.0.0.1")
    sender = context.socket(zmq.PUSH)

    def push_to(proxy):
        sender.connect(proxy.address)
        return sender

    yield receiver, port, push_to
    sender.close(0)
    receiver.close(0)
    context.term()


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({}, b"0 1 2 3"),
        ({1: Verdict.DROP}, b"0 2 3"),
        ({1: Verdict.DUPLICATE}, b"0 1 1 2 3"),
        ({1: Verdict.SWAP}, b"0 2 1 3"),
    ],
)
def test_messages_are_dropped_duplicated_swapped(pull, verdicts, expected):
    """Whole messages are lost, doubled or reordered; small and large ones, with several parts."""
    receiver, port, push_to = pull
    with ChaosProxy("127.0.0.1", port, level="messages") as proxy:
        proxy.forward.decide = lambda number, _: verdicts.get(number, Verdict.PASS)
        sender = push_to(proxy)
        for number in range(4):
            sender.send_multipart([str(number).encode(), b"x" * (100_000 if number % 2 else 10)])
        wanted = expected.split()
        assert [receiver.recv_multipart()[0] for _ in wanted] == wanted


def test_messages_are_held_and_released(pull):
    """A held message comes when it is released; later ones passed it."""
    receiver, port, push_to = pull
    with ChaosProxy("127.0.0.1", port, level="messages") as proxy:
        proxy.forward.decide = lambda number, _: Verdict.HOLD if number == 0 else Verdict.PASS
        sender = push_to(proxy)
        sender.send(b"early")
        sender.send(b"late")
        assert receiver.recv() == b"late"
        assert proxy.release() == 1
        assert receiver.recv() == b"early"


def test_messages_are_corrupted(pull):
    """One bit of the content changes; ZeroMQ does not notice."""
    receiver, port, push_to = pull
    with ChaosProxy("127.0.0.1", port, level="messages") as proxy:
        proxy.forward.decide = lambda *_: Verdict.CORRUPT
        push_to(proxy).send_multipart([b"head", bytes(50)])
        head, body = receiver.recv_multipart()
        assert head == b"head"
        assert sum(byte.bit_count() for byte in body) == 1


def test_chance_is_seeded():
    """The same seed gives the same verdicts."""

    def verdicts(seed):
        proxy = ChaosProxy("127.0.0.1", 1, level="messages", seed=seed)
        proxy.forward.drop, proxy.forward.duplicate = 0.3, 0.3
        found = [proxy.forward.verdict([b""]) for _ in range(50)]
        proxy._loop.close()
        return found

    assert verdicts(1) == verdicts(1) != verdicts(2)
