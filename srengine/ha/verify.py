"""What ``srengine verify DIR`` checks of the agreed state, beyond the checksums that storage/verify.py looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from srengine.ha.epochs import EPOCH_STATE_TABLE, EPOCH_TABLE, NEWEST, findings
from srengine.storage.metadata_rows import read_offline
from srengine.storage.pages import DATA_NAME
from srengine.storage.report import Damage, VerifyReport

METADATA_NAME: Final = "meta"


def check_epoch_rows(path: Path, report: VerifyReport) -> None:
    """Add to ``report`` every break in the chain of epochs (B05) in the environment ``path``, whose pages are sound."""
    where = f"{METADATA_NAME}/{DATA_NAME}"
    newest = dict(read_offline(path, EPOCH_STATE_TABLE)).get(NEWEST)
    for text in findings(read_offline(path, EPOCH_TABLE), newest):
        report.add(Damage("epoch", where, text))
