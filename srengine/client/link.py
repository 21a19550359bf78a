"""The one place of this room that touches sockets and keys: where the channels of a client come from."""

from __future__ import annotations

import stat
from pathlib import Path

import srengine
from srengine import errors
from srengine.transport import Endpoint, Identity, KeyPair, public_key_of

KEY_BYTES = 32


def parse_key(text: str) -> bytes:
    """Return the CURVE key written as 64 hexadecimal digits; `InvalidValue` for anything else."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise errors.InvalidValue("a CURVE key is written as 64 hexadecimal digits")
    return key


def read_key_file(path: str) -> KeyPair:
    """Return the client's key pair from its file: the secret key, 64 hexadecimal digits, on the first line.

    `NotFound` without the file, `UnsafePermissions` when others can read it, `InvalidValue` for other content.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="ascii").partition("\n")[0]
    except FileNotFoundError as error:
        raise errors.NotFound(f"there is no key file {path}", path=path) from error
    except UnicodeDecodeError as error:
        raise errors.InvalidValue(f"{path} holds no CURVE key", path=path) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise errors.UnsafePermissions(f"{path} can be read by others: chmod 600 it", path=path)
    secret = parse_key(text)
    return KeyPair(public_key_of(secret), secret)


def open_source(*, keys: KeyPair | None) -> Endpoint:
    """Return an endpoint of the network that only asks; needs a running loop."""
    return Endpoint(Identity(keys=keys, version=srengine.__version__))
