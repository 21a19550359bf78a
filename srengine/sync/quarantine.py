"""Peers whose proofs fail: left alone for a while.

An exchange ends by a transaction that must reach the root that the peer showed. When it does not although the own copy
was proved whole, the peer sent what does not belong together: damaged, broken, or lying. Nothing was changed by it, but
it cost work; after `limits.EXCHANGE_UNPROVEN_MAX` of them in a row the peer is quarantined for `limits.QUARANTINE_S`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from srengine import errors, limits


@dataclass(slots=True)
class _Record:
    """``failures`` in a row; ``until`` when it is let in again (0: it is not out)."""

    failures: int = 0
    until: float = 0.0
    why: str = ""


class Quarantine:
    """What a node remembers of its peers' proofs. ``now()``: seconds on a clock that never goes back."""

    def __init__(self, now: Callable[[], float], alarm: Callable[[str, str], None]) -> None:
        self._now = now
        self._alarm = alarm
        self._peers: dict[str, _Record] = {}
        self.total = 0
        """How often a peer was put out."""

    def failed(self, peer: str, why: str) -> bool:
        """Count a failed proof; return whether the peer is out now."""
        record = self._peers.setdefault(peer, _Record())
        record.failures += 1
        record.why = why
        if record.failures < limits.EXCHANGE_UNPROVEN_MAX:
            return False
        # One more failure after it was let in again is enough.
        record.failures = limits.EXCHANGE_UNPROVEN_MAX - 1
        record.until = self._now() + limits.QUARANTINE_S
        self.total += 1
        self._alarm(
            "peer_quarantined",
            f"{limits.EXCHANGE_UNPROVEN_MAX} proofs of {peer} failed, the last: {why}; "
            f"no exchange with it for {limits.QUARANTINE_S:g} s",
        )
        return True

    def proved(self, peer: str) -> None:
        """Forget the failures of a peer: its last exchange was proved."""
        self._peers.pop(peer, None)

    def check(self, peer: str) -> None:
        """Raise `NotReady` when the peer is out."""
        record = self._peers.get(peer)
        if record is not None and record.until > self._now():
            left = record.until - self._now()
            raise errors.NotReady(f"{peer} is quarantined for another {left:.0f} s: {record.why}", peer=peer)

    @property
    def out(self) -> tuple[str, ...]:
        """The peers that are out now, sorted."""
        now = self._now()
        return tuple(sorted(peer for peer, record in self._peers.items() if record.until > now))
