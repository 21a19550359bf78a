"""verify and bench: offline checks of a directory, and the suite of a checkout."""

from __future__ import annotations

import pytest

import srengine
from srengine.cli import bench
from srengine.storage import MetadataStore
from tests.consensus.logs import Raw, filled
from tests.ha.agreed import agreed, bootstrap


@pytest.fixture
def directory(tmp_path):
    with srengine.open(tmp_path / "data") as store:
        tablet = store.tablet("users")
        tablet.put_many([(b"k%04d" % number, b"v" * 100) for number in range(2000)])
    return tmp_path / "data"


def test_a_whole_directory(run, directory):
    """A directory without damage is exit code 0, and says how much was read."""
    result = run("verify", directory, "--json")
    assert result.code == 0
    report = result.json
    assert (report["clean"], report["tablets"], report["records"], report["damages"]) == (True, 1, 2000, [])
    assert run("verify", directory).text.startswith("clean\t")


def test_damage_is_exit_code_7(run, directory):
    """Damage is exit code 7 in every form, and named."""
    (file,) = directory.glob("tablets/*/data.mdb")
    with file.open("r+b") as target:
        content = target.read()
        at = content.rindex(b"v" * 50)
        target.seek(at)
        target.write(b"w")
    result = run("verify", directory, "--json")
    assert result.code == 7
    assert result.json["clean"] is False
    assert result.json["damages"]
    as_text = run("verify", directory)
    assert as_text.code == 7
    assert "damage\tkind=" in as_text.text


def test_a_broken_chain_of_epochs_is_exit_code_7(run, tmp_path):
    """B05: a record of an epoch that was deleted by hand is found by verify, and named."""
    directory = tmp_path / "node"
    (directory / "tablets").mkdir(parents=True, mode=0o700)
    directory.chmod(0o700)
    with agreed(directory) as node:
        node.must(bootstrap())
        for number in range(1, 4):
            node.fence(number)
    assert run("verify", directory, "--json").code == 0
    with MetadataStore(directory / "meta") as store, store.transaction() as transaction:
        assert transaction.delete("epochs", (2).to_bytes(8, "big"))
    result = run("verify", directory, "--json")
    assert result.code == 7
    (damage,) = result.json["damages"]
    assert (damage["kind"], damage["file"]) == ("epoch", "meta/data.mdb")
    assert damage["detail"] == "epoch 1 is followed by 3"


def test_damage_of_the_log_is_exit_code_7(run, directory):
    """H28: an entry that is missing in a node's log is named by its key."""
    filled(directory / "log", last=9)
    assert run("verify", directory).code == 0
    key = b"journal\0" + (5).to_bytes(8, "big")
    with Raw(directory / "log") as raw:
        raw.delete("entries", key)
    result = run("verify", directory, "--json")
    assert result.code == 7
    assert [(damage["kind"], damage["key"]) for damage in result.json["damages"]] == [("missing-entry", key.hex())]


def test_damage_of_the_write_ahead_log_is_exit_code_7(run, directory):
    """H28, F10: a byte of a node's write-ahead log that rots is named with its file."""
    filled(directory / "log", last=9)
    with (directory / "log" / "wal").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    result = run("verify", directory, "--json")
    assert result.code == 7
    assert [(damage["kind"], damage["file"]) for damage in result.json["damages"]] == [("log", "log/wal")]


def test_no_directory(run, tmp_path):
    """Nothing there is 10; something else is 11; a directory in use is 5."""
    assert run("verify", tmp_path / "nothing").code == 10
    (tmp_path / "file").write_text("x")
    assert run("verify", tmp_path).code == 11
    with srengine.open(tmp_path / "data"):
        assert run("verify", tmp_path / "data", "--json").json["error"]["code"] == "ALREADY_OPEN"


def test_bench_without_benchmarks(run, monkeypatch, tmp_path):
    """An installation without the benchmarks says where they are to be found."""
    monkeypatch.setattr(srengine, "__file__", str(tmp_path / "srengine" / "__init__.py"))
    result = run("bench", "--json")
    assert result.code == 10
    assert "checkout" in result.json["error"]["message"]


def test_bench_runs_what_is_there(run, monkeypatch, tmp_path):
    """NAME and the size are handed on; the table is the result as text, its figures as JSON."""
    suite = tmp_path / "benchmarks"
    suite.mkdir()
    (suite / "__main__.py").write_text(
        "import sys, json\n"
        "print('the table')\n"
        "out = next(word for word in sys.argv if word.startswith('--json='))[7:]\n"
        "json.dump({'arguments': [word for word in sys.argv[1:] if not word.startswith('--json=')]}, open(out, 'w'))\n"
        "sys.exit(5 if 'nothing' in sys.argv else 2 if 'broken' in sys.argv else 0)\n"
    )
    monkeypatch.setattr(bench, "benchmarks_directory", lambda: suite)
    result = run("bench", "write", "--quick", "--json")
    assert result.code == 0, result.errors
    assert result.json == {"arguments": ["--quick", "-k", "write"]}
    assert result.errors == "the table\n"
    assert run("bench").text == "the table\n"
    assert run("bench", "broken").code == 1
    assert run("bench", "nothing", "--json").json["error"]["code"] == "NOT_FOUND"
