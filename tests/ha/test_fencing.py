"""Fencing: each status, each retry, each delay."""

from __future__ import annotations

import asyncio
import logging

import pytest

from srengine import errors
from srengine.ha.fencing import FencingOptions, fence
from srengine.ha.protocol import Fencing
from srengine.metrics import Metrics

S, K, E = Fencing.SUCCESS, Fencing.KEYEXIST, Fencing.ERROR


class Backend:
    """Answers tries from a script; an exception is raised."""

    def __init__(self, script) -> None:
        self.script = list(script)
        self.tries = 0
        self.slept: list[float] = []
        self.metrics = Metrics()

    async def try_fence(self) -> Fencing:
        self.tries += 1
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def run(self, **options) -> bool:
        return asyncio.run(fence(self.try_fence, FencingOptions(**options), metrics=self.metrics, sleep=self.sleep))


@pytest.mark.parametrize(
    ("script", "won", "tries"),
    [
        ([S], True, 1),
        ([K], False, 1),
        ([E, E, E], False, 3),
        ([E, S], True, 2),
        ([E, E, S], True, 3),
        ([E, K], False, 2),
        ([errors.NoQuorum("nobody"), errors.TimedOut("late"), S], True, 3),
        ([errors.Unreachable("x"), E, errors.NoQuorum("y")], False, 3),
    ],
)
def test_each_status(script, won, tries):
    """B02, B03: SUCCESS is true, KEYEXIST false at once, ERROR (or a refusal) is tried again, three times in all."""
    backend = Backend(script)
    assert backend.run() is won
    assert backend.tries == tries
    assert backend.slept == [2.0] * (tries - 1)


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({}, [2.0, 2.0]),
        ({"tries": 1}, []),
        ({"tries": 5, "delay_s": 0.25}, [0.25] * 4),
        ({"tries": 5, "exponential": True}, [2.0, 4.0, 8.0, 16.0]),
        ({"tries": 5, "exponential": True, "delay_s_max": 5.0}, [2.0, 4.0, 5.0, 5.0]),
        ({"tries": 3, "delay_s": 0.0}, []),
    ],
)
def test_delays_are_those_of_the_options(options, delays, caplog):
    """B03, H19: fixed by default, doubled by option; what was logged is what was slept."""
    backend = Backend([E] * 5)
    with caplog.at_level(logging.INFO):
        assert backend.run(**options) is False
    assert backend.slept == delays
    assert [record.delay_s for record in caplog.records if record.delay_s] == delays


def test_one_line_and_one_count_for_each_try(caplog):
    """B24, B25: every try is one structured line, and the counters are equal to what happened."""
    backend = Backend([E, errors.NoQuorum("nobody"), S])
    with caplog.at_level(logging.INFO):
        backend.run()
    lines = [(record.event, record.attempt, record.status, record.reason) for record in caplog.records]
    assert lines == [
        ("fencing", 1, "ERROR", ""),
        ("fencing", 2, "ERROR", "NO_QUORUM: nobody"),
        ("fencing", 3, "SUCCESS", ""),
    ]
    assert backend.metrics.value("srengine_ha_fencing_total", status="ERROR") == 2
    assert backend.metrics.value("srengine_ha_fencing_total", status="SUCCESS") == 1
    assert backend.metrics.value("srengine_ha_fencing_total", status="KEYEXIST") == 0


@pytest.mark.parametrize("options", [{"tries": 0}, {"delay_s": -1.0}, {"delay_s": 90.0}])
def test_options_that_make_no_sense(options):
    """Nothing is silently put right."""
    with pytest.raises(errors.InvalidValue):
        FencingOptions(**options)


def test_a_mistake_of_ours_is_no_error_status():
    """Only the world's errors are tried again."""
    with pytest.raises(ZeroDivisionError):
        Backend([ZeroDivisionError()]).run()
