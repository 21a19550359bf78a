"""Where things are in etcd, and what their values look like. The table in docs/ha-etcd.md is this module in words.

All keys of a cluster begin with ``srengine/<cluster id>/`` and are watched as one range: what a node hears has one
order. Parts of large commands lie under ``srengine-parts/<cluster id>/``, outside of it: a node fetches them when it
applies the command. ``srengine-names/<cluster name>`` says which cluster id a name has.

Numbers in keys and plain values are decimal with 20 digits where order matters, so that ``etcdctl get --prefix`` can be
read by people; other values are JSON with bytes as base64, records of the journal msgpack.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeVar

import msgspec

from srengine import errors
from srengine.ha.backends.etcd_client import prefix_end

FORMAT: Final = 1
"""Of everything below ``srengine/<cluster id>/``; a node refuses another one."""
DIGEST_BYTES: Final = 16

_T = TypeVar("_T")


class ClusterRecord(msgspec.Struct, frozen=True):
    """Value of ``cluster``; written once, with the first entry of the journal."""

    cluster_id: str
    name: str
    format: int = FORMAT


class Candidacy(msgspec.Struct, frozen=True):
    """Value of ``election``: who leads. Bound to that node's lease; the revision of the key is the term."""

    node_id: str
    name: str


class SessionRecord(msgspec.Struct, frozen=True):
    """Value of ``sessions/<node id>``, bound to the node's lease: it is alive. ``applied``: index, of a while ago."""

    node_id: str
    name: str
    applied: int = 0


class CopyRecord(msgspec.Struct, frozen=True):
    """Value of ``state/<node id>``: this node holds the state at ``index`` (or a later one) durably."""

    node_id: str
    name: str
    index: int
    digest: bytes


class FloorRecord(msgspec.Struct, frozen=True):
    """Value of ``floor``: entries up to ``index`` are gone; ``holders`` had a state at least as new.

    ``digest``: of the state at ``digest_index`` (not below ``index``).
    """

    index: int
    digest_index: int
    digest: bytes
    holders: tuple[str, ...]


class JournalRecord(msgspec.Struct, frozen=True, array_like=True):
    """Value of ``journal/<index>``. ``parts``: how many pieces lie under ``srengine-parts``; ``data`` is what follows
    them. ``digest``: BLAKE2b-128 of index, term and the whole command.
    """

    index: int
    term: int
    parts: int
    digest: bytes
    data: bytes


class Keys:
    """The keys of one cluster."""

    def __init__(self, cluster_id: str) -> None:
        self.cluster_id = cluster_id
        base = f"srengine/{cluster_id}/".encode()
        self.base = base
        self.base_end = prefix_end(base)
        self.cluster = base + b"cluster"
        self.election = base + b"election"
        self.head = base + b"head"
        self.floor = base + b"floor"
        self.epochs = base + b"epochs/"
        self.journals = base + b"journal/"
        self.sessions = base + b"sessions/"
        self.states = base + b"state/"
        self._parts = f"srengine-parts/{cluster_id}/".encode()

    @staticmethod
    def name(cluster_name: str) -> bytes:
        """Return the key that says which id a cluster's name has."""
        return f"srengine-names/{cluster_name}".encode()

    def journal(self, index: int) -> bytes:
        """Return the key of an entry."""
        return self.journals + number(index)

    def epoch(self, epoch: int) -> bytes:
        """Return the key that exists once the epoch has an owner."""
        return self.epochs + number(epoch)

    def session(self, node_id: str) -> bytes:
        """Return the key that says that a node is alive."""
        return self.sessions + node_id.encode()

    def state(self, node_id: str) -> bytes:
        """Return the key that says which state a node holds."""
        return self.states + node_id.encode()

    def part(self, index: int, part: int) -> bytes:
        """Return the key of a piece of a large command."""
        return self.parts_of(index) + number(part)

    def parts_of(self, index: int) -> bytes:
        """Return what the keys of the pieces of one command begin with."""
        return self._parts + number(index) + b"/"

    def index_of(self, key: bytes) -> int:
        """Return the index in the key of an entry; `errors.CorruptionError`."""
        digits = key[len(self.journals) :]
        if not key.startswith(self.journals) or len(digits) != 20 or not digits.isdigit():
            raise errors.CorruptionError(f"a key of the journal in etcd is none of ours: {key!r}")
        return int(digits)


def number(value: int) -> bytes:
    """Return a number that sorts as bytes do.

    >>> number(42)
    b'00000000000000000042'
    """
    assert 0 <= value < 10**20, value
    return b"%020d" % value


def read_number(value: bytes) -> int:
    """Return a number from a value; `errors.CorruptionError`."""
    if len(value) > 20 or not value.isdigit():
        raise errors.CorruptionError(f"a value in etcd is no number: {value[:40]!r}")
    return int(value)


def encode(record: msgspec.Struct) -> bytes:
    """Return a value that people can read."""
    return msgspec.json.encode(record)


def decode(value: bytes, kind: type[_T]) -> _T:
    """Return a value that `encode` made; `errors.CorruptionError`."""
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise errors.CorruptionError(f"a value in etcd is no {kind.__name__}: {error}") from error


def entry_digest(index: int, term: int, data: bytes) -> bytes:
    """Return the digest of an entry.

    >>> entry_digest(1, 2, b"x").hex()
    '138329855c0d65ae2f9d27808208f7c4'
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"srengine-etcd")
    state.update(index.to_bytes(8, "little") + term.to_bytes(8, "little"))
    state.update(data)
    return state.digest()


def encode_entry(record: JournalRecord) -> bytes:
    """Return the value of ``journal/<index>``."""
    return msgspec.msgpack.encode(record)


def decode_entry(value: bytes) -> JournalRecord:
    """Return the record in ``journal/<index>``; `errors.CorruptionError`."""
    try:
        return msgspec.msgpack.decode(value, type=JournalRecord)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise errors.CorruptionError(f"an entry in etcd cannot be read: {error}") from error
