"""The role of a node as a machine: what the election says is turned into transitions, one at a time, in order.

::

    Observed ──► queue ──► TRANSITIONS[role, observed role] ──► steps, each with a time-out ──► role

    PROMOTE     FENCE  REPLAY  EXECUTE ...  OPEN      then, and only then, the role is LEADER
    DEMOTE      CLOSE  DRAIN   EXECUTE ...  DROP      admission is closed from the first moment
    NON_LEADER  EXECUTE ...
    NOTHING     the event is dropped

An election says who leads; that is not enough to act. *Promotion* inserts an epoch (fencing), applies everything that
the journal held by then (replay), runs the registered executions in their order, and opens admission. *Demotion* stays
in the process: admission closes, what was admitted ends, executions run, the leader's memory is dropped.

Invariants:

1. One transition at a time, events in order. The same role again is dropped; leading again in another term is a
   demotion and a promotion, because the epoch is another one.
2. LEADER is reached only through FENCE that succeeded for the term that is led now.
3. A promotion is given up as soon as an event behind it says that the node does not lead that term any more. What it
   did so far is undone by CLOSE, DRAIN, the executions once more if they had begun, and DROP.
4. A promotion that fails or overruns makes the node resign, or ends the process (`Policy`). A demotion that fails or
   overruns ends the process: a half demoted leader is worse than a dead one.
5. Ending the process is final: nothing is run behind it.

What it does not do: it elects nobody and knows no backend; it waits for nothing itself. The service is roles.py.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from srengine.ha.protocol import Observed, Role

EVENTS_MAX: Final = 1024
"""Events that wait. When more come, they flap faster than transitions end: only the last one matters then."""


class Action(enum.Enum):
    """What a pair of roles means."""

    NOTHING = "nothing"
    PROMOTE = "promote"
    NON_LEADER = "follow"
    DEMOTE = "demote"


_N, _P, _F, _D = Action.NOTHING, Action.PROMOTE, Action.NON_LEADER, Action.DEMOTE
_COLUMNS: Final = (Role.INIT, Role.FOLLOWER, Role.LEADER, Role.OBSERVER, Role.UNKNOWN)
_ROWS: Final[dict[Role, tuple[Action, Action, Action, Action, Action]]] = {
    # from \ observed  INIT FOLLOWER LEADER OBSERVER UNKNOWN
    Role.INIT: (_N, _F, _P, _F, _N),
    Role.FOLLOWER: (_N, _N, _P, _N, _F),
    Role.LEADER: (_N, _D, _N, _D, _D),
    Role.OBSERVER: (_N, _N, _N, _N, _F),
    Role.UNKNOWN: (_N, _F, _P, _F, _N),
}
TRANSITIONS: Final[dict[tuple[Role, Role], Action]] = {
    (before, after): action for before, row in _ROWS.items() for after, action in zip(_COLUMNS, row, strict=True)
}
"""For each role and each observed one. FOLLOWER and OBSERVER meet by way of UNKNOWN alone."""


class Step(enum.Enum):
    """A part of a transition."""

    DELAY = "delay"
    """Waited out by the machine itself, when the options say so; what happens meanwhile counts."""
    FENCE = "fence"
    REPLAY = "replay"
    EXECUTE = "execute"
    OPEN = "open"
    CLOSE = "close"
    DRAIN = "drain"
    DROP = "drop"


class Policy(enum.Enum):
    """What to do instead of leading."""

    DEMOTE = "demote"
    EXIT = "exit"


class OnFailure(enum.Enum):
    """What the failure of an execution means."""

    ABORT = "abort"
    """The executions behind it are left out, and a promotion or demotion has failed."""
    CONTINUE = "continue"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class Execution:
    """A registered execution; the service knows what to call by its name."""

    name: str
    on_failure: OnFailure = OnFailure.ABORT
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class RoleOptions:
    """Time-outs of steps in seconds, and policies.

    ``promotion``: what a promotion that fails does; ``demotion``: whether a leader that is one no more stays in the
    process. ``delay_s``: what the election says must stand for so long before a transition begins; 0: not at all. A
    demotion never waits.
    """

    promotion: Policy = Policy.DEMOTE
    demotion: Policy = Policy.DEMOTE
    fence_s: float = 30.0
    replay_s: float = 60.0
    open_s: float = 10.0
    close_s: float = 5.0
    drain_s: float = 10.0
    drop_s: float = 10.0
    delay_s: float = 0.0

    def timeout_s(self, step: Step, execution: Execution | None) -> float:
        """Return how long a step may take."""
        if execution is not None:
            return execution.timeout_s
        return {
            Step.DELAY: self.delay_s,
            Step.FENCE: self.fence_s,
            Step.REPLAY: self.replay_s,
            Step.OPEN: self.open_s,
            Step.CLOSE: self.close_s,
            Step.DRAIN: self.drain_s,
            Step.DROP: self.drop_s,
        }[step]


# --- what goes in and what comes out
# -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """The step of this token ended; ``failure`` is empty when it did what it should."""

    token: int
    failure: str = ""


Input = Observed | Ended


@dataclass(frozen=True, slots=True)
class Run:
    """Begin this step; answer with `Ended`. ``source`` and ``target``: the transition that it belongs to."""

    token: int
    step: Step
    source: Role
    target: Role
    term: int
    execution: str = ""


@dataclass(frozen=True, slots=True)
class Transition:
    """One transition that ended. ``target``: the role now. ``failure``: a promotion that came to nothing, and then
    ``target`` is what ``source`` was; or what an execution said.
    """

    source: Role
    target: Role
    term: int
    leader: str | None
    reason: str
    seconds: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Effects:
    """What to do, in this order. ``cancel``: the token of a step whose end does not matter any more. ``resign``: give
    up the leadership. ``exit``: end the process.
    """

    cancel: tuple[int, ...] = ()
    transitions: tuple[Transition, ...] = ()
    resign: str | None = None
    exit: str | None = None
    run: Run | None = None
    dropped: int = 0


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Going:
    """The transition that runs. ``waiting``: steps behind the running one. ``token`` and ``deadline``: of that one.
    ``failure``: why it is undone (a promotion), or what an execution said.
    """

    action: Action
    event: Observed
    source: Role
    began: float
    waiting: deque[tuple[Step, Execution | None]]
    step: Step = Step.EXECUTE
    execution: Execution | None = None
    token: int = 0
    deadline: float = 0.0
    undoing: bool = False
    failure: str = ""


@dataclass(slots=True)
class _Out:
    cancel: list[int] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    resign: str | None = None
    exit: str | None = None
    run: Run | None = None
    dropped: int = 0


class RoleMachine:
    """The role of one node.

    ``role``: as of the last transition that ended. ``term``: of the election that made it. ``admitting``: whether this
    node may act as leader now; never true outside LEADER but between the end of OPEN and the end of the promotion.
    """

    def __init__(self, options: RoleOptions, executions: Sequence[Execution] = (), *, now: float = 0.0) -> None:
        self.role = Role.INIT
        self.term = 0
        self.admitting = False
        self.options = options
        self._executions = tuple(executions)
        self._now = now
        self._events: deque[Observed] = deque()
        self._going: _Going | None = None
        self._tokens = 0
        self._over = False
        self._out = _Out()

    @property
    def going(self) -> tuple[Step, str] | None:
        """The step that runs and, of an execution, its name; None when nothing does."""
        going = self._going
        if going is None:
            return None
        return going.step, "" if going.execution is None else going.execution.name

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return len(self._events)

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None: never."""
        return None if self._going is None or self._over else self._going.deadline

    def step(self, message: Input) -> None:
        """Take an event of the election, or the end of a step."""
        if self._over:
            return
        match message:
            case Observed():
                self._observed(message)
            case Ended():
                going = self._going
                if going is not None and going.token == message.token:
                    self._ended(going, message.failure)
        self._maybe_begin()

    def tick(self, now: float) -> None:
        """Tell the time."""
        assert now >= self._now, (now, self._now)
        self._now = now
        going = self._going
        if going is not None and not self._over and now >= going.deadline:
            if going.step is Step.DELAY:
                self._next(going)
            else:
                self._out.cancel.append(going.token)
                self._ended(going, f"{going.step.value} overran its time")
            self._maybe_begin()

    def drain(self) -> Effects:
        """Return what is to be done since the last call."""
        out, self._out = self._out, _Out()
        run = None if out.exit is not None else out.run
        return Effects(tuple(out.cancel), tuple(out.transitions), out.resign, out.exit, run, out.dropped)

    # --- events ------------------------------------------------------------------------------------------------------

    def _observed(self, event: Observed) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and (last.role, last.term) == (event.role, event.term):
            self._out.dropped += 1
            return
        if len(self._events) >= EVENTS_MAX:
            self._out.dropped += len(self._events)
            self._events.clear()
            self._events.append(Observed(Role.UNKNOWN, None, event.term, "too many changes"))
        self._events.append(event)
        going = self._going
        if going is not None and going.step is Step.DELAY:
            # Nothing was begun: what the election says now takes its place.
            if (event.role, event.term) == (going.event.role, going.event.term):
                self._events.pop()
                self._out.dropped += 1
            else:
                self._going = None
            return
        if going is None or going.action is not Action.PROMOTE or going.undoing:
            return
        if (event.role, event.term) == (Role.LEADER, going.event.term):
            return
        self._out.cancel.append(going.token)
        self._undo(going, f"superseded: {event.role.value} in term {event.term}")

    def _maybe_begin(self) -> None:
        """Take events off the queue until one has something to wait for."""
        while self._going is None and self._events and not self._over:
            event = self._events.popleft()
            action = TRANSITIONS[self.role, event.role]
            if self.role is event.role is Role.LEADER and event.term != self.term:
                self._events.appendleft(event)
                event = Observed(Role.FOLLOWER, event.leader, event.term, "elected again in another term")
                action = Action.DEMOTE
            if action is Action.NOTHING:
                self._out.dropped += 1
                continue
            if action is Action.DEMOTE and self.options.demotion is Policy.EXIT:
                self.admitting = False
                self._exit(
                    f"this node leads no more (now {event.role.value}: {event.reason}), and the option says exit"
                )
                return
            self._begin(action, event)

    def _begin(self, action: Action, event: Observed) -> None:
        executions: list[tuple[Step, Execution | None]] = [(Step.EXECUTE, each) for each in self._executions]
        steps = {
            Action.PROMOTE: [(Step.FENCE, None), (Step.REPLAY, None), *executions, (Step.OPEN, None)],
            Action.DEMOTE: [(Step.CLOSE, None), (Step.DRAIN, None), *executions, (Step.DROP, None)],
            Action.NON_LEADER: executions,
        }[action]
        if action is Action.DEMOTE:
            self.admitting = False
        elif self.options.delay_s > 0:
            steps = [(Step.DELAY, None), *steps]
        self._going = _Going(action, event, self.role, self._now, deque(steps))
        self._next(self._going)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _next(self, going: _Going) -> None:
        """Begin the next step, or end the transition."""
        if not going.waiting:
            self._finish(going)
            return
        going.step, going.execution = going.waiting.popleft()
        self._tokens += 1
        going.token = self._tokens
        going.deadline = self._now + self.options.timeout_s(going.step, going.execution)
        if going.step is Step.DELAY:
            return
        self._out.run = Run(
            going.token,
            going.step,
            going.event.role if going.undoing else going.source,
            going.source if going.undoing else going.event.role,
            going.event.term,
            "" if going.execution is None else going.execution.name,
        )

    def _ended(self, going: _Going, failure: str) -> None:
        if not failure:
            if going.step is Step.OPEN:
                self.admitting = True
            self._next(going)
            return
        if going.execution is not None:
            failure = f"{going.execution.name}: {failure}"
            match going.execution.on_failure:
                case OnFailure.CONTINUE:
                    going.failure = going.failure or failure
                    self._next(going)
                    return
                case OnFailure.EXIT:
                    self._exit(failure)
                    return
                case OnFailure.ABORT:
                    if going.action is Action.NON_LEADER:
                        going.failure = failure
                        going.waiting.clear()
                        self._next(going)
                        return
        if going.action is Action.PROMOTE and not going.undoing:
            if self.options.promotion is Policy.EXIT:
                self._exit(f"the promotion failed at {going.step.value}: {failure}")
                return
            self._out.resign = failure
            self._undo(going, failure)
            return
        self._exit(f"the demotion failed at {going.step.value}: {failure}")

    def _undo(self, going: _Going, failure: str) -> None:
        """Take back what a promotion did so far."""
        self.admitting = False
        executions: list[tuple[Step, Execution | None]] = []
        if going.step in {Step.EXECUTE, Step.OPEN}:
            executions = [(Step.EXECUTE, each) for each in self._executions]
        going.undoing = True
        going.failure = failure
        going.waiting = deque([(Step.CLOSE, None), (Step.DRAIN, None), *executions, (Step.DROP, None)])
        self._next(going)

    def _finish(self, going: _Going) -> None:
        event = going.event
        if not going.undoing:
            self.role, self.term = event.role, event.term
        self._out.transitions.append(
            Transition(
                going.source,
                self.role,
                event.term,
                event.leader,
                event.reason,
                self._now - going.began,
                going.failure,
            )
        )
        self._going = None

    def _exit(self, reason: str) -> None:
        self.admitting = False
        self._over = True
        self._out.exit = reason


def drawn() -> str:
    """Return the table of transitions as it stands in docs/ha.md."""
    names = [role.value for role in _COLUMNS]
    lines = ["| from \\ observed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for before in _COLUMNS:
        cells = [TRANSITIONS[before, after] for after in _COLUMNS]
        words = ["-" if action is Action.NOTHING else action.value for action in cells]
        lines.append(f"| {before.value} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"
