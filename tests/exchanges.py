"""Two tablets and an exchange between them, message by message."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager

from srengine import errors
from srengine.storage import Tablet
from srengine.storage.merkle import Leaves, Moment
from srengine.sync.exchange_machine import Initiator, Outcome, Responder


class TabletSide:
    """A tablet as the machine sees it."""

    def __init__(self, tablet: Tablet, leaves: Leaves | None = None) -> None:
        self.tablet = tablet
        self.leaves = leaves or tablet.leaves

    @property
    def place(self) -> tuple[bytes, int, int]:
        position = self.tablet.position
        return position.root, position.count, position.sequence

    def stands_at(self, where: bytes) -> bool:
        return self.tablet.stands_at(where)

    def moment(self, *, recount: bool = False) -> AbstractContextManager[Moment]:
        return self.leaves.moment(recount=recount)


def exchange(here, there, seed: int = 1, *, between=None, **options) -> Outcome:
    """Make ``here`` equal to ``there``; ``between`` is called before each request reaches it."""
    one = here if isinstance(here, TabletSide) else TabletSide(here)
    initiator = Initiator("t", one, random.Random(seed), **options)
    initiator.start()
    return drive(one, there, initiator=initiator, between=between)


def drive(here, there, *, initiator=None, between=None) -> Outcome:
    """Do what an initiator wants until there is an outcome; without one, begin an exchange."""
    if initiator is None:
        return exchange(here, there, between=between)
    one = here if isinstance(here, TabletSide) else TabletSide(here)
    responder = Responder(there if isinstance(there, TabletSide) else TabletSide(there))
    while True:
        effects = initiator.drain()
        if effects.outcome is not None:
            return effects.outcome
        if effects.announce is not None:
            responder.step(effects.announce.message)
            initiator.announced()
        elif effects.send is not None:
            if between is not None:
                between()
            initiator.step(*responder.step(effects.send.message))
        elif effects.apply is not None:
            work = effects.apply
            try:
                one.tablet.repair(
                    work.rows,
                    work.removed,
                    work.meta,
                    work.state,
                    replace_rows=work.replace_rows,
                    base=work.base,
                    actual=work.actual,
                )
            except errors.Diverged:
                initiator.applied(proved=False)
            else:
                initiator.applied(proved=True)
