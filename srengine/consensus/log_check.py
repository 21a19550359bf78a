"""Check the node-wide log of a data directory offline: what `srengine verify` says about ``log/``.

The generic check of the metadata store names every value that does not match its own checksum; this one reads the same
rows as entries and names what is missing, replaced, cut off or too much. LMDB is not needed for it, and nothing is
changed: a group that was found damaged before and has not caught up yet is reported again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from srengine import errors
from srengine.consensus import log_rows as rows
from srengine.consensus.log import LOG_NAME
from srengine.storage.metadata_rows import Row, read_row
from srengine.storage.pages import DATA_NAME, PageFile
from srengine.storage.report import Damage, VerifyReport


def check_log(path: Path, report: VerifyReport) -> None:
    """Add to ``report`` what is wrong with the groups' logs in the environment ``path``, whose pages are sound."""
    where = f"{LOG_NAME}/{DATA_NAME}"
    with PageFile(path / DATA_NAME) as file:
        if rows.GROUPS not in file.tables():
            return
        own = _own_rows(file)
        for name in sorted(own):
            try:
                found = rows.survey(name, own[name], _entries(file, name))
            except errors.CorruptionError as error:
                report.add(Damage("log", where, f"{name}: {error.message}"))
                continue
            for finding in found.findings:
                report.add(Damage(finding.kind, where, finding.detail, key=_key(name, finding)))
            if found.mark is not None:
                mark = found.mark
                detail = f"{name} was found damaged at {mark.index} and has not caught up yet: {mark.detail}"
                report.add(Damage("log", where, detail))


def _own_rows(file: PageFile) -> dict[str, dict[bytes, Row]]:
    """Return each group's own rows by their letter; groups of which only entries are left have none."""
    found: dict[str, dict[bytes, Row]] = {}
    for key, stored in file.items(rows.GROUPS):
        name, _, letter = key.partition(b"\0")
        found.setdefault(name.decode("utf-8", "backslashreplace"), {})[letter] = read_row(rows.GROUPS, key, stored)
    if rows.ENTRIES in file.tables():
        for key, _ in file.items(rows.ENTRIES):
            found.setdefault(key.partition(b"\0")[0].decode("utf-8", "backslashreplace"), {})
    return found


def _entries(file: PageFile, name: str) -> Iterator[Row]:
    if rows.ENTRIES not in file.tables():
        return
    start, stop = rows.group_range(name)
    for key, stored in file.items(rows.ENTRIES):
        if start <= key < stop:
            yield read_row(rows.ENTRIES, key, stored)


def _key(name: str, finding: rows.Finding) -> bytes | None:
    if finding.index is None:
        return None
    return rows.entry_key(rows.group_range(name)[0], finding.index)
