"""Messages between processes: the only user of ZeroMQ.

::

    Endpoint   one a process: identity, services, ports that listen            base.py, endpoint.py
    Channel    a way to one address; connects on demand, again with back-off   base.py
    Caller     asks over one connection        caller.py
    Callee     answers over one connection     callee.py       both are Connections (connection.py) over a Wire
    memory     the same without a network, with faults on demand, for tests    memory.py

A connection begins with hello in both directions (messages.py): protocol versions, cluster, node, features. Requests
have one answer or one typed error; posts have none and may be lost. Attachments are raw bytes beside a message; large
ones and streams move under credit (transfers.py), so that memory is bounded at both ends and small messages pass
between. Frames carry checksums; a frame that cannot be trusted ends its connection and has no other effect.
docs/formats-wire.md has every byte.
"""

from __future__ import annotations

from srengine.transport.base import Channel
from srengine.transport.endpoint import Endpoint
from srengine.transport.peers import (
    Authenticator,
    Handler,
    Identity,
    KeyPair,
    Peer,
    Port,
    PostHandler,
    Reply,
    StreamHandler,
)
from srengine.transport.sockets import new_key_pair, public_key_of

__all__ = [
    "Authenticator",
    "Channel",
    "Endpoint",
    "Handler",
    "Identity",
    "KeyPair",
    "Peer",
    "Port",
    "PostHandler",
    "Reply",
    "StreamHandler",
    "new_key_pair",
    "public_key_of",
]
