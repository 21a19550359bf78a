"""The command line on real nodes: the demo, dev, and a cluster from the outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import srengine
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "srengine", *(str(argument) for argument in arguments)]


def environment(directory: Path) -> dict[str, str]:
    """Temporary directories of the process go below ``directory``, so that a test sees what is left of them."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"}


def srengine_json(tmp_path: Path, *arguments: object, code: int = 0, stdin: bytes | None = None):
    done = subprocess.run(
        command(*arguments, "-o", "json"), capture_output=True, input=stdin, cwd=tmp_path, env=environment(tmp_path)
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_demo(tmp_path):
    """K01: a node killed under load comes back equal; its reads of new keys are never "not found"."""
    done = subprocess.run(
        command("demo", "--records", 2000, "-o", "json"), capture_output=True, cwd=tmp_path, env=environment(tmp_path)
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    summary = json.loads(done.stdout)
    assert summary["equal"] is True
    assert summary["problems"] == []
    assert summary["records"] > 2000
    assert summary["missed"] >= 100
    assert summary["deleted"] > 0
    assert summary["bytes_shipped"] > 0
    assert summary["bytes_full_copy"] > 2000 * 50
    reads = summary["reads_at_node_3"]
    assert reads.get("right", 0) + reads.get("waited", 0) > 0
    assert not {"not_found", "wrong", "failed"} & set(reads)
    assert list(tmp_path.iterdir()) == [], "the demo left something behind"


def test_demo_events_and_keep(tmp_path):
    """With jsonl each step is an event; --keep leaves directories that verify finds whole."""
    done = subprocess.run(
        command("demo", "--records", 500, "-o", "jsonl", "--keep"),
        capture_output=True, cwd=tmp_path, env=environment(tmp_path),
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["problems"] == [], lines[-1]["problems"]
    assert done.returncode == 0, done.stderr
    events = [line["event"] for line in lines[:-1]]
    for earlier, later in zip(
        ["directory", "starting", "loading", "killed", "returning", "synced", "equal"],
        ["starting", "loading", "killed", "returning", "synced", "equal", "compared"],
        strict=True,
    ):
        assert events.index(earlier) < events.index(later)
    directory = Path(lines[-1]["directory"])
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["node-1", "node-2", "node-3"]
    for node in ("node-1", "node-2", "node-3"):
        assert srengine_json(tmp_path, "verify", directory / node)["clean"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted(tmp_path, number):
    """An interrupted demo ends with 130, ends its nodes and removes its directory."""
    process = subprocess.Popen(
        command("demo", "-o", "jsonl"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=tmp_path, env=environment(tmp_path),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "loading":
                break
        nodes = children_of(process.pid)
        assert len(nodes) == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "INTERRUPTED"
    assert not any(is_running(pid) for pid in nodes)
    assert list(tmp_path.iterdir()) == []


def test_nodes_end_with_a_killed_demo(tmp_path):
    """SIGKILL of the demo itself leaves no node running."""
    with subprocess.Popen(
        command("demo", "-o", "jsonl"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=tmp_path, env=environment(tmp_path),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "loading":
                break
        nodes = children_of(process.pid)
        process.kill()
    assert len(nodes) == 3
    wait_for(lambda: not any(is_running(pid) for pid in nodes), "the nodes end", 30)


def test_dev(tmp_path):
    """Dev stays up, says where it is, serves the sample commands, and Ctrl-C removes it."""
    with subprocess.Popen(
        command("dev", "--nodes", 2, "-o", "json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=tmp_path, env=environment(tmp_path),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        assert len(ready["nodes"]) == 2
        at = ("--endpoint", ready["endpoints"])
        srengine_json(tmp_path, *at, "db", "create", "shop")
        srengine_json(tmp_path, *at, "table", "create", "shop.orders", "--replicas", 2, "--tablets", 2)
        srengine_json(tmp_path, *at, "put", "shop.orders", "1001", "3 apples")
        assert srengine_json(tmp_path, *at, "get", "shop.orders", "1001")["value"] == "3 apples"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Three real nodes with the table shop.orders."""
    with Nodes(tmp_path_factory.mktemp("nodes"), 3) as nodes:
        nodes.start_all()
        with srengine.connect(nodes.endpoints) as cluster:
            cluster.create_database("shop")
            cluster.create_table("shop.orders", tablets=4)
        yield nodes


def test_status_of_real_nodes(nodes, tmp_path):
    """The shapes of status and sync status are those of docs/cli.md."""
    seen = srengine_json(tmp_path, "--endpoint", nodes.endpoints, "status")
    assert set(seen) >= {"cluster", "leader", "epoch", "term", "config_version", "nodes", "tables"}
    assert set(seen["cluster"]) >= {"id", "name"}
    assert len(seen["nodes"]) == 3
    for node in seen["nodes"]:
        assert set(node) >= {
            "name", "id", "address", "role", "state", "alive", "stable", "journal_lag", "sync", "disk_used",
            "disk_free",
        }  # fmt: skip
        assert node["role"] in {"follower", "observer"}
        assert node["state"] in {"INIT", "FOLLOWER", "LEADER", "OBSERVER", "UNKNOWN"}
    (table,) = (table for table in seen["tables"] if table["name"] == "shop.orders")
    assert (table["tablets"], table["replicas"]) == (4, 3)
    rows = srengine_json(tmp_path, "--endpoint", nodes["node-3"].address, "sync", "status", "shop.orders")
    assert len(rows) == 12
    for row in rows:
        assert set(row) >= {
            "table", "tablet", "node", "leader", "term", "state", "sequence", "behind", "root", "verified_at",
            "bytes_received", "path", "reason",
        }  # fmt: skip


def test_data_through_any_node(nodes, tmp_path):
    """Every node takes writes and reads, and import and export bring bytes through."""
    for number, node in enumerate(nodes):
        at = ("--endpoint", node.address)
        srengine_json(tmp_path, *at, "put", "shop.orders", f"key-{number}", f"value-{number}")
        assert srengine_json(tmp_path, *at, "get", "shop.orders", f"key-{number}")["value"] == f"value-{number}"
    at = ("--endpoint", nodes.endpoints)
    lost = srengine_json(tmp_path, *at, "put", "shop.orders", "key-0", "x", "--if-absent", code=5)
    assert lost["error"]["details"]["current_version"] > 0
    assert srengine_json(tmp_path, *at, "get", "shop.orders", "nothing", code=10)["error"]["code"] == "NOT_FOUND"
    assert srengine_json(tmp_path, *at, "get", "shop.nothing", "k", code=10)["error"]["code"] == "NOT_FOUND"
    assert srengine_json(tmp_path, *at, "db", "create", "shop", code=5)["error"]["code"] == "CONFLICT"
    lines = b'{"key":"text","value":"\\u00e4"}\n{"key_b64":"/wA=","value_b64":"AP8="}\n'
    assert srengine_json(tmp_path, *at, "import", "shop.orders", "-", stdin=lines)["imported"] == 2
    exported = subprocess.run(
        command(*at, "export", "shop.orders", "-"), capture_output=True, cwd=tmp_path, env=environment(tmp_path)
    )
    assert len(exported.stdout.splitlines()) == 5
    assert b'{"key_b64":"/wA=","value_b64":"AP8="}' in exported.stdout


def test_the_mapping_on_real_nodes(nodes):
    """The client's mapping on three processes: concurrent poppers never get one value twice."""
    with srengine.connect(nodes.endpoints) as cluster:
        cluster.create_table("shop.queue", tablets=3)
        table = cluster.table("shop.queue")
        model = {b"job-%03d" % number: b"%d" % number for number in range(60)}
        table.update(model)
        assert dict(table) == model
        assert len(table) == 60
        popped: list[bytes] = []

        def pop_all() -> None:
            for key in model:
                value = table.pop(key, None)
                if value is not None:
                    popped.append(value)

        threads = [threading.Thread(target=pop_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(popped, key=int) == list(model.values())
        assert not table
        big = b"x" * (2 * 1024 * 1024)
        table[b"big"] = big
        assert table[b"big"] == big
        assert dict(table.items()) == {b"big": big}
        version = table.get_record(b"big").version
        with pytest.raises(srengine.Conflict) as caught:
            table.put(b"big", b"", if_version=version + 1)
        assert caught.value.current_version == version


def test_a_write_survives_the_restart_of_its_leader(nodes):
    """A client goes on through the restart of the leading node: writes are retried, each happens once."""
    with srengine.connect(nodes.endpoints, timeout_s=60) as cluster:
        cluster.create_table("shop.counters", tablets=1)
        table = cluster.table("shop.counters")
        version = table.put(b"counter", b"0")
        first = nodes["node-1"]
        first.kill()
        first.start()
        for number in range(1, 20):
            version = table.put(b"counter", b"%d" % number, if_version=version)
        assert table[b"counter"] == b"19"
        first.wait_ready()


def test_node_start_refuses(tmp_path):
    """What cannot be meant is one sentence, the promised exit code, and an untouched directory."""
    data = tmp_path / "data"
    options = tmp_path / "options.toml"
    options.write_text('lissten = "tcp://127.0.0.1:1"\n')
    wrong = srengine_json(tmp_path, "node", "start", "--config", options, code=2)
    assert "did you mean listen" in wrong["error"]["message"]
    assert srengine_json(tmp_path, "node", "start", code=2)["error"]["code"] == "USAGE"
    base = ["node", "start", "--name", "n1", "--data", data]
    assert srengine_json(tmp_path, *base, "--listen", "nowhere", code=11)["error"]["code"] == "INVALID_VALUE"
    bad_name = ["node", "start", "--name", "a/b", "--data", data, "--listen", "tcp://127.0.0.1:0"]
    assert srengine_json(tmp_path, *bad_name, code=11)["error"]["code"] == "INVALID_VALUE"
    assert srengine_json(tmp_path, *base, "--listen", "tcp://127.0.0.1:0", "--initial", "x", code=11)
    assert not data.exists()


def test_node_init(tmp_path):
    """Node init makes a private directory with identity and keys, once."""
    data = tmp_path / "data"
    made = srengine_json(tmp_path, "node", "init", "--data", data, "--cluster", "prod", "--name", "n1")
    assert set(made) == {"name", "cluster", "node_id", "public_key", "data"}
    assert len(bytes.fromhex(made["public_key"])) == 32
    assert data.stat().st_mode & 0o777 == 0o700
    before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    again = srengine_json(tmp_path, "node", "init", "--data", data, "--cluster", "prod", "--name", "n2", code=5)
    assert again["error"]["code"] == "CONFLICT"
    assert sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*")) == before
    assert srengine_json(tmp_path, "node", "init", "--data", data, "--cluster", "a b", "--name", "n1", code=11)


def test_keyed_nodes(tmp_path):
    """Nodes with keys serve a client that knows a node's key, and nobody without it."""
    made = srengine_json(tmp_path, "node", "init", "--data", tmp_path / "n", "--cluster", "c", "--name", "n")
    from tests.processes import NodeProcess, free_ports

    port = free_ports()
    initial = f"n=tcp://127.0.0.1:{port}#{made['public_key']}"
    node = NodeProcess("n", tmp_path / "n", port, ["--cluster", "c", "--initial", initial])
    try:
        node.start().wait_ready()
        key = tmp_path / "n" / "keys" / "node.key"
        keyed = ("--endpoint", f"{node.address}#{made['public_key']}", "--key-file", key)
        assert srengine_json(tmp_path, *keyed, "status")["cluster"]["name"] == "c"
        keyed = ("--endpoint", node.address, "--server-key", made["public_key"], "--key-file", key)
        assert srengine_json(tmp_path, *keyed, "db", "list") == []
        stranger = ("--endpoint", node.address, "--server-key", made["public_key"], "--timeout", 2)
        assert srengine_json(tmp_path, *stranger, "status", code=6)["error"]["code"] == "NOT_AUTHENTICATED"
        srengine_json(tmp_path, "--endpoint", node.address, "--timeout", 2, "status", code=3)
    finally:
        node.kill()
