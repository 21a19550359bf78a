"""put, get, delete, scan: one table, one key or a range.

Keys and values are text (UTF-8) unless ``--hex`` or ``--file`` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from srengine import errors
from srengine.cli.application import Command
from srengine.cli.output import bytes_field, one_line
from srengine.cli.settings import Settings, pass_settings

READS = click.Choice(["local", "one", "quorum", "all"])
WRITES = click.Choice(["quorum", "all"])


def parse_bytes(text: str, *, is_hex: bool, what: str) -> bytes:
    """Return the bytes that the user typed; `InvalidValue` when they are no hexadecimal or no UTF-8."""
    if is_hex:
        try:
            return bytes.fromhex(text)
        except ValueError:
            raise errors.InvalidValue(f"the {what} {text!r} is not hexadecimal", what=what) from None
    # NB: what the terminal sent and Python could not decode comes back as it was.
    return text.encode("utf-8", "surrogateescape")


def _hex_option(function: Any) -> Any:
    return click.option("--hex", "is_hex", is_flag=True, help="Keys and values are hexadecimal, typed and printed.")(
        function
    )


def _file_bytes(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()


def record_fields(key: bytes, value: bytes) -> dict[str, Any]:
    """Return key and value as JSON writes them: text, or ``_b64`` for bytes that are no UTF-8."""
    return {**bytes_field("key", key), **bytes_field("value", value)}


@click.command(cls=Command)
@click.argument("table")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--file", "file", metavar="FILE", help="Read the value from FILE (-: stdin).")
@click.option("--if-absent", is_flag=True, help="Only when there is no record; exit code 5 otherwise.")
@click.option(
    "--if-version", type=int, metavar="V", help="Only over the record of this version; exit code 5 otherwise."
)
@click.option("--consistency", type=WRITES, default="quorum", show_default=True, help="Who must have it durably.")
@_hex_option
@pass_settings
def put(
    settings: Settings,
    *,
    table: str,
    key: str,
    value: str | None,
    file: str | None,
    if_absent: bool,
    if_version: int | None,
    consistency: str,
    is_hex: bool,
) -> None:
    """Store VALUE under KEY; print the version of the record."""
    if (value is None) == (file is None):
        raise click.UsageError("give either VALUE or --file")
    if if_absent and if_version is not None:
        raise click.UsageError("--if-absent and --if-version exclude each other")
    content = _file_bytes(file) if file is not None else parse_bytes(value or "", is_hex=is_hex, what="value")
    key_bytes = parse_bytes(key, is_hex=is_hex, what="key")
    with settings.connect() as cluster:
        version = cluster.table(table).put(
            key_bytes, content, if_absent=if_absent, if_version=if_version, consistency=consistency
        )
    settings.out.one({**bytes_field("key", key_bytes), "version": version}, str(version))


@click.command(cls=Command)
@click.argument("table")
@click.argument("key")
@click.option("--file", "file", metavar="FILE", help="Write the value to FILE (-: stdout, without a line end).")
@click.option("--consistency", type=READS, default="quorum", show_default=True, help="Who answers.")
@_hex_option
@pass_settings
def get(settings: Settings, *, table: str, key: str, file: str | None, consistency: str, is_hex: bool) -> None:
    """Print the value of KEY; exit code 10 when there is none."""
    key_bytes = parse_bytes(key, is_hex=is_hex, what="key")
    with settings.connect() as cluster:
        record = cluster.table(table).get_record(key_bytes, consistency=consistency)
    if record is None:
        raise errors.NotFound(f"there is no key {one_line(key_bytes)} in {table}", table=table, key=key_bytes)
    out = settings.out
    if file == "-":
        out.raw(record.value)
        return
    if file is not None:
        Path(file).write_bytes(record.value)
    facts = {
        **record_fields(record.key, record.value),
        "version": record.version,
        "hybrid_clock": record.hybrid_clock,
        "as_of": record.as_of,
    }
    if out.format != "text":
        out.one(facts, "")
    elif file is None:
        out.raw(record.value.hex().encode() if is_hex else record.value)
        out.raw(b"\n")


@click.command(cls=Command)
@click.argument("table")
@click.argument("key")
@click.option("--if-version", type=int, metavar="V", help="Only the record of this version; exit code 5 otherwise.")
@click.option("--consistency", type=WRITES, default="quorum", show_default=True, help="Who must have it durably.")
@_hex_option
@pass_settings
def delete(settings: Settings, *, table: str, key: str, if_version: int | None, consistency: str, is_hex: bool) -> None:
    """Delete KEY; print 1 when it existed, else 0. Both are success."""
    key_bytes = parse_bytes(key, is_hex=is_hex, what="key")
    with settings.connect() as cluster:
        deleted = cluster.table(table).delete(key_bytes, if_version=if_version, consistency=consistency)
    settings.out.one({**bytes_field("key", key_bytes), "deleted": deleted}, str(int(deleted)))


@click.command(cls=Command)
@click.argument("table")
@click.option("--start", metavar="KEY", help="First key.")
@click.option("--stop", metavar="KEY", help="End before this key.")
@click.option("--prefix", metavar="TEXT", help="Only keys that begin so.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N records.")
@click.option("--reverse", is_flag=True, help="From the last key to the first.")
@click.option("--keys-only", is_flag=True, help="Without values.")
@click.option("--consistency", type=READS, default="quorum", show_default=True, help="Who answers.")
@_hex_option
@pass_settings
def scan(
    settings: Settings,
    *,
    table: str,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    consistency: str,
    is_hex: bool,
    **texts: str | None,
) -> None:
    """Print records in key order: key and value, separated by a tab."""
    bounds = {
        name: None if text is None else parse_bytes(text, is_hex=is_hex, what=name) for name, text in texts.items()
    }
    with settings.connect() as cluster:
        pages = cluster.table(table)._pages(
            **bounds, limit=limit, reverse=reverse, keys_only=keys_only, consistency=consistency
        )
        pairs = (pair for page in pages for pair in page)
        _print_pairs(settings, pairs, keys_only=keys_only, is_hex=is_hex)


def _print_pairs(settings: Settings, pairs: Iterator[tuple[bytes, bytes]], *, keys_only: bool, is_hex: bool) -> None:
    out = settings.out
    if out.format == "text":
        for key, value in pairs:
            shown = [key.hex() if is_hex else one_line(key)]
            if not keys_only:
                shown.append(value.hex() if is_hex else one_line(value))
            out.line("\t".join(shown))
        return
    out.many((bytes_field("key", key) if keys_only else record_fields(key, value) for key, value in pairs), ())
