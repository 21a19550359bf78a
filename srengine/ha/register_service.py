"""Registers over the wire: what a node answers to whoever wants to write or read one, or to know who leads.

====================  =================  ==============================================================================
message               answer             meaning
====================  =================  ==============================================================================
`PutRegister`         `PutRegisterReply`  write a register through the journal; any node, which forwards
`GetRegister`         `GetRegisterReply`  read one, linearizably; any node
`GetJournal`          `GetJournalReply`   who leads, and how far this node has applied; never waits
====================  =================  ==============================================================================

Refusals are the errors that `HAProtocol` raises.
"""

from __future__ import annotations

import asyncio

import msgspec

from srengine import errors
from srengine.codec import registry
from srengine.ha.journal import REQUEST_BYTES
from srengine.ha.protocol import HAProtocol
from srengine.ha.registers import put_register, read_register
from srengine.ha.tables import Readable


class PutRegister(msgspec.Struct, frozen=True):
    """See `registers.RegisterPut`. ``request``: 16 bytes, the same when it is asked again; none: never asked again."""

    name: str
    value: bytes
    if_version: int | None = None
    request: bytes = b""
    timeout_s: float = 10.0


class PutRegisterReply(msgspec.Struct, frozen=True):
    """``version``: index of the entry."""

    version: int


class GetRegister(msgspec.Struct, frozen=True):
    """Read as of now."""

    name: str
    timeout_s: float = 10.0


class GetRegisterReply(msgspec.Struct, frozen=True):
    """``value`` None and ``version`` 0: there is no such register."""

    value: bytes | None
    version: int


class GetJournal(msgspec.Struct, frozen=True):
    """Ask a node what it knows now."""


class GetJournalReply(msgspec.Struct, frozen=True):
    """``leader``: name, empty while unknown. ``role``: of the node asked; ``epoch``: its own, 0 when it owns none."""

    leader: str
    role: str
    term: int
    epoch: int
    applied_index: int


registry.register("ha.register_put", PutRegister)
registry.register("ha.register_put_reply", PutRegisterReply)
registry.register("ha.register_get", GetRegister)
registry.register("ha.register_get_reply", GetRegisterReply)
registry.register("ha.journal_get", GetJournal)
registry.register("ha.journal_get_reply", GetJournalReply)

TIMEOUT_S_MAX = 60.0


class RegisterService:
    """Answers the messages above from one backend and the agreed state beside it."""

    def __init__(self, ha: HAProtocol, rows: Readable) -> None:
        self._ha = ha
        self._rows = rows

    async def put(self, message: PutRegister) -> PutRegisterReply:
        """Return the version that was written."""
        timeout_s = _checked(message.timeout_s)
        if len(message.request) not in {0, REQUEST_BYTES}:
            raise errors.InvalidValue(f"a request id has {REQUEST_BYTES} bytes, not {len(message.request)}")
        command = put_register(message.name, message.value, if_version=message.if_version)
        command = msgspec.structs.replace(command, request=message.request)
        return PutRegisterReply(await self._ha.propose(command, timeout_s=timeout_s))

    async def get(self, message: GetRegister) -> GetRegisterReply:
        """Return what the register holds, as of a moment after the question."""
        await self._ha.read_barrier(timeout_s=_checked(message.timeout_s))
        found = await asyncio.to_thread(read_register, self._rows, message.name)
        return GetRegisterReply(None, 0) if found is None else GetRegisterReply(found.value, found.version)

    async def journal(self, message: GetJournal) -> GetJournalReply:
        """Return what this node knows without asking anybody."""
        del message
        observed = self._ha.observed
        return GetJournalReply(
            observed.leader or "", observed.role.value, observed.term, self._ha.epoch, self._ha.applied_index
        )


def _checked(timeout_s: float) -> float:
    if not 0 < timeout_s <= TIMEOUT_S_MAX:
        raise errors.InvalidValue(f"a time-out of {timeout_s!r} s; above 0, at most {TIMEOUT_S_MAX:g}")
    return timeout_s
