"""Who a node is: ``identity.json`` in its data directory, and how a copied or restored directory gives itself away.

========================  ==============================================================================================
field                     meaning
========================  ==============================================================================================
``format``                1
``node_id``               32 random hexadecimal digits, minted with the directory
``name``, ``cluster_name``  as first started; a start with others is refused
``cluster_id``            empty until the node belongs to a cluster
``number``                place in ``--initial``; 0 leads
``boot_number``           raised durably at each start
``stamped``               tablets and metadata that this node wrote in its last life carry at least this boot number
``distrusted``            the directory was found to be a copy or an older state, and is not proved again yet
``inode``, ``birth_ns``   of this very file: written into itself before it gets its name
``check``                 BLAKE2b of the rest
========================  ==============================================================================================

The file is replaced at each start, so its inode and birth time are new each time. One that was copied, restored from a
backup or moved to another disk has others than it says: the node then trusts nothing in the directory until its peers
have proved it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from srengine import errors
from srengine.storage import files
from srengine.sync.slots import FileId

IDENTITY_NAME: Final = "identity.json"
IDENTITY_BYTES_MAX: Final = 64 * 1024
FORMAT: Final = 1

_AT_FDCWD: Final = -100
_STATX_INO: Final = 0x100
_STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """See the module's table."""

    node_id: str
    name: str
    cluster_name: str
    cluster_id: str = ""
    number: int = -1
    boot_number: int = 0
    stamped: int = 0
    distrusted: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a start finds. ``copied``: the file is not the one that was written."""

    identity: Identity
    copied: bool


def new_identity(name: str, cluster_name: str) -> Identity:
    """Return the identity of a new directory."""
    return Identity(secrets.token_hex(16), name, cluster_name)


def load_identity(data: Path, *, insecure: bool = False) -> Loaded | None:
    """Return the identity in the directory, None when there is none yet.

    Raises `CorruptionError` for a file that is not one, `UnsafePermissions`, `UnsupportedFeature` for a later format.
    """
    path = data / IDENTITY_NAME
    with files.Directory(data) as directory:
        if not directory.exists(IDENTITY_NAME):
            return None
        content = directory.read(IDENTITY_NAME, bytes_max=IDENTITY_BYTES_MAX, insecure=insecure)
    found = _decode(content, path)
    actual = file_id(path)
    recorded = FileId(found.pop("inode"), found.pop("birth_ns"))
    return Loaded(Identity(**found), copied=actual != recorded)


def save_identity(data: Path, identity: Identity) -> None:
    """Replace the file durably; it then holds its own inode and birth time. Raises `DiskFull` and the like."""
    temporary = f"{files.TEMPORARY_PREFIX}{IDENTITY_NAME}-{secrets.token_hex(8)}"
    path = data / temporary
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            own = file_id(path)
            assert own is not None, path
            os.write(fd, _encode(identity, own))
            os.fsync(fd)
        finally:
            os.close(fd)
        path.rename(data / IDENTITY_NAME)
        files.sync_directory(data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise files.from_os_error(error, f"cannot write {data / IDENTITY_NAME}") from error


def started(loaded: Loaded) -> Identity:
    """Return the identity of the next run: a higher boot number, and distrust after a copy."""
    before = loaded.identity
    boot_number = before.boot_number + 1
    if loaded.copied:
        return replace(before, boot_number=boot_number, stamped=boot_number, distrusted=True)
    return replace(before, boot_number=boot_number)


def raised(identity: Identity, above: int) -> Identity:
    """Return the identity after peers have seen ``above``: this directory is an older state."""
    boot_number = max(identity.boot_number, above) + 1
    return replace(identity, boot_number=boot_number, stamped=boot_number, distrusted=True)


def _encode(identity: Identity, own: FileId) -> bytes:
    body = {"format": FORMAT, **asdict(identity), "inode": own.inode, "birth_ns": own.birth_ns}
    return json.dumps({**body, "check": _check(body)}, indent=1).encode() + b"\n"


def _decode(content: bytes, path: Path) -> dict[str, Any]:
    def damaged(why: str) -> errors.CorruptionError:
        return errors.CorruptionError(f"{path} is damaged: {why}", path=str(path))

    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged("it is not JSON") from error
    if not isinstance(body, dict):
        raise damaged("it is no object")
    check = body.pop("check", None)
    if check != _check(body):
        raise damaged("its check does not fit")
    form = body.pop("format", None)
    if form != FORMAT:
        raise errors.UnsupportedFeature(f"{path} has format {form}; this version knows {FORMAT}", path=str(path))
    kinds = {
        "node_id": str,
        "name": str,
        "cluster_name": str,
        "cluster_id": str,
        "number": int,
        "boot_number": int,
        "stamped": int,
        "distrusted": bool,
        "inode": int,
        "birth_ns": int,
    }
    if set(body) != set(kinds) or any(type(body[key]) is not kind for key, kind in kinds.items()):
        raise damaged("it has not the fields of an identity")
    return body


def _check(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16, person=b"srengine-ident").hexdigest()


# --- which file a file is --------------------------------------------------------------------------------------------


def file_id(path: Path) -> FileId | None:
    """Return inode and birth time of a file, None when it is not there; birth 0 where the system does not tell.

    Python has no statx before 3.15: the C library's is called, with the plain inode as the fallback.
    """
    try:
        status = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return FileId(status.st_ino, _birth_ns(path))


def _birth_ns(path: Path) -> int:
    statx = getattr(_libc(), "statx", None)
    if statx is None:
        return 0
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(_AT_FDCWD, os.fsencode(path), 0x100, _STATX_INO | _STATX_BTIME, buffer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_BTIME:
        return 0
    # struct statx: stx_btime is the second of four timestamps (16 bytes each: s64 seconds, u32 nanoseconds) from byte
    # 64.
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, 80)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
