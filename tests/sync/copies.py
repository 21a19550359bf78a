"""A node's copy of one tablet, without a node: what tests of copies and exchanges put side by side."""

from __future__ import annotations

from pathlib import Path

from srengine.storage import MetadataStore, Store, Tablet
from srengine.sync.slots import FileId, Slot, Spec, Standing

TABLET, LINEAGE, SEED = "ab" * 16, "cd" * 16, b"seedseed"


class Side:
    """A node's directory with one tablet."""

    def __init__(self, path: Path, *, lineage: str = LINEAGE) -> None:
        self.path = path
        self.store = Store(path)
        self.rows = MetadataStore(path / "meta")
        self.slot = self.open(lineage)

    def open(self, lineage: str = LINEAGE, **standing: int | bool) -> Slot:
        spec = Spec(TABLET, "db.t", 0, lineage, SEED, ("node-1", "node-2"))
        slot = Slot(
            spec,
            store=self.store,
            rows=self.rows,
            standing=Standing(**{"boot_number": 1, "stamped": 0, "distrusted": False, **standing}),
            file_ids=lambda path: FileId(path.stat().st_ino, 0) if path.exists() else None,
            data=self.path,
        )
        slot.open()
        return slot

    @property
    def tablet(self) -> Tablet:
        return self.slot.opened()

    def close(self) -> None:
        self.store.close()
        self.rows.close()

    @classmethod
    def reopened(cls, side: Side) -> Side:
        """Return the side anew, after its tablet was changed on the disk."""
        side.rows.close()
        return cls(side.path)
