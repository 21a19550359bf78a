"""Bytes to values and back: message kinds, frames, envelopes. No input, no output, no clock.

::

    message      a frozen struct of a room, registered under a kind ("sync.pull")           registry.py
    envelope     the routing around it: request id, kind, sizes of attachments              envelopes.py
    frame        several envelopes and their raw bytes, with checksums: one ZeroMQ message  frames.py
    scanner      the bounded look at msgpack before anything is built from it               scanner.py

Whatever arrives, a decoder of this room either returns a value or raises `FrameError` (damaged, hostile or foreign
bytes) or `UnsupportedFeature` (a newer version's bytes). docs/formats-wire.md has the byte tables and test vectors.
"""

from __future__ import annotations

from srengine.codec import envelopes, frames, registry, scanner

__all__ = ["envelopes", "frames", "registry", "scanner"]
