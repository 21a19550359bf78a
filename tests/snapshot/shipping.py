"""What the tests of this room share: tablets with a history, and shipping from one to the other."""

from __future__ import annotations

import random

from srengine.snapshot import SnapshotSink, SnapshotSource, Staged
from tests.reference.snapshot_tablet import PlainStore, PlainTablet


def change(tablet, chance: random.Random, count: int, *, keys: int = 300) -> None:
    """Put, overwrite, delete and waste sequences."""
    for _ in range(count):
        key = b"key-%04d" % chance.randrange(keys)
        what = chance.random()
        if what < 0.2:
            tablet.put(key, None)
        elif what < 0.3:
            tablet.skip()
        else:
            tablet.put(key, chance.randbytes(chance.randrange(40)) * 3)


def made_tablet(seed: int = 1, count: int = 400, **facts: object) -> PlainTablet:
    """Return a tablet with ``count`` operations behind it."""
    tablet = PlainTablet(**facts)
    change(tablet, random.Random(seed), count)
    return tablet


def ship(source: SnapshotSource, store: PlainStore, *, tablet: PlainTablet | None = None, items_max: int | None = None):
    """Ship items into the store (at most ``items_max`` of them); return (position or None, tablet, sink)."""
    with SnapshotSink(Staged(store, "t1", tablet=tablet)) as sink:
        items = iter(source)
        for number, item in enumerate(items):
            if number == items_max:
                items.close()
                return None, sink.tablet, sink
            sink.accept(item)
        return sink.finish(), sink.tablet, sink
