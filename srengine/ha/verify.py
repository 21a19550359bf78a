"""What ``srengine verify DIR`` checks of the agreed state, beyond the checksums that storage/verify.py looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from srengine import errors
from srengine.ha.epochs import EPOCH_STATE_TABLE, EPOCH_TABLE, NEWEST, findings
from srengine.storage.metadata import read_offline
from srengine.storage.pages import DATA_NAME
from srengine.storage.report import Damage, VerifyReport

METADATA_NAME: Final = "meta"


def verify_epochs(root: Path, report: VerifyReport) -> None:
    """Add a damage for every break in the chain of epochs (B05). The directory is locked by the caller."""
    path = root / METADATA_NAME
    if not (path / DATA_NAME).exists():
        return
    where = f"{METADATA_NAME}/{DATA_NAME}"
    try:
        newest = dict(read_offline(path, EPOCH_STATE_TABLE)).get(NEWEST)
        for text in findings(read_offline(path, EPOCH_TABLE), newest):
            report.add(Damage("epoch", where, text))
    except errors.Error as error:
        # Pages that cannot be read are named already; this says what could not be looked at because of them.
        report.add(Damage("epoch", where, f"the chain of epochs cannot be read: {error.message}"))
