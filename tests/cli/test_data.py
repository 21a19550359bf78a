"""put, get, delete, scan, db, table, status: what is typed, what comes out, with which exit code."""

from __future__ import annotations

import base64

import pytest

T = "shop.orders"


def test_put_get_delete(cluster, run):
    """A value goes in and comes out as it was; delete says whether there was something."""
    assert run("put", T, "k", "3 äpfel").text == "1\n"
    assert run("get", T, "k").text == "3 äpfel\n"
    assert run("delete", T, "k").text == "1\n"
    assert run("delete", T, "k").text == "0\n"
    gone = run("get", T, "k")
    assert (gone.code, gone.text) == (10, "")
    assert "there is no key k" in gone.errors


def test_put_json(cluster, run):
    """JSON of put, get and delete has stable keys."""
    assert run("put", T, "k", "v", "-o", "json").json == {"key": "k", "version": 1}
    assert run("get", T, "k", "--json").json == {
        "key": "k", "value": "v", "version": 1, "hybrid_clock": 1, "as_of": 12.5,
    }  # fmt: skip
    assert run("delete", T, "k", "-o", "jsonl").json == {"key": "k", "deleted": True}


def test_bytes(cluster, run, tmp_path):
    """Bytes go through --hex, --file and stdin; JSON shows what is no UTF-8 in base64."""
    assert run("put", T, "ff00", "00ff", "--hex").code == 0
    assert cluster.contents(T) == {b"\xff\x00": b"\x00\xff"}
    assert run("get", T, "ff00", "--hex").text == "00ff\n"
    shown = run("get", T, "ff00", "--hex", "--json").json
    assert base64.b64decode(shown["key_b64"]) == b"\xff\x00"
    assert base64.b64decode(shown["value_b64"]) == b"\x00\xff"
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(range(256)) * 10)
    assert run("put", T, "k", "--file", blob).code == 0
    assert run("get", T, "k", "--file", "-").stdout == blob.read_bytes()
    assert run("get", T, "k", "--file", tmp_path / "copy").stdout == b""
    assert (tmp_path / "copy").read_bytes() == blob.read_bytes()
    assert run("put", T, "k", "--file", "-", stdin=b"\x80stdin").code == 0
    assert cluster.contents(T)[b"k"] == b"\x80stdin"


def test_an_empty_value_is_a_value(cluster, run):
    """The empty string can be stored and read."""
    assert run("put", T, "k", "").code == 0
    assert run("get", T, "k").stdout == b"\n"


def test_conditions(cluster, run):
    """--if-absent and --if-version lose with exit code 5 and the version that stands."""
    version = run("put", T, "k", "1", "--if-absent", "--json").json["version"]
    lost = run("put", T, "k", "2", "--if-absent", "--json")
    assert lost.code == 5
    assert lost.json["error"]["code"] == "CONFLICT"
    assert lost.json["error"]["details"]["current_version"] == version
    assert run("put", T, "k", "2", "--if-version", version + 1).code == 5
    assert run("put", T, "k", "2", "--if-version", version).code == 0
    assert run("delete", T, "k", "--if-version", version).code == 5
    assert run("put", T, "k", "2", "--if-version", version, "--if-absent").code == 2


def test_scan_text(cluster, run):
    """A scan prints one record a line, in key order over all tablets, with a tab between key and value."""
    cluster.put_directly(T, {b"k%02d" % number: b"v%d" % number for number in range(20)})
    assert run("scan", T).text == "".join(f"k{number:02d}\tv{number}\n" for number in range(20))
    assert run("scan", T, "--start", "k05", "--stop", "k07").text == "k05\tv5\nk06\tv6\n"
    assert run("scan", T, "--prefix", "k1", "--limit", 2, "--reverse", "--keys-only").text == "k19\nk18\n"
    assert run("scan", T, "--limit", 0).text == ""


def test_scan_text_is_one_line_a_record(cluster, run):
    """Tabs, line ends, backslashes and bytes are escaped, so that a line is a record, and no two records look alike."""
    cluster.put_directly(T, {b"a\nb": b"c\td\\e", b"\xff\\x": b"\x00"})
    assert run("scan", T).text == "a\\nb\tc\\td\\\\e\n\\xff\\\\x\t\\x00\n"
    assert run("scan", T, "--hex", "--prefix", "ff").text == "ff5c78\t00\n"


def test_scan_json(cluster, run):
    """With json it is one array, jsonl one object a line; keys only leaves values out."""
    cluster.put_directly(T, {b"a": b"1", b"b": b"\xff"})
    expected = [{"key": "a", "value": "1"}, {"key": "b", "value_b64": "/w=="}]
    assert run("scan", T, "-o", "json").json == expected
    assert run("scan", T, "-o", "jsonl").lines == expected
    assert run("scan", T, "-o", "json", "--keys-only").json == [{"key": "a"}, {"key": "b"}]


def test_databases(cluster, run):
    """Databases: create and list; a second create is exit code 5, a bad name 11."""
    assert run("db", "create", "crm").text == "crm\n"
    assert run("db", "create", "crm").code == 5
    assert run("db", "create", "a/b").code == 11
    assert run("db", "list").text == "crm\nshop\n"
    assert run("db", "list", "--json").json == [{"name": "crm"}, {"name": "shop"}]


def test_tables(cluster, run):
    """Tables: create, list and describe; exit codes of what cannot be."""
    assert run("table", "create", "shop.items", "--tablets", 2, "--replicas", 3, "--json").json == {
        "name": "shop.items", "tablets": 2, "replicas": 3,
    }  # fmt: skip
    assert run("table", "create", "shop.items").code == 5
    assert run("table", "create", "nothing.items").code == 10
    assert run("table", "create", "items").code == 11
    assert run("table", "create", "shop.more", "--tablets", 0).code == 2
    assert run("table", "list").text == "shop.items\t2\t3\nshop.orders\t4\t3\n"
    described = run("table", "describe", "shop.items", "--json").json
    assert [tablet["tablet"] for tablet in described["placement"]] == [0, 1]
    assert set(described["placement"][0]) == {"tablet", "id", "leader", "replicas"}
    assert len(run("table", "describe", "shop.items").text.splitlines()) == 2
    assert run("table", "describe", "shop.nothing").code == 10


def test_status(cluster, run):
    """The status is what the cluster says; --node shows one node, 10 when there is none."""
    assert run("status", "--json").json == cluster.status
    text = run("status").text.splitlines()
    assert text[0].startswith("cluster\tfake\t")
    assert [line.split("\t")[1] for line in text[1:]] == ["node-1", "node-2", "node-3"]
    only = run("status", "--node", "node-2", "--json").json
    assert [node["name"] for node in only["nodes"]] == ["node-2"]
    missing = run("status", "--node", "node-9")
    assert missing.code == 10
    assert "did you mean 'node-" in missing.errors


def test_sync_status(cluster, run):
    """The sync status lists each replica of each tablet with the promised keys."""
    rows = run("sync", "status", "--json").json
    assert len(rows) == 12
    assert set(rows[0]) == {
        "table", "tablet", "node", "leader", "term", "state", "sequence", "behind", "root", "verified_at",
        "bytes_received", "path", "reason", "scrubbed_at", "scrub_records", "repairs", "quarantined",
    }  # fmt: skip
    assert len(run("sync", "status", T).text.splitlines()) == 12
    assert run("sync", "status", "shop.nothing").text == ""


def test_sync_run(cluster, run):
    """A round prints what came of each replica; one that is not right afterwards ends it with 7."""
    rounds = run("sync", "run", "--json")
    assert (rounds.code, len(rounds.json)) == (0, 12)
    assert {each["outcome"] for each in rounds.json} == {"equal"}
    cluster.outcomes = {"node-2": "healed", "node-3": "moving"}
    assert run("sync", "run", T, "--wait", "5").code == 0
    cluster.outcomes = {"node-2": "damaged"}
    damaged = run("sync", "run", T)
    assert damaged.code == 7
    assert "damaged" in damaged.text


@pytest.mark.parametrize("consistency", ["local", "one", "quorum", "all"])
def test_read_consistency(cluster, run, consistency):
    """Reads take all four; what a write does not know is a usage error."""
    cluster.put_directly(T, {b"k": b"v"})
    assert run("get", T, "k", "--consistency", consistency).text == "v\n"
    assert run("scan", T, "--consistency", consistency).text == "k\tv\n"
    expected = 0 if consistency in {"quorum", "all"} else 2
    assert run("put", T, "k", "v", "--consistency", consistency).code == expected
