"""The start-up self-test: strangers stay out.

ZeroMQ's authentication fails open in two ways that look like working set-ups (a domain without a handler, enforcing
without a domain). So a node that serves with keys tries it before it listens, on loopback, with sockets made by the
very function that makes the real ones:

* a stranger's key against a living handler with an empty allow-list: must be refused;
* a stranger's key with no handler at all: must be refused (fail closed);
* an allowed key: must come in, else the two others prove nothing.
"""

from __future__ import annotations

from srengine import errors
from srengine.security.admission import AllowList
from srengine.transport import new_key_pair, probe


async def prove_closed() -> None:
    """Return when the three trials end as they must; raise `NotAuthenticated` otherwise. Takes some milliseconds."""
    guest, stranger = new_key_pair(), new_key_pair()
    allowed = AllowList()
    allowed.allow(guest.public, ["client"])
    trials = (
        ("an allowed key, handler alive", guest, allowed.admit, True),
        ("a stranger's key, handler alive", stranger, _quiet(allowed), False),
        ("a stranger's key, handler dead", stranger, None, False),
    )
    for what, keys, admit, expected in trials:
        came_in = await probe.try_handshake(keys, admit)
        if came_in != expected:
            outcome = "came in" if came_in else "was refused"
            raise errors.NotAuthenticated(
                f"the self-test of authentication failed: {what}: {outcome}; not listening",
                trial=what,
            )


def _quiet(allowed: AllowList) -> probe.Admit:
    # The trial's refusal is no event that somebody should read about.
    def admit(_port: str, _address: str, public_key: bytes | None) -> bool:
        return public_key is not None and public_key in allowed

    return admit
