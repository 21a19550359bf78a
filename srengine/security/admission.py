"""The allow-list: which public keys may connect to which port.

A key that is not on it does not come in; the list starts empty. A node's own peers are put on it from ``--initial`` and
the members of the cluster, clients from the file ``keys/allowed``, one key a line::

    # key (64 hexadecimal digits)   ports                    name
    9d61…                           client                   reporting
    4ccd…                           client,peer,bulk         node-2

Rotation: allow the new key, change the owner's file, revoke the old key. Refusals are logged, at most a few lines a
minute, so that a port scan fills no disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from srengine import errors
from srengine.security.keys import parse_public_key
from srengine.storage import files

_logger = logging.getLogger(__name__)
ALLOWED_FILE: Final = "allowed"
PORTS: Final = frozenset({"client", "peer", "bulk"})
_FILE_BYTES_MAX: Final = 1024 * 1024
_LINES_PER_PERIOD: Final = 5
_PERIOD_S: Final = 60.0


class AllowList:
    """Public keys and the ports that each may use. An `Authenticator` of the transport."""

    def __init__(self) -> None:
        self._ports: dict[bytes, frozenset[str]] = {}
        self._names: dict[bytes, str] = {}
        self.refused = 0
        """Handshakes refused so far."""
        self._period_began = 0.0
        self._period_lines = 0
        self._suppressed = 0

    def allow(self, public_key: bytes, ports: Collection[str], name: str = "") -> None:
        """Let the owner of ``public_key`` use these ports, in addition to what it may already use."""
        if len(public_key) != 32 or not PORTS.issuperset(ports):
            raise errors.InvalidValue(f"cannot allow {len(public_key)} bytes of key at {sorted(ports)}")
        self._ports[public_key] = self._ports.get(public_key, frozenset()) | frozenset(ports)
        if name:
            self._names[public_key] = name

    def revoke(self, public_key: bytes) -> bool:
        """Let nobody in with this key any more; return whether it was on the list.

        NB: connections that stand are ended by ``Endpoint.drop(public_key)``.
        """
        self._names.pop(public_key, None)
        return self._ports.pop(public_key, None) is not None

    def name_of(self, public_key: bytes) -> str | None:
        """Return the name under which a key was allowed."""
        return self._names.get(public_key)

    def __contains__(self, public_key: object) -> bool:
        return public_key in self._ports

    def __len__(self) -> int:
        return len(self._ports)

    def admit(self, port: str, address: str, public_key: bytes | None) -> bool:
        """Return whether this key may connect to ``port``; never without a key."""
        if public_key is not None and port in self._ports.get(public_key, ()):
            return True
        self.refused += 1
        self._log(port, address, public_key)
        return False

    def _log(self, port: str, address: str, public_key: bytes | None) -> None:
        now = time.monotonic()
        if now - self._period_began >= _PERIOD_S:
            self._period_began = now
            self._period_lines = 0
        if self._period_lines >= _LINES_PER_PERIOD:
            self._suppressed += 1
            return
        self._period_lines += 1
        _logger.warning(
            "refused a connection to the %s port from %s with key %s (%d refusals not shown)",
            port,
            address or "this machine",
            public_key.hex() if public_key is not None else "none",
            self._suppressed,
        )
        self._suppressed = 0


def load_allow_list(path: Path, *, insecure: bool = False) -> AllowList:
    """Return the allow-list in the text file ``path``; `InvalidValue` names the first line that is wrong."""
    files.check_private(path, directory=False, insecure=insecure)
    with files.Directory(path.parent) as directory:
        content = directory.read(path.name, bytes_max=_FILE_BYTES_MAX, insecure=insecure)
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise errors.InvalidValue(f"{path} is no text", path=str(path)) from error
    return _parse(lines, path)


def _parse(lines: Iterable[str], path: Path) -> AllowList:
    found = AllowList()
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in {2, 3}:
            raise errors.InvalidValue(
                f"{path}, line {number}: a key, its ports, and perhaps a name", path=str(path), line=number
            )
        try:
            found.allow(parse_public_key(words[0]), words[1].split(","), words[2] if len(words) == 3 else "")
        except errors.InvalidValue as error:
            raise errors.InvalidValue(f"{path}, line {number}: {error}", path=str(path), line=number) from error
    return found
