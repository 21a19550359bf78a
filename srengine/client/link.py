"""The one place of this room that touches sockets and keys: where the channels of a client come from."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from srengine import errors

if TYPE_CHECKING:
    from srengine.client.calls import ChannelSource

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


def open_source(*, key_file: str | None, token: str | None) -> ChannelSource:
    """Return an endpoint of the network that only asks; needs a running loop."""
    raise NotImplementedError
