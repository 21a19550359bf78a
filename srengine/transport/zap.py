"""The door: every handshake at a bound socket is decided here, and refused while nobody decides.

ZeroMQ asks over an in-process socket (ZAP, RFC 27). The domain names the port. A peer with CURVE has proved that it
owns its key; who may come in is the `Authenticator`'s decision. Without CURVE a peer has no name and comes in only
where the socket itself was made without keys, which `sockets.bind` allows on loopback, ipc, or by explicit choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from srengine.metrics import Metrics
from srengine.transport import sockets
from srengine.transport.peers import Authenticator

_logger = logging.getLogger(__name__)
_VERSION: Final = b"1.0"


class ZapHandler:
    """Answers ZeroMQ's questions about handshakes on one context."""

    def __init__(
        self,
        context: sockets.Context,
        authenticator: Callable[[], Authenticator | None],
        keys: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        """``keys`` says whether this endpoint has keys: then a peer without CURVE is refused."""
        self._authenticator = authenticator
        self._has_keys = keys
        self._metrics = metrics
        self._pump = sockets.Pump(sockets.bind(context, "zap", sockets.ZAP_ADDRESS, keys=None), self._asked)

    def close(self) -> None:
        """Stop answering: from now on every handshake fails."""
        self._pump.close(0)

    def _asked(self, frames: list[sockets.Frame]) -> None:
        parts = [frame.bytes for frame in frames]
        request_id = parts[1] if len(parts) > 1 else b""
        user = self._decide(parts)
        if user is None:
            self._metrics.add("srengine_transport_handshakes_refused_total")
            answer = [_VERSION, request_id, b"400", b"refused", b"", b""]
        else:
            answer = [_VERSION, request_id, b"200", b"", user.encode(), b""]
        self._pump.send(answer)

    def _decide(self, parts: Sequence[bytes]) -> str | None:
        """Return the user id (the public key in hexadecimal, "-" without one), or None to refuse."""
        if len(parts) < 6 or parts[0] != _VERSION:
            return None
        domain, address, mechanism = parts[2], parts[3], parts[5]
        port = domain.decode("ascii", "replace").removeprefix(sockets.DOMAIN_PREFIX)
        public_key: bytes | None = None
        if mechanism == b"CURVE" and len(parts) == 7 and len(parts[6]) == 32:
            public_key = parts[6]
        elif mechanism != b"NULL" or self._has_keys():
            return None
        authenticator = self._authenticator()
        source = address.decode("ascii", "replace")
        if authenticator is None:
            # Nobody was named to decide: keys let nobody in, a socket without keys is loopback's or was chosen so.
            admitted = public_key is None
        else:
            admitted = authenticator.admit(port, source, public_key)
        if not admitted:
            return None
        return public_key.hex() if public_key is not None else "-"
