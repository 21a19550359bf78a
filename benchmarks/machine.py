"""What the numbers were measured on: processor, memory, disk and its fsync, versions."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FSYNC_ROUNDS = 200
MEMORY_BLOCK = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Disk:
    """The place under test. ``fsync_s`` is the median cost of a 4 KiB overwrite made durable."""

    directory: str
    filesystem: str
    device: str
    fsync_s: float


def fsync_cost(directory: Path) -> float:
    """Return the median seconds that fdatasync takes after one overwritten page of a file that has its size."""
    path = directory / "fsync.probe"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, bytes(1 << 20), 0)
        os.fsync(descriptor)
        times = []
        for turn in range(FSYNC_ROUNDS):
            os.pwrite(descriptor, bytes([turn % 256]) * 4096, (turn % 256) * 4096)
            start = time.perf_counter()
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - start)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(times)


def have_memory(directory: Path, size: int) -> None:
    """Have the machine hold ``size`` bytes of free memory: write a file as large in ``directory`` and delete it.

    A virtual machine may have given memory back that nobody used for a while. The first who writes to it pays for
    getting it again: writing a page of a file was seen to take three to six times as long. Call it before what is
    timed, or whoever comes after the memory was freed is measured as the faster.
    """
    path = directory / "memory.probe"
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(MEMORY_BLOCK))):
            file.write(MEMORY_BLOCK)
    path.unlink()


def disk(directory: Path) -> Disk:
    """Describe the filesystem that holds ``directory`` (Linux; elsewhere "unknown")."""
    device, filesystem, best = "unknown", "unknown", -1
    mounts = Path("/proc/self/mounts")
    if mounts.is_file():
        for line in mounts.read_text().splitlines():
            source, point, kind, *_ = line.split()
            if len(point) > best and directory.resolve().is_relative_to(point):
                device, filesystem, best = source, kind, len(point)
    return Disk(str(directory), filesystem, device, fsync_cost(directory))


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def etcd_version() -> str:
    """Return the version of the machine's etcd, empty without one."""
    if shutil.which("etcd") is None:
        return ""
    said = subprocess.run(["etcd", "--version"], check=False, capture_output=True, text=True).stdout
    return said.partition("etcd Version:")[2].split("\n")[0].strip()


def describe(place: Disk) -> list[str]:
    """Return the machine in a few lines."""
    versions = [f"CPython {platform.python_version()}"]
    for name in ("lmdb", "pyzmq", "zstandard", "rocksdict", "plyvel"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    etcd = etcd_version()
    if etcd:
        versions.append(f"etcd {etcd}")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    fsync = f"{place.fsync_s * 1e6:.0f} us (median)"
    return [
        f"machine: {processor()}, {os.cpu_count()} cores, {memory_bytes() / 2**30:.0f} GiB, {system}",
        f"disk: {place.filesystem} on {place.device}, fdatasync of an overwritten page {fsync}",
        f"versions: {', '.join(versions)}",
    ]


class AnonymousMemory:
    """The memory of this process that no file backs (its own, not LMDB's mapped pages); 0 where it is not known.

    One system call and little else, because it is asked for hundreds of times a second beside what is measured.
    """

    def __init__(self) -> None:
        """Open what the kernel tells of this process."""
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else -1
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def bytes(self) -> int:
        """Return how much it is now."""
        if self._statm < 0:
            return 0
        _, resident, shared, _ = os.pread(self._statm, 128, 0).split(b" ", 3)
        return (int(resident) - int(shared)) * self._page_bytes

    def close(self) -> None:
        """Close it."""
        if self._statm >= 0:
            os.close(self._statm)
