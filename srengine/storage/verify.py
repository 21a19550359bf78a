"""Check a data directory offline: every page, every record, every small file; change nothing.

`verify_directory` is what ``srengine verify DIR`` runs. It takes the directory's lock (so nobody writes meanwhile), and
looks at

* ``store.json`` against its checksum and against the tablets that are there; ``identity.json`` against its own;
* each tablet: its fence; its file page by page (pages.py); and, if the pages are sound, through the kernel every
  record's checks, root and counts against the records, records against the change log;
* each environment of the metadata store (``meta/``, ``log/``): pages, and every value's checksum; and, where the caller
  knows what its rows mean, whether they fit together.

A tablet with damaged pages is not given to LMDB; the records on its sound pages are checked here all the same. Copies
in the making (``tmp/``) are not looked at: they are thrown away when they are damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import xxhash

from srengine import errors
from srengine.storage import catalog, fences, files, metadata_rows, pages
from srengine.storage.report import Damage, VerifyReport
from srengine.storage.store import IDENTITY_NAME, TABLETS_NAME, TEMPORARY_NAME

_IDENTITY_BYTES_MAX: Final = 1 << 20
_RECORD: Final = struct.Struct("<BBHQQQ")  # format, flags, version entries, sequence, hybrid clock, content checksum


Check = Callable[[Path, VerifyReport], None]
"""Looks at the rows of one environment whose pages are sound, and adds what is wrong with them."""


def verify_directory(path: str | os.PathLike[str], checks: Mapping[str, Check] | None = None) -> VerifyReport:
    """Return what is damaged in the data directory of a store or a node; an empty list says that nothing is.

    ``checks``: by the name of an environment of the metadata store, what knows its rows.

    Raises `NotFound` or `InvalidValue` (no data directory), `AlreadyOpen` (in use), and what a refused system call
    means. Damage is never an exception.
    """
    root = Path(path)
    report = VerifyReport()
    files.check_private(root, directory=True, insecure=True)
    lock = files.DirectoryLock(root, named=False)
    try:
        with files.Directory(root) as directory:
            if not any(directory.exists(name) for name in (TABLETS_NAME, catalog.CATALOG_NAME, IDENTITY_NAME)):
                raise errors.InvalidValue(f"{root} is no data directory of srengine", path=str(root))
            names = _verify_names(root, directory, report)
            _verify_identity(directory, report)
        for tablet in sorted(_directories(root / TABLETS_NAME)):
            _verify_tablet(root, tablet, names.get(tablet.name, tablet.name), report)
        for child in sorted(_directories(root)):
            if child.name not in {TABLETS_NAME, TEMPORARY_NAME} and (child / pages.DATA_NAME).exists():
                _verify_metadata(root, child, (checks or {}).get(child.name), report)
    finally:
        lock.release()
    return report


def _directories(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [child for child in path.iterdir() if child.is_dir() and not child.is_symlink()]


def _verify_names(root: Path, directory: files.Directory, report: VerifyReport) -> dict[str, str]:
    """Check the catalog of an embedded store; return name by tablet id."""
    try:
        entries = catalog.read_catalog(directory, insecure=True)
    except errors.Error as error:
        report.add(Damage("file", catalog.CATALOG_NAME, error.message))
        return {}
    for name, entry in sorted(entries.items()):
        where = f"{TABLETS_NAME}/{entry.tablet_id}"
        if entry.state == "ready" and not (root / where).is_dir():
            report.add(Damage("missing", where, f"tablet {name} has no directory", tablet=entry.tablet_id))
    return {entry.tablet_id: name for name, entry in entries.items()}


def _verify_identity(directory: files.Directory, report: VerifyReport) -> None:
    try:
        content = directory.read(IDENTITY_NAME, bytes_max=_IDENTITY_BYTES_MAX, insecure=True)
    except errors.NotFound:
        return
    except errors.Error as error:
        report.add(Damage("file", IDENTITY_NAME, error.message))
        return
    if not _is_identity(content):
        report.add(Damage("file", IDENTITY_NAME, f"{IDENTITY_NAME} does not match its check"))


def _is_identity(content: bytes) -> bool:
    """Return whether the bytes carry the right check (docs/formats-directory.md); the rest is the node's business."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            return False
        check = found.pop("check", None)
        text = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return False
    return bool(check == hashlib.blake2b(text, digest_size=16, person=b"srengine-ident").hexdigest())


def _verify_tablet(root: Path, path: Path, name: str, report: VerifyReport) -> None:
    tablet_id = path.name
    where = f"{TABLETS_NAME}/{tablet_id}"
    if not catalog.is_tablet_id(tablet_id):
        report.add(Damage("foreign", where, f"{where} is no tablet's directory"))
        return
    report.tablets += 1
    fence = fences.read_fence(path)
    if fence is not None:
        detail = f"the tablet is fenced after a fault ({fence.reason}): {fence.detail}"
        report.add(Damage("fenced", f"{where}/{fences.FENCE_NAME}", detail, tablet=tablet_id))
    sound = _verify_pages(root, path, tablet_id, report)
    if sound:
        _verify_records(path, tablet_id, name, report)
    else:
        _verify_readable_records(path, tablet_id, report)


def _verify_pages(root: Path, path: Path, tablet_id: str | None, report: VerifyReport) -> bool:
    """Check a data file's pages; return whether it may be given to LMDB."""
    data = path / pages.DATA_NAME
    where = str(data.relative_to(root))
    try:
        found = pages.walk(data)
    except errors.NotFound:
        report.add(Damage("missing", where, f"{where} is missing", tablet=tablet_id))
        return False
    except errors.Error as error:
        report.add(Damage("file", where, error.message, tablet=tablet_id))
        return False
    report.pages += found.reached + found.free
    report.bytes += found.bytes
    report.dropped += found.damages_dropped
    for damage in found.damages:
        detail = f"{damage.detail} [{damage.tree}]" if damage.tree else damage.detail
        report.add(Damage(damage.kind, where, detail, tablet=tablet_id, page=damage.page))
    return found.clean


def _verify_records(path: Path, tablet_id: str, name: str, report: VerifyReport) -> None:
    """Check records, root and change log through the kernel; leave the directory as it was."""
    from srengine.storage.tablet import Tablet

    where = f"{TABLETS_NAME}/{tablet_id}/{pages.DATA_NAME}"
    # LMDB wants to write its lock file beside the data, so the data is shown to it in another place. Nobody else has
    # the environment open: the directory is locked.
    with tempfile.TemporaryDirectory(prefix="srengine-verify-") as beside:
        Path(beside, pages.DATA_NAME).symlink_to((path / pages.DATA_NAME).absolute())
        try:
            tablet = Tablet.open(Path(beside), tablet_id, name=name, read_only=True)
            try:
                found = tablet.verify()
            finally:
                tablet.close()
        except errors.Error as error:
            kind = "foreign" if isinstance(error, errors.ForeignData) else "row"
            report.add(Damage(kind, where, error.message.replace(beside, str(path)), tablet=tablet_id))
            return
    report.records += found.records
    report.dropped += found.dropped
    for damage in found.damages:
        report.add(damage)


def _verify_readable_records(path: Path, tablet_id: str, report: VerifyReport) -> None:
    """Check the records on the pages of a damaged file that are sound, without LMDB."""
    where = f"{TABLETS_NAME}/{tablet_id}/{pages.DATA_NAME}"
    try:
        with pages.PageFile(path / pages.DATA_NAME) as file:
            for key, stored in file.items("records", skip_damage=True):
                report.records += 1
                if not is_sound_record(key, stored):
                    report.add(Damage("record", where, "record", tablet=tablet_id, key=key))
    except errors.Error:
        # Nothing of it can be read; the walk has said why.
        return


def is_sound_record(key: bytes, stored: bytes) -> bool:
    """Return whether a stored record passes both of its checks (docs/formats.md), as the kernel would say."""
    if len(stored) < _RECORD.size + 4:
        return False
    record_format, flags, versions, _, _, checksum = _RECORD.unpack_from(stored)
    end = _RECORD.size + 16 * versions
    if record_format != 1 or len(stored) < end + 4:
        return False
    if int.from_bytes(stored[end : end + 4], "little") != xxhash.xxh3_64_intdigest(key + stored[:end]) & 0xFFFFFFFF:
        return False
    return bool(xxhash.xxh3_64_intdigest(stored[end + 4 :], seed=flags) == checksum)


def _verify_metadata(root: Path, path: Path, check: Check | None, report: VerifyReport) -> None:
    """Check an environment of the metadata store: pages and values, without opening it in LMDB."""
    where = str((path / pages.DATA_NAME).relative_to(root))
    if fences.read_fence(path) is not None:
        report.add(Damage("fenced", f"{path.name}/{fences.FENCE_NAME}", "the metadata store is fenced after a fault"))
    if not _verify_pages(root, path, None, report):
        return
    with pages.PageFile(path / pages.DATA_NAME) as file:
        for table in sorted(file.tables()):
            for key, stored in file.items(table):
                report.records += 1
                if not metadata_rows.is_sealed(table, key, stored):
                    report.add(Damage("row", where, f"the value of {key[:64]!r} in table {table} is damaged", key=key))
    if check is not None:
        check(path, report)
