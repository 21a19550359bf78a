"""A metadata machine on a disk, and the commands of this room, for the tests of the agreed state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from srengine import errors
from srengine.ha import members as m
from srengine.ha.epochs import EpochsApplier, claim
from srengine.ha.journal import Command
from srengine.ha.members import MembersApplier
from srengine.ha.metadata import MetadataMachine, Tables
from srengine.ha.outcomes import Outcome
from srengine.storage import MetadataStore

CLUSTER = "c" * 32


class Setting:
    """An applier of the test's own: remembers bodies by index; refuses some kinds."""

    kinds: Sequence[str] = ("test.set", "test.refuse")
    tables: Sequence[str] = ("test",)

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        self.seen.append((index, kind))
        tables.put("test", index.to_bytes(8, "big"), body)
        if kind == "test.refuse":
            raise errors.Conflict(f"refused at {index}", current_version=index)


def node_id(number: int) -> str:
    return f"{number:032x}"


def address(number: int) -> str:
    return f"tcp://127.0.0.1:{7000 + number}"


def bootstrap(count: int = 3) -> Command:
    """The first entry of a cluster of followers n0, n1, ... with the ids 1, 2, ..."""
    members = tuple(
        m.Member(f"n{number}", address(number), number, node_id=node_id(number + 1)) for number in range(count)
    )
    return Command(m.BOOTSTRAP, msgspec.msgpack.encode(m.Bootstrap(m.Cluster(CLUSTER, "prod"), members)))


def command(kind: str, body: msgspec.Struct) -> Command:
    return Command(kind, msgspec.msgpack.encode(body))


def add(name: str, number: int, *, at: int | None = None, **more) -> Command:
    """Admit id ``number`` under ``name``, at the address of that number unless ``at`` says another."""
    place = address(number if at is None else at)
    return command(m.ADD, m.AddMember(name, node_id(number), place, **more))


class Agreed:
    """One node's agreed state; `put` applies the next entry."""

    def __init__(self, store: MetadataStore) -> None:
        self.store = store
        self.setting = Setting()
        self.machine = MetadataMachine(store, [MembersApplier(), EpochsApplier(), self.setting])

    def put(self, command: Command | None, *, term: int = 1, epoch: int | None = None) -> Outcome:
        """Apply a command under the newest epoch, or the one that is given."""
        from srengine.ha.epochs import newest_epoch

        if command is not None:
            stamp = newest_epoch(self.store)[0] if epoch is None else epoch
            command = msgspec.structs.replace(command, epoch=stamp)
        return self.machine.apply(self.machine.applied_index + 1, term, command)

    def must(self, command: Command, **more) -> int:
        outcome = self.put(command, **more)
        assert outcome.refusal is None, outcome
        return outcome.index

    def fence(self, number: int = 1, *, term: int = 1) -> Outcome:
        return self.put(claim(self.store, node_id=node_id(number), name=f"n{number}", term=term), term=term)

    def refused(self, command: Command, kind: type[errors.Error], **more) -> errors.Error:
        refusal = self.put(command, **more).refusal
        assert type(refusal) is kind, refusal
        return refusal

    def names(self) -> list[str]:
        return [member.name for member in m.read_members(self.store)]


@contextmanager
def agreed(path: Path) -> Iterator[Agreed]:
    """A fresh node's state in ``path``."""
    path.mkdir(mode=0o700, exist_ok=True)
    with MetadataStore(path / "meta") as store:
        yield Agreed(store)
