"""import and export: a table from and to a file, streaming, going on where an interrupted run stopped.

Import reads lines into batches, each acknowledged before the next is sent. After each one the side file
``FILE.import-state`` says how far the source was read, so that the same command goes on there; a repeated batch would
be harmless (the same values under the same keys). Lines that are no records go to the reject file with number and
reason.

Export writes to ``FILE.part`` in key order and renames it when complete, so FILE is never half of anything. The last
whole line of ``FILE.part`` says where an interrupted run goes on; ``FILE.part-state`` says what it was exporting. An
export is no snapshot: records that change while it runs are written as they are when their page is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from srengine import errors, limits
from srengine.cli.application import Command
from srengine.cli.data import READS, WRITES
from srengine.cli.jsonl import LINE_BYTES_MAX, decode_line, encode_line
from srengine.cli.output import Output
from srengine.cli.settings import Settings, pass_settings

if TYPE_CHECKING:
    from srengine.client import Table

BATCH_RECORDS_MAX: Final = 5000
BATCH_BYTES_MAX: Final = 4 * limits.MIB
REJECTED_TEXT_BYTES_MAX: Final = 4096
EXIT_INVALID: Final = 11
HEAD_BYTES: Final = 64 * limits.KIB
_KNOWN_LATER: Final = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}


# --- import ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ImportState:
    """How far an import is: everything before ``offset`` is stored or rejected."""

    table: str
    source: str
    """Digest of the beginning of the file: another file under the same name starts from the front."""
    offset: int = 0
    """Bytes of the source."""
    lines: int = 0
    imported: int = 0
    rejected: int = 0
    reject_bytes: int = 0
    """Length of the reject file that belongs to this state; what is behind it is written again."""


@click.command("import", cls=Command)
@click.argument("table")
@click.argument("file")
@click.option("--format", "kind", type=click.Choice(["jsonl"]), default=None, help="Of the file (default: jsonl).")
@click.option("--reject", "reject", metavar="FILE", help="Where bad lines go (default: FILE.rejects; -: stderr).")
@click.option("--restart", is_flag=True, help="Begin at the front even if an earlier run was interrupted.")
@click.option("--batch", type=click.IntRange(1, 100_000), default=BATCH_RECORDS_MAX, show_default=True, help="Records.")
@click.option("--consistency", type=WRITES, default="quorum", show_default=True, help="Who must have it durably.")
@click.pass_context
@pass_settings
def import_table(
    settings: Settings,
    context: click.Context,
    *,
    table: str,
    file: str,
    kind: str | None,
    reject: str | None,
    restart: bool,
    batch: int,
    consistency: str,
) -> None:
    """Store the records of FILE (-: stdin) in TABLE: one JSON object a line with key and value, or key_b64, value_b64.

    Bad lines are kept apart and counted; exit code 11 if there were any. Run it again to go on after an interruption.
    """
    _check_kind(file, kind)
    with settings.connect() as cluster, _open_source(file) as source:
        target = cluster.table(table)
        importer = Importer(source, table, file, reject, settings.out)
        importer.begin(restart=restart)
        try:
            for pairs in importer.batches(batch):
                target.put_many(pairs, consistency=consistency)
                importer.acknowledged(len(pairs))
        finally:
            importer.close()
        importer.finish()
    state = importer.state
    rejects = importer.reject_name if state.rejected else None
    settings.out.one(
        {
            "table": table,
            "lines": state.lines,
            "imported": state.imported,
            "rejected": state.rejected,
            "rejects": rejects,
        },
        f"imported\t{state.imported}\trejected\t{state.rejected}" + (f"\t{rejects}" if rejects else ""),
    )
    context.exit(EXIT_INVALID if state.rejected else 0)


class Importer:
    """One run over one source."""

    def __init__(self, source: IO[bytes], table: str, file: str, reject: str | None, out: Output) -> None:
        self._source = source
        self._out = out
        self._state_path = None if file == "-" else Path(f"{file}.import-state")
        self.reject_name = reject or ("-" if file == "-" else f"{file}.rejects")
        self._reject: IO[bytes] | None = None
        self.state = ImportState(table, "" if file == "-" else _head_digest(Path(file)))
        self._read = self.state

    def begin(self, *, restart: bool) -> None:
        """Go to where an earlier run of the same source into the same table stopped."""
        earlier = None if restart or self._state_path is None else _load_state(self._state_path)
        same = earlier is not None and (earlier.table, earlier.source) == (self.state.table, self.state.source)
        if earlier is not None and same and os.fstat(self._source.fileno()).st_size >= earlier.offset:
            self.state = earlier
            self._source.seek(earlier.offset)
            self._out.event(
                "resumed", f"going on at line {earlier.lines + 1}", lines=earlier.lines, offset=earlier.offset
            )
        if self.reject_name != "-":
            rejects = Path(self.reject_name)
            if self.state.reject_bytes == 0:
                rejects.unlink(missing_ok=True)
            elif rejects.exists():
                os.truncate(rejects, min(self.state.reject_bytes, rejects.stat().st_size))
        self._read = ImportState(**asdict(self.state))

    def batches(self, records_max: int) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield batches of records; a batch counts once `acknowledged` was called."""
        pairs: list[tuple[bytes, bytes]] = []
        size = 0
        while True:
            line = self._source.readline(LINE_BYTES_MAX)
            if not line:
                break
            self._read.offset += len(line)
            self._read.lines += 1
            if len(line) == LINE_BYTES_MAX and not line.endswith(b"\n"):
                self._skip_line()
                self._reject_line(line, f"longer than {LINE_BYTES_MAX} bytes")
                continue
            if not line.strip():
                continue
            try:
                key, value = decode_line(line)
            except errors.InvalidValue as error:
                self._reject_line(line, error.message)
                continue
            pairs.append((key, value))
            size += len(key) + len(value)
            if len(pairs) >= records_max or size >= BATCH_BYTES_MAX:
                yield pairs
                pairs, size = [], 0
        yield pairs

    def acknowledged(self, records: int) -> None:
        """Record durably that everything read so far is stored or rejected."""
        self._read.imported += records
        if self._reject is not None:
            self._reject.flush()
            os.fsync(self._reject.fileno())
        self.state = ImportState(**asdict(self._read))
        if self._state_path is not None:
            _replace(self._state_path, json.dumps(asdict(self.state)).encode())
        self._out.event(
            "progress",
            f"imported {self.state.imported}, rejected {self.state.rejected}",
            imported=self.state.imported,
            rejected=self.state.rejected,
            lines=self.state.lines,
        )

    def finish(self) -> None:
        """Note that the source was read to its end: the next run begins at the front."""
        if self._state_path is not None:
            self._state_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the reject file."""
        if self._reject is not None:
            self._reject.close()
            self._reject = None

    def _skip_line(self) -> None:
        while True:
            rest = self._source.readline(LINE_BYTES_MAX)
            self._read.offset += len(rest)
            if not rest or rest.endswith(b"\n"):
                return

    def _reject_line(self, line: bytes, reason: str) -> None:
        text = line[:REJECTED_TEXT_BYTES_MAX].decode("utf-8", "backslashreplace").rstrip("\r\n")
        entry = (
            json.dumps({"line": self._read.lines, "error": reason, "text": text}, ensure_ascii=False).encode() + b"\n"
        )
        self._read.rejected += 1
        if self.reject_name == "-":
            sys.stderr.buffer.write(entry)
            return
        if self._reject is None:
            self._reject = Path(self.reject_name).open("ab")  # noqa: SIM115 - closed by close()
        self._reject.write(entry)
        self._read.reject_bytes += len(entry)


def _open_source(file: str) -> IO[bytes]:
    return sys.stdin.buffer if file == "-" else Path(file).open("rb")


def _check_kind(file: str, kind: str | None) -> None:
    later = _KNOWN_LATER.get(Path(file).suffix.lower())
    if kind is None and later is not None:
        raise click.UsageError(f"{later} files are not supported yet; use jsonl (or say --format jsonl)")


def _load_state(path: Path) -> ImportState | None:
    try:
        return ImportState(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise errors.InvalidValue(f"{path} is damaged; remove it or use --restart", path=str(path)) from error


def _head_digest(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.sha256(source.read(HEAD_BYTES)).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a small file so that either the old or the new one is there whatever happens."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    new.replace(path)


# --- export ----------------------------------------------------------------------------------------------------------


@click.command("export", cls=Command)
@click.argument("table")
@click.argument("file")
@click.option("--format", "kind", type=click.Choice(["jsonl"]), default=None, help="Of the file (default: jsonl).")
@click.option("--prefix", metavar="TEXT", help="Only keys that begin so.")
@click.option("--restart", is_flag=True, help="Begin at the first key even if an earlier run was interrupted.")
@click.option("--consistency", type=READS, default="quorum", show_default=True, help="Who answers.")
@pass_settings
def export_table(
    settings: Settings,
    *,
    table: str,
    file: str,
    kind: str | None,
    prefix: str | None,
    restart: bool,
    consistency: str,
) -> None:
    """Write the records of TABLE to FILE (-: stdout) in key order, one JSON object a line; replace an existing FILE."""
    _check_kind(file, kind)
    prefix_bytes = prefix.encode() if prefix else None
    with settings.connect() as cluster:
        source = cluster.table(table)
        if file == "-":
            for key, value in source.scan(prefix=prefix_bytes, consistency=consistency):
                settings.out.raw(encode_line(key, value))
            return
        described = {"table": table, "prefix": prefix, "cluster": cluster.status()["cluster"]["id"]}
        exported = _export_file(source, Path(file), described, prefix_bytes, consistency, settings.out, restart=restart)
    settings.out.one({"table": table, "file": file, "exported": exported}, f"exported\t{exported}")


def _export_file(
    source: Table,
    file: Path,
    described: dict[str, Any],
    prefix: bytes | None,
    consistency: str,
    out: Output,
    *,
    restart: bool,
) -> int:
    part, mark = Path(f"{file}.part"), Path(f"{file}.part-state")
    last, exported = None, 0
    if not restart and mark.exists() and mark.read_bytes() == json.dumps(described).encode() and part.exists():
        last, exported = _last_record(part)
        out.event("resumed", f"going on after {exported} records", exported=exported)
    else:
        part.unlink(missing_ok=True)
        _replace(mark, json.dumps(described).encode())
    start = None if last is None else last + b"\0"
    with part.open("ab") as target:
        for page in source._pages(start=start, prefix=prefix, consistency=consistency):
            target.write(b"".join(encode_line(key, value) for key, value in page))
            exported += len(page)
            out.event("progress", f"exported {exported}", exported=exported)
        target.flush()
        os.fsync(target.fileno())
    part.replace(file)
    mark.unlink()
    return exported


def _last_record(part: Path) -> tuple[bytes | None, int]:
    """Cut a torn last line off; return the key of the last whole one and the number of lines."""
    with part.open("r+b") as target:
        lines = 0
        end = 0
        last = b""
        for line in target:
            if not line.endswith(b"\n"):
                break
            lines += 1
            end += len(line)
            last = line
        target.truncate(end)
    return (decode_line(last)[0] if last else None), lines
