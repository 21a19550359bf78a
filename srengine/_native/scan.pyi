"""The quick look at msgpack, before the close one of srengine/codec/scanner.py."""

from typing_extensions import Buffer

def is_plain(data: Buffer, depth_max: int) -> bool:
    """Return True if ``data`` is certainly one msgpack value within the bounds, nested at most ``depth_max`` deep, and
    False if it must be looked at closely.
    """
