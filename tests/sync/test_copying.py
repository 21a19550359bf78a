"""Deltas and copies between two real tablets, without a network between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import msgspec
import pytest

from srengine import errors, limits
from srengine.ha import follower_machine as fm
from srengine.ha.messages import Fetch, ProcessId, PullReply
from srengine.storage import Batch, Store, encode_puts
from srengine.sync import copying
from srengine.sync.messages import Copy
from srengine.sync.slots import Slot
from srengine.types import Position
from tests.sync.copies import TABLET, Side

PROCESS = ProcessId("id", 1, "nonce")


class Wire:
    """The way to a side: answers fetches, streams copies; may cut a stream after some items."""

    def __init__(self, source: Side, *, cut_after: int | None = None) -> None:
        self.source = source
        self.cut_after = cut_after
        self.requests: list[Copy] = []

    async def request(self, message: Fetch, attachments: tuple[bytes, ...] = (), *, timeout_s: float) -> copying.Rows:
        if message.filling:
            return copying.Rows(PullReply("copy", self.source.slot.position, PROCESS))
        return copying.rows_after(self.source.tablet, message.position, PROCESS)

    async def stream(
        self, message: Copy, *, timeout_s: float, proved: bool = False
    ) -> AsyncGenerator[memoryview, None]:
        self.requests.append(message)
        sent = 0
        async for item in copying.stream_copy(self.source.tablet, message):
            if self.cut_after is not None and sent >= self.cut_after:
                raise errors.Unreachable("cut")
            sent += 1
            yield memoryview(item)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    source, target = Side(tmp_path / "source"), Side(tmp_path / "target")
    yield source, target
    source.close()
    target.close()


def fill(side: Side, first: int, last: int, size: int = 100) -> None:
    side.tablet.put_many([(b"%08d" % number, b"%d" % number * size) for number in range(first, last)])


def bring(target: Side, wire: Wire, to: Position) -> Position:
    async def reach(name: str) -> Wire:
        assert name == "source"
        return wire

    return asyncio.run(copying.bring_up_to(target.slot, to, "source", "target", reach))


def ask(source: Side, position: Position) -> copying.Rows:
    return copying.rows_after(source.tablet, position, PROCESS)


def test_a_delta_brings_exactly_what_changed(sides: tuple[Side, Side]) -> None:
    """K23: after the first delta the second holds only the rows written since, and both stand at one position."""
    source, target = sides
    fill(source, 0, 1000)
    assert bring(target, Wire(source), source.slot.position) == source.slot.position
    fill(source, 500, 510)
    rows = ask(source, target.slot.position)
    assert rows.reply.state == "delta"
    assert sum(map(len, rows.attachments)) < 10 * 400 + 1000
    assert target.tablet.apply_delta(copying.delta_of(rows.reply, rows.attachments)) == source.slot.position
    assert target.tablet.diff(source.tablet) == []


def test_request_rows_do_not_outweigh_small_records(sides: tuple[Side, Side]) -> None:
    """K05: 1 000 single writes with request ids ship as at most 1.1 x (changed bytes + 24 B each)."""
    source, target = sides
    session = b"s" * 16
    source.tablet.open_session(session)
    bring(target, Wire(source), source.slot.position)
    pairs = [(b"%024d" % number, b"v" * 128) for number in range(1000)]
    source.tablet.apply([Batch(encode_puts([pair]), session, number) for number, pair in enumerate(pairs, 1)])
    rows = ask(source, target.slot.position)
    changed = sum(len(key) + len(value) + 24 for key, value in pairs)
    assert sum(map(len, rows.attachments)) <= 1.1 * changed
    assert target.tablet.apply_delta(copying.delta_of(rows.reply, rows.attachments)) == source.slot.position
    for raw_bytes in (rows.reply.meta_raw_bytes - 1, rows.reply.meta_raw_bytes + 1, 1 << 40, -1):
        forged = msgspec.structs.replace(rows.reply, meta_raw_bytes=raw_bytes)
        with pytest.raises((errors.FrameError, errors.SnapshotDamaged)):
            copying.delta_of(forged, rows.attachments)


class Clock:
    """Stands for the module `time` where waits are measured: each one has this length."""

    def __init__(self, wait_s: float) -> None:
        self.perf_counter = itertools.count(0.0, wait_s).__next__


def test_a_copy_is_compressed_for_a_taker_that_is_waited_for(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T10: a link that is slower than the source gets small chunks; one that keeps up soon gets them as they are."""
    source, _ = sides
    fill(source, 0, 20_000, size=200)

    async def copied_bytes() -> int:
        copy = Copy(TABLET, "target")
        return sum([len(item) async for item in copying.stream_copy(source.tablet, copy)])

    sizes = {}
    for wait_s in (0.0, 1000.0):
        monkeypatch.setattr("srengine.snapshot.source.time", Clock(wait_s))
        sizes[wait_s] = asyncio.run(copied_bytes())
    assert sizes[1000.0] + 4 * limits.MIB < sizes[0.0]


def test_what_a_source_answers(sides: tuple[Side, Side]) -> None:
    """Nothing, a delta, too much, ahead, another root, another lineage: each has its answer."""
    source, _ = sides
    empty = source.slot.position
    assert ask(source, empty).reply.state == "nothing"
    fill(source, 0, 100)
    own = source.slot.position
    assert ask(source, own).reply.state == "nothing"
    assert ask(source, empty).reply.state == "delta"
    assert ask(source, own._replace(sequence=own.sequence + 1)).reply.state == "diverged"
    assert ask(source, own._replace(root=bytes(16))).reply.state == "diverged"
    assert ask(source, own._replace(lineage="ef" * 16)).reply.state == "foreign"
    assert ask(source, empty._replace(lineage="ef" * 16)).reply.state == "copy"
    fill(source, 0, 6000, 200)
    assert ask(source, own).reply.state == "too_large"


def test_below_the_purge_mark_no_delta_helps(sides: tuple[Side, Side]) -> None:
    """K05: a replica from before the purge mark is told to exchange, with the reason; a leader that recovers copies
    whole. Deleted keys stay deleted.
    """
    source, target = sides
    fill(source, 0, 100)
    bring(target, Wire(source), source.slot.position)
    source.tablet.delete_many([b"%08d" % number for number in range(50)])
    source.tablet.purge(source.slot.position.sequence)
    rows = ask(source, target.slot.position)
    assert rows.reply.state == "exchange"
    assert "purge" in rows.reply.reason
    assert bring(target, Wire(source), source.slot.position) == source.slot.position
    assert target.tablet.get(b"%08d" % 7) is None
    assert target.tablet.diff(source.tablet) == []


def test_an_empty_copy_is_seeded_in_bulk(sides: tuple[Side, Side]) -> None:
    """F13: more than an answer holds comes as a full copy into a stage that takes the empty tablet's place."""
    source, target = sides
    fill(source, 0, 6000, 200)
    assert bring(target, Wire(source), source.slot.position) == source.slot.position
    assert target.tablet.diff(source.tablet) == []


def test_an_interrupted_copy_goes_on(sides: tuple[Side, Side]) -> None:
    """K21: what arrived before a cut is not sent again, for a full copy and for a large delta."""
    source, target = sides
    fill(source, 0, 20_000, 200)
    cut = Wire(source, cut_after=12)
    with pytest.raises(errors.Unreachable):
        bring(target, cut, source.slot.position)
    rest = Wire(source)
    assert bring(target, rest, source.slot.position) == source.slot.position
    assert rest.requests[0].resume is not None
    fill(source, 0, 20_000, 199)
    cut = Wire(source, cut_after=12)
    with pytest.raises(errors.Unreachable):
        bring(target, cut, source.slot.position)
    assert target.slot.filling
    with pytest.raises(errors.NotReady):
        target.tablet.get(b"%08d" % 7)
    rest = Wire(source)
    assert bring(target, rest, source.slot.position) == source.slot.position
    assert rest.requests[0].resume is not None
    assert target.tablet.diff(source.tablet) == []


def test_a_copy_never_replaces_what_is_newer(sides: tuple[Side, Side]) -> None:
    """A full copy that ends before the own position is refused; the own files stay as they are."""
    source, target = sides
    fill(source, 0, 100)
    bring(target, Wire(source), source.slot.position)
    fill(target, 100, 200)
    before = target.slot.position
    copier = copying.Copier(target.slot, "target")
    with pytest.raises(errors.Diverged):
        asyncio.run(copier.run(Wire(source), fm.Path.FULL))
    assert target.slot.position == before
    assert target.tablet.get(b"%08d" % 150) is not None


def test_a_copy_of_a_foreign_lineage_is_refused(tmp_path: Path) -> None:
    """A source of another lineage never replaces the own copy, also when it holds more."""
    source, target = Side(tmp_path / "source", lineage="ef" * 16), Side(tmp_path / "target")
    fill(source, 0, 100)
    fill(target, 0, 10)
    before = target.slot.position
    copier = copying.Copier(target.slot, "target")
    with pytest.raises(errors.ForeignData):
        asyncio.run(copier.run(Wire(source), fm.Path.FULL))
    assert target.slot.position == before
    with pytest.raises(errors.Diverged):
        bring(target, Wire(source), source.slot.position)
    source.close()
    target.close()


def test_a_damaged_tablet_is_replaced_by_a_proved_copy(sides: tuple[Side, Side]) -> None:
    """F11: a tablet that does not open counts as empty and untrusted, keeps its files until the copy is proved, then is
    replaced.
    """
    source, target = sides
    fill(source, 0, 1000)
    bring(target, Wire(source), source.slot.position)
    target.store.close()
    file = target.path / "tablets" / TABLET / "data.mdb"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    target.store = Store(target.path)
    target.slot = target.open()
    assert target.slot.tablet is None
    assert not target.slot.trusted
    assert target.slot.position.sequence == 0
    with pytest.raises(errors.Unreachable):
        bring(target, Wire(source, cut_after=1), source.slot.position)
    assert file.exists()
    assert bring(target, Wire(source), source.slot.position) == source.slot.position
    assert target.tablet.diff(source.tablet) == []


def test_trust_of_a_copy(sides: tuple[Side, Side]) -> None:
    """F14: a copy is trusted when its file, its boot number and its note are what this node last wrote, else not."""
    _, target = sides
    assert target.slot.trusted
    fill(target, 0, 10)
    target.slot.stamp()

    def reopened(**standing: int | bool) -> Slot:
        target.store.close()
        target.store = Store(target.path)
        target.slot = target.open(**standing)
        return target.slot

    assert reopened(boot_number=2, stamped=1).trusted
    assert not reopened(boot_number=3, stamped=2).trusted
    assert not reopened(boot_number=3, stamped=0, distrusted=True).trusted
    slot = reopened(boot_number=3, stamped=1)
    slot.stamp()
    assert reopened(boot_number=4, stamped=3).trusted
    target.store.close()
    file = target.path / "tablets" / TABLET / "data.mdb"
    content = file.read_bytes()
    file.rename(file.with_name("away"))
    file.write_bytes(content)
    file.chmod(0o600)
    assert not reopened(boot_number=5, stamped=3).trusted
