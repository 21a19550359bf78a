"""The one place of this room that touches sockets and keys: where the channels of a client come from."""

from __future__ import annotations

from pathlib import Path

import srengine
from srengine.security import load_key_file
from srengine.transport import Endpoint, Identity, KeyPair


def read_key_file(path: str) -> KeyPair:
    """Return the client's key pair; `NotFound`, `UnsafePermissions` or `InvalidValue` as `security.load_key_file`."""
    return load_key_file(Path(path).absolute())


def open_source(*, keys: KeyPair | None) -> Endpoint:
    """Return an endpoint of the network that only asks; needs a running loop."""
    return Endpoint(Identity(keys=keys, version=srengine.__version__))
