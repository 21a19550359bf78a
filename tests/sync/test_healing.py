"""Single records healed from other replicas: which source is believed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from srengine import errors, limits
from srengine.metrics import Metrics
from srengine.storage import Batch, encode_operations
from srengine.storage.checking import sound_rows
from srengine.sync.healing import heal_changes, heal_records
from srengine.sync.messages import FetchRows, FoundRows
from tests.node import rot
from tests.sync.copies import TABLET, Side

KEYS = [b"%08d" % number for number in (3, 50, 99)]


class Replica:
    """Answers with the rows of a copy; ``lie`` changes them, ``away`` lets it not answer at all."""

    def __init__(self, side: Side, *, away: bool = False, lie: bool = False) -> None:
        self.side, self.away, self.lie = side, away, lie
        self.asked = 0

    async def request(
        self, message: FetchRows, attachments: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[Any, Sequence[bytes]]:
        self.asked += 1
        if self.away:
            raise errors.Unreachable("nobody there")
        rows, count = sound_rows(self.side.tablet, message.keys, bytes_max=limits.MIB)
        if self.lie:
            rows = rows[:-1] + bytes([rows[-1] ^ 1])
        return FoundRows(count), [rows]


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    """A sound copy, and one of which three values rotted."""
    good, bad = Side(tmp_path / "good"), Side(tmp_path / "bad")
    good.tablet.apply([Batch(encode_operations([(0, b"%08d" % number, b"value", 0, 0) for number in range(100)]))])
    delta = good.tablet.delta_since(0, bytes_max=limits.MIB)
    assert delta is not None
    bad.tablet.apply_delta(delta)
    bad.store.close()
    rot.flip_value(tmp_path / "bad", TABLET, KEYS)
    bad = Side.reopened(bad)
    yield good, bad
    good.close()
    bad.close()


def heal(side: Side, replicas: dict[str, Replica], metrics: Metrics) -> list[bytes]:
    async def reach(name: str) -> Any:
        return replicas[name]

    return asyncio.run(heal_records(side.slot, KEYS, sorted(replicas), reach, metrics))


def test_the_first_replica_that_has_the_record_heals_it(sides: tuple[Side, Side]) -> None:
    """K10, F10: a replica that is away or whose rows say something else is passed over; the next one heals the records,
    and root and position stay.
    """
    good, bad = sides
    before = bad.slot.position
    metrics = Metrics()
    replicas = {"a": Replica(good, away=True), "b": Replica(good, lie=True), "c": Replica(good), "d": Replica(good)}
    assert sorted(heal(bad, replicas, metrics)) == KEYS
    assert [replica.asked for replica in replicas.values()] == [1, 1, 1, 0]
    assert metrics.value("srengine_repair_records_total", kind="value") == 3
    assert bad.slot.position == before == good.slot.position
    assert bad.tablet.verify().clean


def test_what_nobody_has_stays_damaged(sides: tuple[Side, Side]) -> None:
    """F10: with no sound row anywhere nothing is changed and the damage stays named."""
    good, bad = sides
    good.tablet.put_many([(key, b"newer") for key in KEYS[:2]])
    assert heal(bad, {"a": Replica(good)}, Metrics()) == KEYS[2:]
    for key in KEYS[:2]:
        with pytest.raises(errors.CorruptionError):
            bad.tablet.get(key)
    assert bad.tablet.get(KEYS[2]) == b"value"


def test_change_entries_come_back_from_the_own_records(sides: tuple[Side, Side], tmp_path: Path) -> None:
    """K11: lost entries of the change log are written again from the records, without another replica."""
    good, _ = sides
    good.store.close()
    rot.lose_change(tmp_path / "good", TABLET, 5)
    rot.lose_change(tmp_path / "good", TABLET, 7)
    side = Side.reopened(good)
    try:
        assert asyncio.run(heal_changes(side.slot, [b"%08d" % 4, b"%08d" % 6], Metrics())) == [b"%08d" % 4, b"%08d" % 6]
        assert side.tablet.verify().clean
    finally:
        side.close()
