"""import and export: every byte comes back, bad lines are kept apart, interrupted runs go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.cli import transfer
from srengine.cli.jsonl import decode_line, encode_line
from srengine.client import messages
from tests.client.fake import ADDRESSES

T = "shop.orders"
TRICKY = {
    b"plain": b"text",
    "ключ".encode(): "значение".encode(),
    b"\xff\xfe": bytes(range(256)),
    b"new\nline": b'tab\t"quote" \\ \x00 \x1f',
    b"empty": b"",
    "\u2028".encode(): "\U0001f600".encode(),
}


@given(st.binary(min_size=1, max_size=511), st.binary(max_size=200))
def test_a_line_says_every_byte(key, value):
    """Whatever key and value are, a line is one line and reads back as the same."""
    line = encode_line(key, value)
    assert line.count(b"\n") == 1
    assert decode_line(line) == (key, value)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_a_line_of_anything(line):
    """Any bytes are a record or InvalidValue."""
    try:
        key, value = decode_line(line)
    except errors.InvalidValue:
        return
    assert isinstance(key, bytes)
    assert isinstance(value, bytes)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["key", "value", "key_b64", "x"]), inner)
    ),
    max_leaves=6,
)


@given(_JSON)
def test_a_line_of_any_json(value):
    """Any JSON is a record or InvalidValue."""
    try:
        decode_line(json.dumps(value).encode())
    except errors.InvalidValue:
        pass


@pytest.mark.parametrize(
    "line",
    [
        b"", b"null", b"[]", b'"x"', b"{}", b'{"key": "k"}', b'{"value": "v"}', b'{"key": "", "value": "v"}',
        b'{"key": "k", "key_b64": "aw==", "value": "v"}', b'{"key": "k", "value": 1}', b'{"key": "k", "value": null}',
        b'{"key_b64": "*", "value": "v"}', b'{"key_b64": "a", "value": "v"}', b'{"key": "k", "value": "v", "more": 1}',
        b'{"key": "' + b"k" * 512 + b'", "value": "v"}', b'{"key": "k", "value": "v"} x', b"\xff", b"[" * 10_000,
        b'{"key": "\\ud800", "value": "v"}',
    ],
)  # fmt: skip
def test_bad_lines(line):
    """What is no record is InvalidValue."""
    with pytest.raises(errors.InvalidValue):
        decode_line(line)


def test_round_trip(cluster, run, tmp_path):
    """What is exported and imported again is the same, bytes included."""
    cluster.put_directly(T, TRICKY)
    file = tmp_path / "orders.jsonl"
    assert run("export", T, file, "--json").json == {"table": T, "file": str(file), "exported": len(TRICKY)}
    keys = [decode_line(line)[0] for line in file.read_bytes().splitlines(keepends=True)]
    assert keys == sorted(TRICKY)
    run("table", "create", "shop.copy")
    done = run("import", "shop.copy", file, "--json").json
    assert done == {"table": "shop.copy", "lines": 6, "imported": 6, "rejected": 0, "rejects": None}
    assert cluster.contents("shop.copy") == dict(sorted(TRICKY.items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orders.jsonl"]


def test_standard_streams(cluster, run):
    """- is stdout and stdin; only records are on stdout of an export."""
    cluster.put_directly(T, TRICKY)
    exported = run("export", T, "-").stdout
    assert len(exported.splitlines()) == len(TRICKY)
    run("table", "create", "shop.copy")
    assert run("import", "shop.copy", "-", stdin=exported).code == 0
    assert cluster.contents("shop.copy") == cluster.contents(T)


def test_prefix(cluster, run, tmp_path):
    """--prefix exports a part."""
    cluster.put_directly(T, {b"a1": b"", b"a2": b"", b"b1": b""})
    assert run("export", T, tmp_path / "a", "--prefix", "a", "--json").json["exported"] == 2


def test_rejects(cluster, run, tmp_path):
    """Bad lines go to the reject file with number and reason, good ones are stored; exit code 11."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"key":"a","value":"1"}\nnonsense\n\n{"key":"b"}\n{"key":"c","value":"3"}')
    result = run("import", T, file, "--json")
    assert result.code == 11
    assert result.json == {
        "table": T, "lines": 5, "imported": 2, "rejected": 2, "rejects": f"{file}.rejects",
    }  # fmt: skip
    assert cluster.contents(T) == {b"a": b"1", b"c": b"3"}
    rejects = [json.loads(line) for line in Path(f"{file}.rejects").read_bytes().splitlines()]
    assert [(entry["line"], entry["text"]) for entry in rejects] == [(2, "nonsense"), (4, '{"key":"b"}')]
    assert "value" in rejects[1]["error"]
    again = run("import", T, file, "--reject", tmp_path / "bad", "--json")
    assert again.json["rejects"] == str(tmp_path / "bad")
    assert len((tmp_path / "bad").read_bytes().splitlines()) == 2


def test_rejects_of_stdin_go_to_stderr(cluster, run):
    """Without a file there is no place beside it: rejected lines are shown on stderr."""
    result = run("import", T, "-", "-o", "json", stdin=b"nonsense\n")
    assert result.code == 11
    assert json.loads(result.stderr.splitlines()[0])["line"] == 1


def test_a_line_too_long_is_rejected(cluster, run, tmp_path, monkeypatch):
    """A line beyond the bound is rejected without being held in memory, and the next one is read."""
    monkeypatch.setattr(transfer, "LINE_BYTES_MAX", 64)
    file = tmp_path / "in"
    file.write_bytes(b'{"key":"a","value":"' + b"x" * 500 + b'"}\n{"key":"b","value":"2"}\n')
    result = run("import", T, file, "--json")
    assert (result.code, result.json["imported"], result.json["lines"]) == (11, 1, 2)
    assert cluster.contents(T) == {b"b": b"2"}


def _fail_at(cluster, number):
    """Let the number-th write fail, and all after it."""
    seen = []

    def fault(message):
        if isinstance(message, messages.Write):
            seen.append(message)
            if len(seen) >= number:
                raise errors.DiskFull("no space")

    for address in ADDRESSES:
        cluster.faults[address] = [fault] * 10_000


def test_import_goes_on(cluster, run, tmp_path):
    """An interrupted import goes on behind the last acknowledged batch, rejects included."""
    file = tmp_path / "in.jsonl"
    lines = [encode_line(b"k%03d" % number, b"%d" % number) for number in range(100)]
    lines.insert(15, b"bad one\n")
    lines.insert(80, b"bad two\n")
    file.write_bytes(b"".join(lines))
    _fail_at(cluster, 20)
    stopped = run("import", T, file, "--batch", 10, "--json")
    assert stopped.code == 8
    stored = len(cluster.contents(T))
    assert 0 < stored < 100
    cluster.faults.clear()
    cluster.log.clear()
    done = run("import", T, file, "--batch", 10, "--json")
    assert done.code == 11
    assert done.json == {
        "table": T, "lines": 102, "imported": 100, "rejected": 2, "rejects": f"{file}.rejects",
    }  # fmt: skip
    assert cluster.contents(T) == {b"k%03d" % number: b"%d" % number for number in range(100)}
    texts = [json.loads(line)["text"] for line in Path(f"{file}.rejects").read_bytes().splitlines()]
    assert texts == ["bad one", "bad two"]
    assert not Path(f"{file}.import-state").exists()
    sent = sum(1 for _, message in cluster.log if isinstance(message, messages.Write))
    assert sent < 40, "it began at the front"


def test_import_of_another_file_begins_at_the_front(cluster, run, tmp_path):
    """State of another source, another table, or with --restart is not used; damaged state is a clear error."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(encode_line(b"a", b"1"))
    state = Path(f"{file}.import-state")
    other = {"table": T, "source": "other", "offset": 5, "lines": 1, "imported": 1, "rejected": 0, "reject_bytes": 0}
    state.write_text(json.dumps(other))
    assert run("import", T, file, "--json").json["imported"] == 1
    for damaged in ("", "{", "[]", '{"table": 1}'):
        state.write_text(damaged)
        assert run("import", T, file).code == 11
    assert run("import", T, file, "--restart").code == 0


def test_export_goes_on(cluster, run, tmp_path):
    """An interrupted export goes on behind its last whole line; FILE appears only when it is complete."""
    contents = {b"k%03d" % number: b"%d" % number for number in range(60)}
    cluster.put_directly(T, contents)
    cluster.page_items_max = 5
    file = tmp_path / "out.jsonl"
    for address in ADDRESSES:
        cluster.faults[address] = [None] * 8 + [errors.CorruptionError("damaged")] * 1000
    assert run("export", T, file).code == 7
    part = Path(f"{file}.part")
    assert not file.exists()
    whole = part.read_bytes()
    assert whole.endswith(b"\n")
    part.write_bytes(whole + b'{"key":"torn')
    cluster.faults.clear()
    cluster.log.clear()
    assert run("export", T, file, "--json").json["exported"] == 60
    assert dict(decode_line(line) for line in file.read_bytes().splitlines()) == contents
    assert len(file.read_bytes().splitlines()) == 60
    first = next(message for _, message in cluster.log if isinstance(message, messages.Scan))
    assert first.start is not None, "it began at the front"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_export_of_another_table_begins_at_the_front(cluster, run, tmp_path):
    """What another export left is not continued, and --restart continues nothing."""
    cluster.put_directly(T, {b"a": b"1", b"b": b"2"})
    file = tmp_path / "out"
    for mark in ('{"table": "shop.other"}', ""):
        Path(f"{file}.part").write_bytes(encode_line(b"a", b"old"))
        Path(f"{file}.part-state").write_text(mark)
        assert run("export", T, file, *(["--restart"] if not mark else []), "--json").json["exported"] == 2
        assert file.read_bytes() == encode_line(b"a", b"1") + encode_line(b"b", b"2")


def test_progress_events(cluster, run, tmp_path):
    """With jsonl, progress is events on stdout before the result."""
    file = tmp_path / "in"
    file.write_bytes(encode_line(b"a", b"1"))
    lines = run("import", T, file, "-o", "jsonl").lines
    assert [line.get("event") for line in lines] == ["progress", None]
    assert lines[-1]["imported"] == 1


def test_missing_files(cluster, run, tmp_path):
    """A source that is not there is exit code 10, and nothing is made."""
    assert run("import", T, tmp_path / "nothing").code == 10
    assert run("put", T, "k", "--file", tmp_path / "nothing").code == 10
    assert run("export", T, tmp_path / "no" / "where").code == 10
    assert list(tmp_path.iterdir()) == []
