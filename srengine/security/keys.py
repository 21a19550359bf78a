"""CURVE key pairs in private files.

A key file is text, mode 0600, in a directory that only its owner can enter::

    srengine-key 1
    public 9d61…   (64 hexadecimal digits)
    secret 4ccd…

The node's is ``keys/node.key`` in its data directory. The public half is computed from the secret one when it is read:
a file whose halves do not belong together is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from srengine import errors
from srengine.storage import files
from srengine.transport import KeyPair, new_key_pair, public_key_of

KEYS_DIRECTORY: Final = "keys"
NODE_KEY_FILE: Final = "node.key"
_FILE_BYTES_MAX: Final = 4096
_TEXT: Final = re.compile(rb"srengine-key 1\npublic ([0-9a-f]{64})\nsecret ([0-9a-f]{64})\n", re.ASCII)
_PUBLIC: Final = re.compile(r"[0-9A-Fa-f]{64}", re.ASCII)


def parse_public_key(text: str) -> bytes:
    """Return the 32 bytes of a public key written as 64 hexadecimal digits; `InvalidValue` for anything else."""
    if not isinstance(text, str) or _PUBLIC.fullmatch(text.strip()) is None:
        raise errors.InvalidValue("a public key is written as 64 hexadecimal digits")
    return bytes.fromhex(text.strip())


def format_public_key(public_key: bytes) -> str:
    """Return a public key as text."""
    return public_key.hex()


def create_key_file(path: Path) -> KeyPair:
    """Write a fresh key pair to ``path``, which must not exist, durably; return the pair.

    Raises `Conflict` when the file is there, `NotFound` without its directory, `UnsafePermissions` when others can
    enter the directory.
    """
    files.check_private(path.parent, directory=True)
    with files.Directory(path.parent) as directory:
        if directory.exists(path.name):
            raise errors.Conflict(f"{path} is already there; keys are never overwritten", path=str(path))
        keys = new_key_pair()
        text = f"srengine-key 1\npublic {keys.public.hex()}\nsecret {keys.secret.hex()}\n"
        directory.write_durably(path.name, text.encode())
    return keys


def load_key_file(path: Path, *, insecure: bool = False) -> KeyPair:
    """Return the key pair in ``path``.

    Raises `NotFound`, `UnsafePermissions` when the file or its directory can be reached by others (unless
    ``insecure``), `InvalidValue` when it is no key file or its halves do not belong together. No message ever holds a
    part of the file.
    """
    files.check_private(path, directory=False, insecure=insecure)
    with files.Directory(path.parent) as directory:
        found = _TEXT.fullmatch(directory.read(path.name, bytes_max=_FILE_BYTES_MAX, insecure=insecure))
    if found is None:
        raise errors.InvalidValue(f"{path} is no key file of srengine", path=str(path))
    public, secret = bytes.fromhex(found[1].decode()), bytes.fromhex(found[2].decode())
    if public_key_of(secret) != public:
        raise errors.InvalidValue(f"the two keys in {path} do not belong together", path=str(path))
    return KeyPair(public, secret)


def load_node_keys(data_directory: Path, *, insecure: bool = False) -> KeyPair:
    """Return the node's key pair; see `load_key_file`. The directory ``keys`` must be private as well."""
    directory = data_directory / KEYS_DIRECTORY
    files.check_private(directory, directory=True, insecure=insecure)
    return load_key_file(directory / NODE_KEY_FILE, insecure=insecure)


def ensure_node_keys(data_directory: Path, *, insecure: bool = False) -> KeyPair:
    """Return the node's key pair, made (directory 0700, file 0600, durable) when it is not there yet."""
    directory = data_directory / KEYS_DIRECTORY
    files.make_private_directory(directory, insecure=insecure)
    if not (directory / NODE_KEY_FILE).exists():
        return create_key_file(directory / NODE_KEY_FILE)
    return load_node_keys(data_directory, insecure=insecure)
