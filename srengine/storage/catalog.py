"""The names of an embedded store's tablets: ``store.json``, small, checksummed, replaced as a whole.

A name stands for a tablet id, and an id for a directory that a crash may have left half made or half removed. So each
entry has a state, and every change is two durable steps that may be repeated::

    (none) -- create --> creating -- directory there --> ready -- drop --> dropping -- directory gone --> (none)

An entry that is ``ready`` and has no directory is damage (`NotFound` at use), never an invitation to make a new one.

The tablets of a node are named by the cluster's catalog instead; a node's directory has no ``store.json``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import xxhash

from srengine import errors, types

if TYPE_CHECKING:
    from srengine.storage.files import Directory

CATALOG_NAME: Final = "store.json"
CATALOG_BYTES_MAX: Final = 16 * 1024 * 1024
FORMAT: Final = 1

State = Literal["creating", "ready", "dropping"]
_STATES: Final = frozenset({"creating", "ready", "dropping"})
_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


def is_tablet_id(text: str) -> bool:
    """Return whether ``text`` is 32 lower-case hexadecimal digits."""
    return _ID.fullmatch(text) is not None


def check_tablet_id(text: str) -> str:
    """Return ``text`` if it is a tablet id; raises `InvalidValue`."""
    if not isinstance(text, str) or not is_tablet_id(text):
        shown = repr(text)[:80]
        raise errors.InvalidValue(f"{shown} is not a tablet id (32 hexadecimal digits)", what="tablet id")
    return text


class Entry(NamedTuple):
    """What a name stands for."""

    tablet_id: str
    state: State


def read_catalog(directory: Directory, *, insecure: bool = False) -> dict[str, Entry]:
    """Return the entries by name; none when there is no file yet.

    Raises `CorruptionError` for anything that is not exactly what `write_catalog` wrote, `UnsupportedFeature` for a
    newer format.
    """
    try:
        content = directory.read(CATALOG_NAME, bytes_max=CATALOG_BYTES_MAX, insecure=insecure)
    except errors.NotFound:
        return {}
    return decode_catalog(content, str(directory.path / CATALOG_NAME))


def write_catalog(directory: Directory, entries: dict[str, Entry]) -> None:
    """Replace the catalog durably. Raises `DiskFull`; the old one then stands."""
    content = encode_catalog(entries)
    if len(content) > CATALOG_BYTES_MAX:
        raise errors.QuotaExceeded(f"a store holds names of at most {CATALOG_BYTES_MAX} bytes together")
    directory.write_durably(CATALOG_NAME, content)


def encode_catalog(entries: dict[str, Entry]) -> bytes:
    """Return the file's bytes: one JSON object with the check last."""
    tablets = {name: {"id": entry.tablet_id, "state": entry.state} for name, entry in sorted(entries.items())}
    body = {"format": FORMAT, "tablets": tablets}
    return json.dumps({**body, "check": _check(body)}, indent=1).encode() + b"\n"


def _check(body: dict[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def decode_catalog(content: bytes, where: str) -> dict[str, Entry]:
    """Return the entries of a catalog's bytes; raises as `read_catalog`. ``where`` is the file for messages."""
    try:
        found = json.loads(content)
        body = {name: value for name, value in found.items() if name != "check"} if isinstance(found, dict) else {}
        check = _check(body)
    except (ValueError, RecursionError) as error:
        raise errors.CorruptionError(f"{where} is no JSON", file=where) from error
    if not isinstance(found, dict) or "check" not in found:
        raise errors.CorruptionError(f"{where} is no catalog of a store", file=where)
    if found["check"] != check:
        raise errors.CorruptionError(f"{where} does not match its checksum", file=where)
    if body.get("format") != FORMAT:
        raise errors.UnsupportedFeature(
            f"{where} has format {body.get('format')!r}; this version reads {FORMAT}", file=where
        )
    tablets = body.get("tablets")
    if not isinstance(tablets, dict):
        raise errors.CorruptionError(f"{where} lists no tablets", file=where)
    return {name: _entry(name, value, where) for name, value in tablets.items()}


def _entry(name: str, value: object, where: str) -> Entry:
    # The checksum says that we wrote it; these say that we meant it.
    try:
        types.check_name(name, "tablet")
    except errors.InvalidValue as error:
        raise errors.CorruptionError(f"{where} has an impossible name", file=where) from error
    if isinstance(value, dict):
        tablet_id, state = value.get("id"), value.get("state")
        if isinstance(tablet_id, str) and is_tablet_id(tablet_id) and state in _STATES:
            return Entry(tablet_id, state)
    raise errors.CorruptionError(f"{where} has a damaged entry for {name}", file=where)
