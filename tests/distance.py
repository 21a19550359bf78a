"""A long way between two sides of a network of namespaces: whatever crosses it arrives later.

::

    hosts of one side --- router --- hosts of the other side
                            | ^
                    wan (a tun device): every packet that crosses is handed to a thread,
                            v |         which gives it back after `Distance.one_way_s`

The kernel's own delay (netem) is not in every kernel; a tun device is. Packets keep their order, none is lost, and both
ways are equally long. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Self

from tests.namespaces import Network, run_in, run_ip

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_DEVICE = "wan"
_TABLE = "177"
_PREFERENCE = "10000"
"""Behind those of cuts, which so win."""
_PACKET_BYTES_MAX = 65_536


class Distance:
    """Puts ``one`` and ``other`` (names of hosts) apart while the with-block lasts."""

    def __init__(self, network: Network, one: Iterable[str], other: Iterable[str], *, one_way_s: float = 0.0) -> None:
        self.one_way_s = one_way_s
        """May be changed at any time; packets that wait already keep their time."""
        self.packets = 0
        """That have crossed, either way."""
        self.failure: BaseException | None = None
        self._network = network
        self._pairs = [*itertools.product(list(one), list(other))]
        self._device = -1
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._run, name="distance", daemon=True)

    def __enter__(self) -> Self:
        opened = threading.Thread(target=self._open)
        opened.start()
        opened.join()
        if self.failure is not None:
            raise self.failure
        router = self._network.router
        for name in ("all", _DEVICE):
            run_in(router, "sh", "-c", f"echo 0 > /proc/sys/net/ipv4/conf/{name}/rp_filter")
        run_ip("-n", router, "link", "set", _DEVICE, "up")
        run_ip("-n", router, "route", "add", "default", "dev", _DEVICE, "table", _TABLE)
        self._thread.start()
        for one, other in self._pairs:
            for ends in ((one, other), (other, one)):
                where = self._network.between(*ends)
                run_ip("-n", router, "rule", "add", "pref", _PREFERENCE, *where, "lookup", _TABLE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._woken)
        self._thread.join()
        os.close(self._wake)
        os.close(self._device)
        if self.failure is not None:
            raise self.failure

    def _open(self) -> None:
        """Make the device: a thread's, because it belongs to the network of whoever opens it."""
        try:
            self._network.enter_namespace(self._network.router)
            self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(self._device, _TUNSETIFF, request)
        except BaseException as error:
            self.failure = error

    def _run(self) -> None:
        waiting: deque[tuple[float, bytes]] = deque()
        try:
            while True:
                pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
                ready, _, _ = select.select([self._device, self._wake], [], [], pause)
                if self._wake in ready:
                    return
                with contextlib.suppress(BlockingIOError):
                    while self._device in ready:
                        packet = os.read(self._device, _PACKET_BYTES_MAX)
                        waiting.append((time.monotonic() + self.one_way_s, packet))
                now = time.monotonic()
                while waiting and waiting[0][0] <= now:
                    self.packets += 1
                    os.write(self._device, waiting.popleft()[1])
        except BaseException as error:
            self.failure = error

    def round_trip_s(self, source: str, target: str, port: int, *, tries: int = 5) -> float:
        """Return the shortest time that one host takes to connect to a port of another: one packet there, one back."""
        found: list[float] = []

        def connect() -> None:
            self._network.enter(source)
            for _ in range(tries):
                began = time.perf_counter()
                with socket.create_connection((self._network.host(target), port), 30):
                    found.append(time.perf_counter() - began)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join()
        return min(found)
