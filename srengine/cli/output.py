"""How results reach stdout: text for people and grep, JSON for programs, JSON lines for streams.

* ``text``: one record a line, fields separated by tabs, control characters escaped; a heading only on a terminal.
* ``json``: one document: an object for one thing, an array for a list. It is written when the command succeeded, so
  that stdout never holds half a document.
* ``jsonl``: one object a line, as it comes; progress too, as ``{"event": …}``.

Progress in the other two formats goes to stderr, and with ``json`` only to a terminal.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

Format = Literal["text", "json", "jsonl"]
FORMATS: Final = ("text", "json", "jsonl")

_ESCAPES: Final = {
    **{number: f"\\x{number:02x}" for number in (*range(32), 127)},
    ord("\\"): "\\\\",
    ord("\t"): "\\t",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
}


def one_line(value: object) -> str:
    """Return the text of a value as a field of a line: control characters and backslashes escaped."""
    if value is None:
        return "-"
    if isinstance(value, bytes):
        return value.decode() if _is_text(value) else _escaped(value)
    return str(value).translate(_ESCAPES)


def _is_text(value: bytes) -> bool:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return False
    return not any(ord(character) in _ESCAPES for character in text)


def _escaped(value: bytes) -> str:
    # The escape of each backslash comes first, so that what stands for a byte cannot be mistaken for text.
    return (
        value.replace(b"\\", b"\\\\")
        .decode("utf-8", "backslashreplace")
        .translate({number: text for number, text in _ESCAPES.items() if number != ord("\\")})
    )


def bytes_field(name: str, value: bytes) -> dict[str, str]:
    """Return ``{name: text}`` for UTF-8, else ``{name_b64: base64}``: every byte string has exactly one form.

    >>> bytes_field("key", b"k"), bytes_field("key", bytes([255]))
    ({'key': 'k'}, {'key_b64': '/w=='})
    """
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(value).decode("ascii")}


def dump(value: Any) -> str:
    """Return compact JSON on one line; text stays readable."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


class Output:
    """Where one command writes. ``format`` is one of `FORMATS`."""

    def __init__(self, chosen: Format) -> None:
        self.format = chosen

    def one(self, value: dict[str, Any], text: str | Callable[[], str]) -> None:
        """Write one thing: ``value`` as JSON, or ``text`` ("" writes nothing)."""
        if self.format == "text":
            shown = text if isinstance(text, str) else text()
            if shown:
                self.line(shown)
        else:
            self.line(dump(value))

    def many(
        self,
        values: Iterable[dict[str, Any]],
        columns: Sequence[str],
        row: Callable[[dict[str, Any]], Sequence[object]] | None = None,
    ) -> None:
        """Write a list of things as they come; ``columns`` (or ``row``) make the fields of the text form."""
        if self.format == "json":
            self.line(dump(list(values)))
            return
        if self.format == "text" and sys.stdout.isatty():
            self.line("\t".join(column.upper() for column in columns))
        for value in values:
            if self.format == "jsonl":
                self.line(dump(value))
            else:
                fields = row(value) if row is not None else [value.get(column) for column in columns]
                self.line("\t".join(one_line(item) for item in fields))

    def event(self, name: str, text: str, **facts: Any) -> None:
        """Tell about progress: a line of jsonl on stdout; else text on stderr, with ``json`` on a terminal only."""
        if self.format == "jsonl":
            self.line(dump({"event": name, **facts}))
            sys.stdout.flush()
        elif self.format == "text" or sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    def failure(self, error: dict[str, Any], text: str) -> None:
        """Tell why the command failed: as JSON on stdout if a program reads it, as a sentence on stderr otherwise."""
        if self.format == "text":
            print(f"srengine: {text}", file=sys.stderr)
        else:
            self.line(dump({"error": error}))

    def line(self, text: str) -> None:
        """Write one line to stdout; what UTF-8 cannot say (lone surrogates) is escaped."""
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")

    def raw(self, value: bytes) -> None:
        """Write bytes as they are."""
        sys.stdout.buffer.write(value)

    def flush(self) -> None:
        """Push everything out; raises BrokenPipeError when the reader is gone."""
        sys.stdout.buffer.flush()


def abandon_stdout() -> None:
    """Point stdout to nowhere after its reader has gone, so that the interpreter's last flush does not fail again."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
