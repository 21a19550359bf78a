"""Hello: the first words on every connection, in both directions, before anything else is read."""

from __future__ import annotations

import msgspec

from srengine.codec import frames, registry


class Hello(msgspec.Struct, frozen=True):
    """Who is speaking. The caller sends it as its first request; the callee answers with its own.

    ``protocol`` and ``protocol_min``: newest and oldest protocol version that the sender speaks. ``boot_nonce``: random
    at each start of the process, so that two lives of one node can be told apart. ``required``: features without which
    the sender cannot talk; the receiver refuses when it lacks one.
    """

    protocol: int = frames.PROTOCOL_VERSION
    protocol_min: int = frames.PROTOCOL_VERSION_MIN
    version: str = ""
    cluster_id: str | None = None
    node_id: str | None = None
    name: str | None = None
    boot_nonce: bytes = b""
    features: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


registry.register("transport.hello", Hello)
