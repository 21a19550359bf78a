"""Durable fences: a tablet that met an input/output error or a crash of its memory map stays shut until it is proved.

Why not simply open it again? After a failed fdatasync Linux marks the pages clean: the page cache goes on showing what
was never written, a second fdatasync succeeds, and a plain reopen passes every check. Only the medium can say what is
there. So the fence is a file, ``FENCED`` in the tablet's directory, that outlives the process, and it is lifted in one
of two ways: the replica is seeded again from another, or `prove` has read the file past the page cache::

    FENCED there? -- no --> open
         | yes
         v
    read with O_DIRECT == read through the page cache? -- no --> drop the cached pages, compare again -- no --> stays
         | yes                                                            | yes
         v <--------------------------------------------------------------'
    every page and every record verified? -- no --> stays fenced
         | yes
         v
    remove FENCED, durably

The file is written by the kernel at the moment of the fault (from a signal handler after SIGBUS, hence a plain text
that needs no memory), or by `set_fence`. Whatever its content, its presence decides.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors
from srengine.storage import files, pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

FENCE_NAME: Final = "FENCED"
_FENCE_BYTES_MAX: Final = 64 * 1024
_STEP_BYTES: Final = 1 << 20
"""Bytes compared at a time; a multiple of every page and sector size."""


class Fence(NamedTuple):
    """Why a tablet is fenced. ``at`` is seconds since 1970, None when the writer did not know."""

    reason: str
    detail: str
    at: float | None = None


def read_fence(directory: Path) -> Fence | None:
    """Return the fence of a tablet's directory, or None. Unreadable content is a fence too."""
    with files.Directory(directory) as opened:
        if not opened.exists(FENCE_NAME):
            return None
        try:
            content = opened.read(FENCE_NAME, bytes_max=_FENCE_BYTES_MAX, insecure=True)
        except errors.NotFound:
            return None
        except errors.Error as error:
            return Fence("unknown", error.message)
    return _decode(content)


def _decode(content: bytes) -> Fence:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        reason, detail, at = found.get("reason"), found.get("detail", ""), found.get("at")
        if isinstance(reason, str) and isinstance(detail, str):
            return Fence(reason, detail, float(at) if isinstance(at, (int, float)) else None)
    text = content.decode("utf-8", "backslashreplace").strip("\0\n ")
    return Fence(text.split(None, 1)[0] if text else "unknown", text[:1000])


def set_fence(directory: Path, reason: str, detail: str) -> None:
    """Fence a tablet durably. An older fence stands: the first fault is the one to know about."""
    with files.Directory(directory) as opened:
        if not opened.exists(FENCE_NAME):
            content = json.dumps({"reason": reason, "detail": detail, "at": time.time()}).encode() + b"\n"
            opened.write_durably(FENCE_NAME, content)


def lift_fence(directory: Path) -> bool:
    """Remove the fence durably; return False when there was none. For callers that have proved the tablet."""
    with files.Directory(directory) as opened:
        return opened.remove(FENCE_NAME)


def refuse_if_fenced(directory: Path, tablet_id: str) -> None:
    """Raise `TabletFenced` with the reason if the tablet is fenced."""
    fence = read_fence(directory)
    if fence is not None:
        raise errors.TabletFenced(
            f"tablet {tablet_id} is fenced after a fault ({fence.reason}): {fence.detail}",
            tablet=tablet_id,
            reason=fence.reason,
            detail=fence.detail,
            at=fence.at,
        )


def prove(directory: Path, verify: Callable[[], None], *, beside: Sequence[str] = ()) -> None:
    """Lift the fence of a closed tablet if what is on the medium proves healthy.

    ``beside``: names of files that belong to it, next to its data. ``verify`` opens the tablet and checks every record;
    it raises if anything is wrong and leaves the tablet closed. Raises `CorruptionError` (the medium and the page cache
    disagree, or a page is damaged), `TabletFenced` (this file system cannot be read past the page cache) or what
    ``verify`` raises; the fence then stays.
    """
    for name in (pages.DATA_NAME, *beside):
        _agrees(directory / name)
    path = directory / pages.DATA_NAME
    pages.check_before_open(path)
    report = pages.walk(path)
    if report.damages:
        worst = report.damages[0]
        raise errors.CorruptionError(f"{path} is damaged: {worst.detail}", file=str(path), page=worst.page)
    verify()
    lift_fence(directory)


def _agrees(path: Path) -> None:
    """Raise `CorruptionError` unless the page cache shows what is on the medium."""
    if first_difference(path) is None:
        return
    drop_cached_pages(path)
    offset = first_difference(path)
    if offset is not None:
        raise errors.CorruptionError(
            f"{path} differs at byte {offset} between the disk and the page cache", file=str(path), offset=offset
        )


def first_difference(path: Path) -> int | None:
    """Return the first byte at which the file on the medium is not what the page cache shows, or None.

    Raises `TabletFenced` when the file system cannot read past the page cache, `CorruptionError` when the medium
    cannot be read.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        raise _cannot_read_past(path, "this platform has no O_DIRECT")
    with files.Directory(path.parent) as directory:
        cached = directory.open(path.name, os.O_RDONLY)
        direct = -1
        try:
            direct = os.open(path.name, os.O_RDONLY | flag | os.O_CLOEXEC, dir_fd=directory.fileno())
            return _compare(path, cached, direct)
        except OSError as error:
            raise _cannot_read_past(path, error.strerror or str(error)) from error
        finally:
            os.close(cached)
            if direct >= 0:
                os.close(direct)


def _compare(path: Path, cached: int, direct: int) -> int | None:
    # O_DIRECT wants memory aligned to sectors; an anonymous map is aligned to pages.
    with mmap.mmap(-1, _STEP_BYTES) as buffer:
        offset = 0
        while True:
            try:
                got = os.preadv(direct, [buffer], offset)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise _cannot_read_past(path, error.strerror or "") from error
                raise errors.CorruptionError(
                    f"{path} cannot be read from the disk at byte {offset}: {error.strerror}",
                    file=str(path),
                    offset=offset,
                ) from error
            seen = os.pread(cached, _STEP_BYTES, offset)
            found = buffer[:got]
            if found != seen:
                return offset + _common_bytes(found, seen)
            if got == 0:
                return None
            offset += got
            if got % 512:
                return None


def _common_bytes(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def drop_cached_pages(path: Path) -> None:
    """Ask the kernel to forget the cached pages of a file, so that the next read comes from the medium."""
    with files.Directory(path.parent) as directory:
        fd = directory.open(path.name, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _cannot_read_past(path: Path, why: str) -> errors.TabletFenced:
    return errors.TabletFenced(
        f"{path} cannot be read past the page cache ({why}), so the tablet stays fenced: seed it again from a replica",
        file=str(path),
        reason="unproved",
    )
