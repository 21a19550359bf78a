"""docs/formats-snapshot.md says what the code does: tables and vectors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from srengine.snapshot import format as words
from srengine.snapshot import items
from srengine.snapshot.compression import Compressor, Decompressor
from srengine.snapshot.source import seed_id
from srengine.snapshot.transfer_machine import ChunkPlan, Complete, ReceiveMachine, advance, first_mark
from tests.reference import chunk as oracle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats-snapshot.md"
SNAPSHOT = bytes(range(16))
ROWS = oracle.encode_rows([oracle.Row(b"a", b"one", 1, 7), oracle.Row(b"b", None, 2, 8)])


def documented(name: str) -> bytes:
    found = re.search(rf"```hex {name}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, name
    return bytes.fromhex(found.group(1))


def made() -> dict[str, bytes]:
    """Return the vectors as the code makes them today."""
    manifest = words.Manifest(
        format=1,
        snapshot=SNAPSHOT,
        tablet="t",
        kind="full",
        lineage="l",
        seed=b"12345678",
        seed_id=seed_id(b"12345678"),
        scan_base=2,
        chunk_bytes=1024,
    )
    first = items.seal_manifest(manifest, words.NO_SOURCE)
    plan = ChunkPlan(
        ordinal=1,
        flags=words.FLAG_BY_KEY | words.FLAG_KEYS_END,
        row_count=2,
        raw_bytes=len(ROWS),
        after_key=b"",
        last_key=b"b",
        view_sequence=2,
        after_sequence=0,
        last_sequence=0,
    )
    chunk = items.seal_chunk(plan, ROWS, compressor=Compressor(active=False), snapshot=SNAPSHOT, source=words.NO_SOURCE)
    mark = advance(first_mark(manifest, first.head.digest), chunk.head)
    trailer = words.Trailer(
        target=words.StoredPosition(lineage="l", sequence=2, root=b"\x11" * 16, count=2),
        chunks=1,
        rows=2,
        raw_bytes=len(ROWS),
        digest=mark.digest,
        meta=b"m",
        state=b"s",
    )
    last = items.seal_trailer(trailer, 2, SNAPSHOT, words.NO_SOURCE)
    return {"rows": ROWS, "manifest": first.joined(), "chunk": chunk.joined(), "trailer": last.joined()}


@pytest.mark.parametrize("name", ["rows", "manifest", "chunk", "trailer"])
def test_the_vectors_are_what_the_code_makes(name):
    assert documented(name).hex() == made()[name].hex()


def test_the_documented_items_are_read_for_ever():
    machine = ReceiveMachine()
    decompressor = Decompressor()
    for name in ("manifest", "chunk", "trailer"):
        head, stored = items.split(documented(name))
        machine.step(items.open_item(head, stored, decompressor).message)
    assert isinstance(machine.state, Complete)
    assert machine.state.trailer.target.value() == ("l", 2, b"\x11" * 16, 2)


def test_the_head_is_laid_out_as_the_table_says():
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Item") : text.index("## Rows")]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", table, re.MULTILINE)
    at = 0
    for offset, size, name in rows:
        assert int(offset) == at, name
        at += int(size)
    assert at == words.HEAD_BYTES
    chunk = documented("chunk")
    fields = {name: chunk[int(offset) : int(offset) + int(size)] for offset, size, name in rows}
    assert fields["magic"] == b"SRSN"
    numbers = {name: int.from_bytes(value, "little") for name, value in fields.items()}
    head = words.read_head(chunk)
    for name in ("kind", "encoding", "flags", "ordinal", "raw_bytes", "stored_bytes", "row_count", "view_sequence"):
        assert numbers[name] == getattr(head, name), name
    assert fields["snapshot"] == head.snapshot == SNAPSHOT
    assert fields["digest"] == head.digest


def test_the_rows_are_laid_out_as_the_table_says():
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Rows") : text.index("## Manifest")]
    at = 0
    for offset, size, name in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", table, re.MULTILINE):
        assert int(offset) == at, name
        at += int(size)
    assert at == oracle.ROW.size


@pytest.mark.parametrize(("title", "kind"), [("## Manifest", words.Manifest), ("## Trailer", words.Trailer)])
def test_every_field_is_in_its_table(title, kind):
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(title) :].split("\n## ")[0]
    names = [
        name.strip() for cell in re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE) for name in cell.split(",")
    ]
    assert [name for name in names if name != "field"] == list(kind.__struct_fields__)
