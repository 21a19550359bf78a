"""Failpoints: off unless armed, and exact about which hit acts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from srengine import failpoints

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_happens_unless_armed():
    for _ in range(3):
        failpoints.hit("a.point")


def test_the_named_hit_acts_and_no_other():
    with failpoints.armed("a=error@2, b=full"):
        failpoints.hit("a")
        with pytest.raises(OSError, match="failpoint a"):
            failpoints.hit("a")
        failpoints.hit("a")
        with pytest.raises(OSError, match="failpoint b") as caught:
            failpoints.hit("b")
        assert caught.value.errno == 28
    failpoints.hit("b")


@pytest.mark.parametrize("text", ["a", "a=explode", "=kill", "a=kill@x", "a=kill@-1"])
def test_a_plan_that_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError, match="name=action"), failpoints.armed(text):
        pass


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit", 86)])
def test_the_environment_arms_a_process(action, code):
    died = subprocess.run(
        [sys.executable, "-c", "from srengine import failpoints\nwhile True: failpoints.hit('p')"],
        env=os.environ | {"SRENGINE_FAILPOINTS": f"p={action}@3", "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert died.returncode == code


def test_a_thread_is_held_while_the_file_is_there(tmp_path, monkeypatch):
    """``hold``: from its hit on, the thread stands still while the file is there, and goes on when it is gone."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("SRENGINE_FAILPOINTS_HOLD", str(gate))
    passed = []

    def hit_often() -> None:
        for number in range(4):
            failpoints.hit("p")
            passed.append(number)

    with failpoints.armed("p=hold@2"):
        hit_often()
        assert passed == [0, 1, 2, 3]
        passed.clear()
        gate.touch()
        thread = threading.Thread(target=hit_often)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert passed == []
        gate.unlink()
        thread.join(60)
        assert passed == [0, 1, 2, 3]
