"""One timer for many deadlines."""

from __future__ import annotations

import asyncio

from srengine.alarm import Alarm


class Clocked:
    """An event loop's time and timers, moved by hand."""

    def __init__(self):
        self.now = 0.0
        self.timers = []
        self.made = 0

    def time(self):
        return self.now

    def call_at(self, when, call):
        timer = Timer(when, call)
        self.timers.append(timer)
        self.made += 1
        return timer

    def move(self, now):
        self.now = now
        due, self.timers = (
            [timer for timer in self.timers if timer.when <= now],
            [timer for timer in self.timers if timer.when > now],
        )
        for timer in due:
            if not timer.cancelled:
                timer.call()


class Timer:
    def __init__(self, when, call):
        self.when, self.call, self.cancelled = when, call, False

    def cancel(self):
        self.cancelled = True


def test_it_rings_at_the_earliest_deadline_and_then_at_the_next():
    """An earlier deadline takes the timer's place, a later one does not; what `look` leaves is rung for."""
    loop, rung = Clocked(), []
    left = {}

    def look(now):
        rung.append(now)
        for deadline in [deadline for deadline in left if deadline <= now]:
            del left[deadline]
        return min(left, default=float("inf"))

    alarm = Alarm(loop, look)
    for deadline in (5.0, 7.0, 3.0, 9.0):
        left[deadline] = True
        alarm.at(deadline)
    assert [timer.when for timer in loop.timers if not timer.cancelled] == [3.0]
    for now in (2.9, 3.0, 5.0, 6.0, 7.0, 9.5, 20.0):
        loop.move(now)
    assert rung == [3.0, 5.0, 7.0, 9.5]
    assert not left
    assert not [timer for timer in loop.timers if not timer.cancelled]


def test_many_requests_share_a_timer():
    """What ends before its deadline makes no timer: a thousand requests, each with a later one, have two."""
    loop = Clocked()
    waiting = []
    alarm = Alarm(loop, lambda now: min((deadline for deadline in waiting if deadline > now), default=float("inf")))
    for number in range(1000):
        loop.now = number / 100
        waiting[:] = [loop.now + 10]
        alarm.at(loop.now + 10)
    loop.move(10.0)
    assert loop.made == 2
    assert [timer.when for timer in loop.timers] == waiting


def test_a_cancelled_one_rings_no_more():
    """Until it is told again."""

    async def run():
        rung = asyncio.Event()

        def look(_):
            rung.set()
            return float("inf")

        loop = asyncio.get_running_loop()
        alarm = Alarm(loop, look)
        alarm.at(loop.time())
        alarm.cancel()
        alarm.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not rung.is_set()
        alarm.at(loop.time())
        async with asyncio.timeout(10):
            await rung.wait()

    asyncio.run(run())
