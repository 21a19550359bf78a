"""The replicated state machine on top of a group: registers, behind epochs.

As `ha/` has it: the first command of a leader takes epoch = newest + 1 (*fence*), every other carries the epoch of the
leader that proposed it, and one whose epoch is not the newest changes nothing. A request that comes again is answered
with its first outcome. All of it is decided when an entry is applied, hence the same everywhere.
"""

from __future__ import annotations

import enum

import msgspec
import xxhash

from srengine.consensus.entries import Configuration, Entry, EntryKind


class Verb(enum.IntEnum):
    FENCE = 0
    WRITE = 1
    COMPARE = 2
    MEMBER = 3
    """Nothing but the entry's configuration."""


class Command(msgspec.Struct, frozen=True, array_like=True):
    """The data of an entry. ``register``, ``expected``, ``value``: see `Registers`."""

    verb: Verb
    epoch: int
    proposer: str
    request: bytes
    register: str = ""
    expected: int | None = None
    value: int | None = None
    claim: bytes = b""
    """FENCE: what the state of the claimant asks for it, see `Registers.claim`."""


class Result(enum.Enum):
    DONE = "done"
    """It took effect here, or had before (then ``Outcome.index`` is of that time)."""
    STALE_EPOCH = "stale epoch"
    KEY_EXISTS = "key exists"


class Outcome(msgspec.Struct, frozen=True):
    """``seen``: what a compare-and-set found; it set its value exactly if that is what it expected."""

    result: Result
    index: int
    seen: int | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Command)


def encode(command: Command) -> bytes:
    return _encoder.encode(command)


def decode(data: bytes) -> Command:
    return _decoder.decode(data)


class Registers:
    """The state of one group on one node, durable with each step.

    ``index``, ``term``: of the last applied entry. ``epoch``, ``owner``: the newest. ``outcomes``: of every request.
    ``digest``: of all outcomes and values, chained. ``chain``: of the log up to ``index``, for the checker of logs.
    """

    repeats_requests = False
    reuses_epochs = False
    """Deliberate breakages, see breakages.py."""

    __slots__ = ("chain", "configuration", "digest", "epoch", "index", "outcomes", "owner", "term", "values")

    def __init__(self) -> None:
        self.index = 0
        self.term = 0
        self.chain = 0
        self.configuration = Configuration()
        self.epoch = 0
        self.owner = ""
        self.values: dict[str, int | None] = {}
        self.outcomes: dict[bytes, Outcome] = {}
        self.digest = 0

    def apply(self, entry: Entry) -> tuple[Command, Outcome] | None:
        """Apply the next entry; None when it holds no command."""
        self.index, self.term = entry.index, entry.term
        if entry.kind is EntryKind.CONFIGURATION:
            assert entry.configuration is not None, entry
            self.configuration = entry.configuration
        if not entry.data:
            return None
        command = decode(entry.data)
        outcome = self._decide(command)
        self.digest = xxhash.xxh3_64_intdigest(
            b"%d %d %s" % (self.digest, entry.index, repr((outcome, self.epoch, command.value)).encode())
        )
        return command, outcome

    def _decide(self, command: Command) -> Outcome:
        if command.verb is Verb.FENCE:
            if command.epoch != self.epoch + 1 and not self.reuses_epochs:
                return Outcome(Result.KEY_EXISTS, self.index)
            self.epoch, self.owner = command.epoch, command.proposer
            return Outcome(Result.DONE, self.index)
        if command.request in self.outcomes and not self.repeats_requests:
            return self.outcomes[command.request]
        if command.epoch != self.epoch:
            return Outcome(Result.STALE_EPOCH, self.index)
        seen = self.values.get(command.register)
        if command.verb is Verb.WRITE or (command.verb is Verb.COMPARE and seen == command.expected):
            self.values[command.register] = command.value
        outcome = Outcome(Result.DONE, self.index, seen if command.verb is Verb.COMPARE else None)
        self.outcomes[command.request] = outcome
        return outcome

    def claim(self, node: str, term: int) -> bytes:
        """Return what a claim of the next epoch carries besides its number."""
        del node, term
        return b""

    def value(self, register: str) -> int | None:
        """Return what a register holds."""
        return self.values.get(register)

    def copy(self) -> Registers:
        """Return a state of its own that is equal."""
        other = type(self)()
        self._copy_to(other)
        return other

    def _copy_to(self, other: Registers) -> None:
        for name in Registers.__slots__:
            setattr(other, name, getattr(self, name))
        other.values, other.outcomes = dict(self.values), dict(self.outcomes)
