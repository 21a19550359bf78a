"""Check the node-wide log of a data directory offline: what `srengine verify` says about ``log/``.

The generic check of the metadata store names every value that does not match its own checksum; this one reads the same
rows as entries and names what is missing, replaced, cut off or too much. LMDB is not needed for it, and nothing is
changed: a group that was found damaged before and has not caught up yet is reported again.
"""

from __future__ import annotations

from pathlib import Path

from srengine import errors
from srengine.consensus import log_rows as rows
from srengine.consensus.log import LOG_NAME
from srengine.storage.logged import OfflineRows
from srengine.storage.metadata_rows import Row
from srengine.storage.pages import DATA_NAME
from srengine.storage.report import Damage, VerifyReport
from srengine.storage.wal import WAL_NAME


def check_log(path: Path, report: VerifyReport) -> None:
    """Add to ``report`` what is wrong with the groups' logs in the environment ``path``, whose pages are sound."""
    where = f"{LOG_NAME}/{DATA_NAME}"
    try:
        log = OfflineRows(path)
    except errors.Error as error:
        report.add(Damage("log", f"{LOG_NAME}/{WAL_NAME}", error.message))
        return
    with log:
        own = _own_rows(log)
        for name in sorted(own):
            start, stop = rows.group_range(name)
            entries = (row for row in log.survey(rows.ENTRIES) if start <= row.key < stop)
            try:
                found = rows.survey(name, own[name], entries)
            except errors.CorruptionError as error:
                report.add(Damage("log", where, f"{name}: {error.message}"))
                continue
            for finding in found.findings:
                report.add(Damage(finding.kind, where, finding.detail, key=_key(name, finding)))
            if found.mark is not None:
                mark = found.mark
                detail = f"{name} was found damaged at {mark.index} and has not caught up yet: {mark.detail}"
                report.add(Damage("log", where, detail))


def _own_rows(log: OfflineRows) -> dict[str, dict[bytes, Row]]:
    """Return each group's own rows by their letter; groups of which only entries are left have none."""
    found: dict[str, dict[bytes, Row]] = {}
    for row in log.survey(rows.GROUPS):
        name, _, letter = row.key.partition(b"\0")
        found.setdefault(name.decode("utf-8", "backslashreplace"), {})[letter] = row
    for row in log.survey(rows.ENTRIES):
        found.setdefault(row.key.partition(b"\0")[0].decode("utf-8", "backslashreplace"), {})
    return found


def _key(name: str, finding: rows.Finding) -> bytes | None:
    if finding.index is None:
        return None
    return rows.entry_key(rows.group_range(name)[0], finding.index)
