"""Every way out of a command: one exit code, one sentence on stderr, or one JSON object on stdout."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from srengine import errors
from srengine.cli import application, settings
from tests.client.fake import ADDRESSES

T = "shop.orders"
INTERFACE = {
    1: [errors.Error, errors.UnsafePermissions, errors.ViewExpired, errors.Closed],
    2: [errors.UsageError],
    3: [errors.Unreachable],
    4: [errors.NoQuorum, errors.NoLeader, errors.NotReady, errors.NotLeader],
    5: [errors.Conflict, errors.StaleEpoch, errors.AlreadyOpen, errors.ForeignData, errors.Diverged,
        errors.TabletFenced],
    6: [errors.NotAuthenticated, errors.Denied],
    7: [errors.CorruptionError, errors.TruncatedTablet, errors.SnapshotDamaged],
    8: [errors.DiskFull, errors.QuotaExceeded],
    9: [errors.TimedOut],
    10: [errors.NotFound],
    11: [errors.InvalidValue, errors.FrameError, errors.SchemaMismatch],
    12: [errors.Removed],
    13: [errors.MasterState],
}  # fmt: skip


@pytest.mark.parametrize(("code", "kind"), [(code, kind) for code, kinds in INTERFACE.items() for kind in kinds])
def test_exit_codes(cluster, run, monkeypatch, code, kind):
    """Each class of errors ends a command with its exit code, its code and facts as JSON, a sentence as text."""

    def fail(self):
        raise kind("a sentence", fact=7)

    monkeypatch.setattr(settings.Settings, "connect", fail)
    as_text = run("status")
    assert (as_text.code, as_text.text) == (code, "")
    assert as_text.errors == f"srengine: a sentence ({kind.code})\n"
    for form in ("json", "jsonl"):
        as_json = run("status", "-o", form)
        assert (as_json.code, as_json.errors) == (code, "")
        error = as_json.json["error"]
        assert (error["code"], error["message"], error["details"]) == (kind.code, "a sentence", {"fact": 7})


def test_every_class_has_a_meaning():
    """No class of errors.py has an exit code outside the table."""
    seen = [errors.Error]
    for kind in seen:
        seen += kind.__subclasses__()
    assert {kind.exit_code for kind in seen} <= set(INTERFACE)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), 8),
        (OSError(errno.EDQUOT, "Quota exceeded"), 8),
        (FileNotFoundError(errno.ENOENT, "No such file", "f"), 10),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (click.ClickException("no"), 1),
        (click.BadParameter("no"), 2),
    ],
)
def test_other_failures(cluster, run, monkeypatch, failure, code):
    """What the system refuses and what the user interrupts have exit codes, too."""

    def fail(self):
        raise failure

    monkeypatch.setattr(settings.Settings, "connect", fail)
    result = run("status", "--json")
    assert result.code == code
    assert set(result.json["error"]) >= {"code", "message", "details"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["get"],
        ["get", T],
        ["get", T, "k", "more"],
        ["get", T, "k", "--nonsense"],
        ["get", T, "k", "--consistency", "strong"],
        ["put", T, "k"],
        ["scan", T, "--limit", "-1"],
        ["--timeout", "0", "status"],
        ["--timeout", "soon", "status"],
        ["db"],
        ["table", "nonsense"],
        ["export", T, "file.csv"],
        ["dev", "--nodes", "0"],
        ["demo", "--records", "1"],
    ],
)
def test_usage(cluster, run, arguments):
    """What cannot be understood is exit code 2 before anything is asked, in both forms."""
    assert run(*arguments).code == 2
    as_json = run(*arguments, "-o", "json")
    assert as_json.code == 2
    assert as_json.json["error"]["code"] == "USAGE"
    assert cluster.log == []


def test_nearest_command(run):
    """An unknown command is answered with the nearest."""
    assert "did you mean 'status'" in run("statsu").errors
    assert "did you mean 'create'" in run("db", "creat").errors


def test_bad_endpoint_is_usage(run):
    """An endpoint that is none is a mistake of the command line."""
    for arguments in (["--endpoint", "nowhere", "status"], ["status", "--endpoint", "tcp://a:1,b"]):
        assert run(*arguments).code == 2


def test_nobody_there(run, monkeypatch):
    """Nobody at the endpoint: exit code 3 within the time-out, over the real network stack."""
    result = run("--endpoint", "tcp://127.0.0.1:1", "--timeout", "0.5", "status", "--json")
    assert result.code == 3
    assert result.json["error"]["details"]["endpoints"] == ["tcp://127.0.0.1:1"]


def test_options_before_and_after(cluster, run, monkeypatch):
    """Global options stand before or after the command; option beats environment beats context."""
    cluster.down = {ADDRESSES[1]}
    assert run("--endpoint", ADDRESSES[0], "db", "list").code == 0
    assert run("db", "list", "--endpoint", ADDRESSES[0]).code == 0
    assert run("db", "list", "--endpoint", ADDRESSES[1], "--timeout", "0.2").code == 3
    monkeypatch.setenv("SRENGINE_ENDPOINT", ADDRESSES[1])
    monkeypatch.setenv("SRENGINE_TIMEOUT", "0.2")
    assert run("db", "list").code == 3
    assert run("db", "list", "--endpoint", ADDRESSES[0]).code == 0


def test_contexts(cluster, run, monkeypatch, tmp_path):
    """A context fills what is not said; unknown contexts and keys are usage errors that suggest the nearest."""
    monkeypatch.setenv("SRENGINE_CONFIG_HOME", str(tmp_path))
    assert run("--context", "prod", "db", "list").code == 2
    cluster.down = {ADDRESSES[1]}
    (tmp_path / "contexts.toml").write_text(
        f'[prod]\nendpoint = "{ADDRESSES[1]}"\ntimeout = 0.2\n[odd]\nendpont = "x"\n[wrong]\ntimeout = "soon"\n'
    )
    assert run("--context", "prod", "db", "list").code == 3
    assert run("--context", "prod", "--endpoint", ADDRESSES[0], "db", "list").code == 0
    unknown = run("--context", "prdo", "db", "list")
    assert (unknown.code, "did you mean 'prod'" in unknown.errors) == (2, True)
    odd = run("--context", "odd", "db", "list")
    assert (odd.code, "did you mean 'endpoint'" in odd.errors) == (2, True)
    assert run("--context", "wrong", "db", "list").code == 2
    (tmp_path / "contexts.toml").write_text("no toml")
    assert run("--context", "prod", "db", "list").code == 2


def test_error_in_the_middle_of_json(cluster, run):
    """With json, stdout holds one document even when a scan fails midway; with jsonl the error is the last line."""
    cluster.put_directly(T, {b"k%02d" % number: b"v" for number in range(40)})

    def after(count):
        cluster.log.clear()
        cluster.faults[ADDRESSES[0]] = [None] * count + [errors.CorruptionError("damaged")] * 100

    after(6)
    assert run("scan", T, "--json").json["error"]["code"] == "CORRUPTION"
    after(6)
    lines = run("scan", T, "-o", "jsonl").lines
    assert lines[0]["key"] == "k00"
    assert lines[-1]["error"]["code"] == "CORRUPTION"


def _commands():
    def walk(command, path):
        yield path
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk(command.get_command(context, name), [*path, name])

    return list(walk(application.root, []))


@pytest.mark.parametrize("path", _commands(), ids=" ".join)
def test_help(run, path):
    """Every command explains itself with --help and takes -o; nothing is asked."""
    result = run(*path, "--help")
    assert result.code == 0
    assert "Usage: srengine" in result.text
    assert "--output" in result.text or len(path) == 1
    assert re.search(r"\n  [A-Z]", result.text)


def test_version(run):
    """--version names the version and the LMDB that was compiled in."""
    assert re.fullmatch(r"srengine \d+\.\d+\.\d+\S* \(LMDB .*\)\n", run("--version").text)


def test_version_tells_system_libraries(run, monkeypatch):
    """A build on the system's unpatched libraries says so."""
    from srengine._native import build_info

    monkeypatch.setattr(build_info, "SYSTEM_LIBS", True)
    assert "system's library, unpatched" in run("--version").text


def test_python_m(tmp_path):
    """The module is the same command; a closed pipe is no traceback."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "srengine", "--version"], capture_output=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"srengine ")
    failed = subprocess.run(
        [sys.executable, "-m", "srengine", "get", "--json"], capture_output=True, cwd=tmp_path, env=environment
    )
    assert failed.returncode == 2
    assert json.loads(failed.stdout)["error"]["code"] == "USAGE"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody_reads:
        broken = subprocess.run(
            [sys.executable, "-m", "srengine", "db", "list", "--endpoint", "tcp://127.0.0.1:1", "--timeout", "0.1",
             "--json"], stdout=nobody_reads, stderr=subprocess.PIPE, cwd=tmp_path, env=environment,
        )  # fmt: skip
    assert b"Traceback" not in broken.stderr


def test_interrupt(tmp_path):
    """Ctrl-C while waiting for a cluster: exit code 130, no traceback."""
    program = (
        "import os, signal, threading\n"
        "from srengine.cli import main\n"
        "threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "main(['status', '--endpoint', 'tcp://127.0.0.1:1', '--timeout', '60', '--json'])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=50,
    )  # fmt: skip
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"]["code"] == "INTERRUPTED"
    assert b"Traceback" not in done.stderr
