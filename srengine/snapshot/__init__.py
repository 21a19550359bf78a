"""The one shipped artefact: a position, a manifest, chunks, a trailer.

Four users, one writer, one reader, one verifier: replicas that are new or far behind, the consensus log's catch-up,
jobs between clusters, backups. As a stream of items:

* `SnapshotSource`   a tablet as items; goes on from a mark, also of a copy that another replica began
* `SnapshotSink`     items into a tablet; keeps its mark durably, proves root and count at the end
* `Staged`, `InPlace`  where a sink writes: beside the real tablet until proved, or into it

and as a file: `write_snapshot`, `verify_snapshot`, `apply_snapshot`. The rules stand in transfer_machine.py, the bytes
in docs/formats-snapshot.md.

Memory of each side is bounded by 64 MiB + twice the largest value, whatever the tablet's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srengine.snapshot.file import Summary, apply_snapshot, partial_path, verify_snapshot, write_snapshot
from srengine.snapshot.format import Manifest, Mark, Trailer
from srengine.snapshot.sink import InPlace, Progress, SnapshotSink, Staged
from srengine.snapshot.source import SnapshotSource
from srengine.storage.tablet import use_snapshots

if TYPE_CHECKING:
    import os

    from srengine.storage import Tablet
    from srengine.types import Position

__all__ = [
    "InPlace",
    "Manifest",
    "Mark",
    "Progress",
    "SnapshotSink",
    "SnapshotSource",
    "Staged",
    "Summary",
    "Trailer",
    "apply_snapshot",
    "partial_path",
    "verify_snapshot",
    "write_snapshot",
]


class _Files:
    """What `Tablet.write_snapshot` and `Tablet.apply_snapshot` call: this room lies above theirs."""

    def write(self, tablet: Tablet, path: str | os.PathLike[str], since: Position | None) -> Position:
        """Write a file."""
        return write_snapshot(tablet, path, since)

    def apply(self, tablet: Tablet, path: str | os.PathLike[str]) -> Position:
        """Prove a file and apply it; the copy lives outside its group."""
        return apply_snapshot(tablet, path, adopt=True)


use_snapshots(_Files())
