"""node start: where its options come from, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import srengine.node
from srengine import errors, limits
from srengine.node import InitialMember


@pytest.fixture
def started(monkeypatch):
    """Options of the nodes that would have been run."""
    seen = []

    def run_node(options, on_ready):
        seen.append(options)
        on_ready({"event": "ready", "name": options.name})

    monkeypatch.setattr(srengine.node, "run_node", run_node)
    monkeypatch.setattr(srengine.node, "log_to_stderr", lambda name: None)
    return seen


BASE = ("node", "start", "--name", "n1", "--data", "d", "--listen", "tcp://127.0.0.1:7400")


def test_flags(run, started):
    """Every flag reaches the node; the ready line is JSON on stdout in every format."""
    result = run(
        *BASE, "--peer-listen", "tcp://127.0.0.1:1", "--bulk-listen", "tcp://127.0.0.1:2", "--cluster", "c",
        "--initial", f"n1=tcp://127.0.0.1:7400,n2=tcp://h:1#{'ab' * 32}", "--insecure", "--allow-remote-fs",
        "--map-bytes", 4096, "--scrub-bytes-s", 1000, "--scrub-interval-s", 2.5,
    )  # fmt: skip
    assert result.json == {"event": "ready", "name": "n1"}
    (options,) = started
    assert (options.name, options.data) == ("n1", Path("d").absolute())
    assert (options.listen, options.peer_listen, options.bulk_listen) == (
        "tcp://127.0.0.1:7400", "tcp://127.0.0.1:1", "tcp://127.0.0.1:2",
    )  # fmt: skip
    assert options.initial == (InitialMember("n1", "tcp://127.0.0.1:7400"), InitialMember("n2", "tcp://h:1", "ab" * 32))
    assert (options.insecure, options.allow_remote_fs, options.map_bytes) == (True, True, 4096)
    assert (options.scrub_bytes_s, options.scrub_interval_s) == (1000, 2.5)
    for form in ("json", "jsonl"):
        assert run(*BASE, "-o", form).json == {"event": "ready", "name": "n1"}


def test_defaults(run, started):
    """What nobody says is the default."""
    assert run(*BASE).code == 0
    (options,) = started
    assert (options.insecure, options.allow_remote_fs, options.map_bytes, options.initial) == (False, False, None, ())
    assert (options.scrub_bytes_s, options.scrub_interval_s) == (limits.SCRUB_BYTES_S, limits.SCRUB_INTERVAL_S)


def test_precedence(run, started, tmp_path, monkeypatch):
    """Flag before environment before file before default."""
    file = tmp_path / "node.toml"
    file.write_text(
        'name = "file"\ndata = "from-file"\nlisten = "tcp://127.0.0.1:3"\ncluster = "file"\ninsecure = true\n'
        'initial = "file=tcp://127.0.0.1:3"\nmap-bytes = 5\n'
    )
    monkeypatch.setenv("SRENGINE_CONFIG", str(file))
    assert run("node", "start").code == 0
    monkeypatch.setenv("SRENGINE_CLUSTER", "environment")
    monkeypatch.setenv("SRENGINE_LISTEN", "tcp://127.0.0.1:4")
    assert run("node", "start", "--cluster", "flag").code == 0
    by_file, mixed = started
    assert (by_file.name, by_file.cluster, by_file.listen) == ("file", "file", "tcp://127.0.0.1:3")
    assert (by_file.insecure, by_file.map_bytes, by_file.data) == (True, 5, Path("from-file").absolute())
    assert (mixed.name, mixed.cluster, mixed.listen) == ("file", "flag", "tcp://127.0.0.1:4")


@pytest.mark.parametrize(
    ("text", "code"),
    [('lisen = "x"', 2), ("listen = 7", 11), ("no toml", 11), ('initial = "x"', 11), ("insecure = 1", 11)],
)
def test_bad_files(run, started, tmp_path, text, code):
    """An unknown key is a usage error that suggests the nearest; a wrong value is 11; no file is 10."""
    file = tmp_path / "node.toml"
    file.write_text(text)
    result = run(*BASE, "--config", file, "--json")
    assert result.code == code
    assert ("did you mean listen" in result.json["error"]["message"]) == (code == 2)
    assert run(*BASE, "--config", tmp_path / "nothing").code == 10
    assert started == []


def test_missing_options(run, started):
    """Name, data and listen are needed."""
    for missing in ("--name", "--data", "--listen"):
        at = BASE.index(missing)
        result = run(*BASE[:at], *BASE[at + 2 :])
        assert result.code == 2
        assert f"{missing} is missing" in result.errors


def test_a_node_that_must_stop(run, monkeypatch):
    """The reason why a node stops is the command's exit code and sentence."""

    def run_node(options, on_ready):
        raise errors.ForeignData("the directory belongs to another cluster")

    monkeypatch.setattr(srengine.node, "run_node", run_node)
    monkeypatch.setattr(srengine.node, "log_to_stderr", lambda name: None)
    result = run(*BASE, "--json")
    assert result.code == 5
    assert json.loads(result.stdout)["error"]["code"] == "FOREIGN_DATA"
