"""Named registers of the journal: small values that all nodes agree on; an applier.

What a program keeps here is as safe and as slow as membership: each change is an entry that a majority holds. It is for
a few small things (who runs the nightly job, the address of a thing of which there is one), not for data.

=================  ===========  =====================================================================
table              key          value
=================  ===========  =====================================================================
``registers``      name         `Register`, msgpack
``register_state`` ``count``    number of registers, 4 bytes, little endian
=================  ===========  =====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from srengine import errors, limits
from srengine.ha.journal import Command
from srengine.ha.tables import Readable, Tables
from srengine.types import check_name

REGISTER_TABLE: Final = "registers"
REGISTER_STATE_TABLE: Final = "register_state"
REGISTER_PUT: Final = "ha.register.put"
VALUE_BYTES_MAX: Final = 64 * limits.KIB
REGISTERS_MAX: Final = 4096
_COUNT: Final = b"count"


class Register(msgspec.Struct, frozen=True):
    """``version``: index of the entry that wrote it."""

    value: bytes
    version: int


class RegisterPut(msgspec.Struct, frozen=True):
    """Write a register. ``if_version``: only if it has that version now (0: only if there is none); None: whatever it
    has. `Conflict` with ``current_version`` otherwise.
    """

    name: str
    value: bytes
    if_version: int | None = None


class RegistersApplier:
    """Applies `RegisterPut`."""

    kinds: Sequence[str] = (REGISTER_PUT,)
    tables: Sequence[str] = (REGISTER_TABLE, REGISTER_STATE_TABLE)

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        """See `tables.Applier`."""
        del kind
        command = msgspec.msgpack.decode(body, type=RegisterPut)
        check_put(command)
        key = command.name.encode()
        before = _register_in(tables.get(REGISTER_TABLE, key))
        version = 0 if before is None else before.version
        if command.if_version is not None and command.if_version != version:
            raise errors.Conflict(
                f"register {command.name} has version {version}, not {command.if_version}", current_version=version
            )
        if before is None:
            count = register_count(tables)
            if count >= REGISTERS_MAX:
                raise errors.QuotaExceeded(f"there are {count} registers; more are not possible", count=count)
            tables.put(REGISTER_STATE_TABLE, _COUNT, (count + 1).to_bytes(4, "little"))
        tables.put(REGISTER_TABLE, key, msgspec.msgpack.encode(Register(command.value, index)))


def check_put(command: RegisterPut) -> None:
    """Raise `InvalidValue` for what no node would accept."""
    check_name(command.name, "register")
    if len(command.value) > VALUE_BYTES_MAX:
        raise errors.InvalidValue(
            f"a register holds {VALUE_BYTES_MAX} bytes at most, not {len(command.value)}", bytes=len(command.value)
        )


def put_register(name: str, value: bytes, *, if_version: int | None = None) -> Command:
    """Return the command that writes a register; `InvalidValue`."""
    command = RegisterPut(name, value, if_version)
    check_put(command)
    return Command(REGISTER_PUT, msgspec.msgpack.encode(command))


def read_register(rows: Readable, name: str) -> Register | None:
    """Return a register, None when there is none."""
    return _register_in(rows.get(REGISTER_TABLE, check_name(name, "register").encode()))


def _register_in(stored: bytes | None) -> Register | None:
    return None if stored is None else msgspec.msgpack.decode(stored, type=Register)


def register_count(rows: Readable) -> int:
    """Return how many registers there are."""
    stored = rows.get(REGISTER_STATE_TABLE, _COUNT)
    return 0 if stored is None else int.from_bytes(stored, "little")
