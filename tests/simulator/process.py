"""One run of a node: the driver of its machines, as `effects` demands it, and the service above them.

Turn of the loop: take what arrived, tick, step, drain; *persist* in one transaction; `Persisted`, *send*; *apply*
later, in order. A process can end between any two of these (`crash_point`); a stopped one does nothing until it goes
on.

The service is what `ha/` does with a group: a new leader waits for the first entry of its term to be applied, fences
(epoch = newest + 1), and serves only then; every command carries the epoch; what was accepted is answered when an entry
is applied at its index, and is this one exactly when the terms are equal.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from srengine.consensus.effects import (
    Applied,
    Effects,
    Hint,
    Input,
    Installed,
    InstallFailed,
    InstallState,
    Persisted,
    Propose,
    Read,
    Received,
    Role,
    StepDown,
    Transfer,
    Trimmed,
    Trust,
    Why,
)
from srengine.consensus.entries import Configuration, Entry, Floor
from srengine.consensus.messages import Append
from srengine.types import NodeId
from tests.simulator.disk import Transaction
from tests.simulator.registers import Command, Outcome, Result, Verb, encode

if TYPE_CHECKING:
    from tests.simulator.host import Host
    from tests.simulator.world import World

Reply = Callable[[Outcome | None], None]
"""Called with the outcome, or None when nothing of it happened or that is not known."""


class Gone(Exception):
    """The process ended in the middle of something."""


class Run:
    """One group in one run of a node."""

    def __init__(self, group: str, machine: Any) -> None:
        self.group = group
        self.machine = machine
        self.role = Role.FOLLOWER
        self.leader: NodeId | None = None
        self.leading_term = 0
        """The term that this node leads, 0 when it does not."""
        self.fenced_term = 0
        """The term for which fencing was begun."""
        self.epoch = 0
        """The epoch that this node acts for; 0 when it owns none."""
        self.asked: dict[int, Callable[[tuple[int, int] | None, Why | None], None]] = {}
        """By token: who proposed; told the place (index, term) or why there is none."""
        self.waiting: dict[int, list[tuple[int, Reply]]] = {}
        """By index: term, and who waits for what is applied there."""
        self.proposed: list[Configuration] = []
        self.reading: dict[int, Callable[[int], None]] = {}
        self.readers: list[tuple[int, Callable[[], None]]] = []
        """Index that must be applied, and what to do then."""
        self.committed: deque[Entry] = deque()
        self.behind: list[Effects] = []
        """What was drained while it was being written."""
        self.applying = False
        self.installing = False


class Process:
    """``host``: where it runs. Dead for ever once ``gone``."""

    def __init__(self, host: Host, world: World) -> None:
        self.host = host
        self.world = world
        self.id = host.id
        self.gone = False
        self.paused = False
        self._writing: set[str] = set()
        """Groups whose part is being written, or waits for it: they take no input."""
        self._held: list[tuple[Run, Effects]] = []
        self._under_way: list[tuple[Run, Effects]] = []
        self._inbox: list[tuple[str, Input | Callable[[], Input | None]]] = []
        self._deferred: list[Callable[[], None]] = []
        self._wake_timer: Any = None
        self._alarm: Any = None
        self._tokens = 0
        self._source = random.Random(f"{world.seed} {self.id} {host.disk.image.boot}")
        self.runs: dict[str, Run] = {}
        for group in world.groups:
            self.runs[group] = Run(group, world.open_machine(self, group))
        self.later(self._source.random() * 0.02, self._claims)
        self._wake()

    # --- time --------------------------------------------------------------------------------------------------------

    def guarded(self, action: Callable[[], None]) -> None:
        """Do ``action`` unless the process is gone; after CONT if it is stopped."""
        if self.gone:
            return
        if self.paused:
            self._deferred.append(action)
            return
        try:
            action()
        except Gone:
            assert self.gone

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do it after a time, if the process lives then."""
        self.world.schedule.after(delay_s, lambda: self.guarded(action))

    def stop(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def go_on(self) -> None:
        """SIGCONT: what arrived or came due meanwhile is done now."""
        self.paused = False
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            self.guarded(action)
        if not self.gone:
            self._wake()

    def crash_point(self, stage: str) -> None:
        """The process may be made to end here."""
        if self.host.crash_stage == stage:
            self.host.crash_stage = None
            self.host.crash()
            raise Gone

    # --- the loop ----------------------------------------------------------------------------------------------------

    def post(self, group: str, what: Input | Callable[[], Input | None]) -> None:
        """Let a group take an input in the next turn; a callable is called at its turn and may find none."""
        self._inbox.append((group, what))
        self._wake()

    def _wake(self) -> None:
        if self._wake_timer is None and len(self._writing) < len(self.runs):
            self._wake_timer = self.world.schedule.after(
                0.000_02 + 0.000_1 * self._source.random(), lambda: self.guarded(self._turn)
            )

    def _turn(self) -> None:
        """Take what arrived, for the groups that are not being written; tick all."""
        self._wake_timer = None
        inbox, self._inbox = self._inbox, []
        now = self.host.clock.now_s()
        for run in self.runs.values():
            run.machine.tick(now)
        for group, what in inbox:
            if group in self._writing:
                self._inbox.append((group, what))
                continue
            given = what() if callable(what) else what
            if given is not None:
                self.runs[group].machine.step(given)
        self._drain()

    def _drain(self) -> None:
        """Persist what the machines want durable; the rest goes on at once."""
        done: list[tuple[Run, Effects]] = []
        for run in self.runs.values():
            while effects := run.machine.drain():
                if effects.persist is not None:
                    assert run.group not in self._writing, (run.group, effects.persist)
                    self._writing.add(run.group)
                    self._held.append((run, effects))
                    break
                done.append((run, effects))
        if done:
            self._send(done)
            self.crash_point("sent")
            for run, effects in done:
                if run.group in self._writing:
                    # What it says may leave at once; what it tells this node comes after what came before it.
                    run.behind.append(effects)
                else:
                    self._tell(run, effects)
        self._write()
        self._set_alarm()

    def _write(self) -> None:
        if self._under_way or not self._held:
            return
        self.crash_point("stepped")
        self._under_way, self._held = self._held, []
        if self.world.breakage.sends_before_persist:
            self._send(self._under_way)
        began = self.host.clock.now_s()
        transaction = [(run.group, effects.persist) for run, effects in self._under_way if effects.persist is not None]
        self.host.disk.write(transaction, lambda good: self.guarded(lambda: self._written(transaction, began, good)))

    def _written(self, transaction: Transaction, began: float, good: bool) -> None:
        if not good:
            # Nothing that depends on it was sent; what is on the disk is found at the next start.
            self.world.trace.note(f"{self.id} cannot write and ends")
            self.host.crash()
            return
        self.host.keep(transaction)
        done, self._under_way = self._under_way, []
        self.crash_point("written")
        now = self.host.clock.now_s()
        for run, _ in done:
            self._writing.discard(run.group)
            run.machine.tick(now)
            run.machine.step(Persisted(self.host.log(run.group).last_index))
            if now - began > self.world.regime.timing.election_s_min:
                run.machine.step(StepDown(f"the disk took {now - began:.3f} s"))
        if not self.world.breakage.sends_before_persist:
            self._send(done)
        self.crash_point("sent")
        for run, effects in done:
            self._tell(run, effects)
            behind, run.behind = run.behind, []
            for later in behind:
                self._tell(run, later)
        self._drain()
        if self._inbox:
            self._wake()

    def _set_alarm(self) -> None:
        """Wake at the first deadline of a machine."""
        known = []
        for run in self.runs.values():
            self.host.notice_trust(run.group, run.machine)
            deadline = run.machine.next_deadline
            if deadline is not None:
                known.append(deadline)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if known:
            when_s = self.host.clock.when_s(min(known)) + 1e-6
            when_s = max(when_s, self.world.schedule.now_s + 0.000_1)
            self._alarm = self.world.schedule.at(when_s, lambda: self.guarded(self._ring))

    def _ring(self) -> None:
        self._alarm = None
        if self._wake_timer is None:
            self._turn()

    # --- effects -----------------------------------------------------------------------------------------------------

    def _send(self, done: list[tuple[Run, Effects]]) -> None:
        frames: dict[str, list[Any]] = {}
        for run, effects in done:
            for outgoing in effects.send:
                message = outgoing.message
                if type(message) is Append:
                    self.world.judges.election.leads(run.group, message.term, message.sender)
                frames.setdefault(outgoing.target, []).append(message)
        for target, messages in frames.items():
            self.world.send(self, target, tuple(messages))

    def _tell(self, run: Run, effects: Effects) -> None:
        """Everything of the effects but what is sent."""
        for change in effects.roles:
            self._role(run, change)
        for accepted in effects.accepted:
            run.asked.pop(accepted.token)((accepted.index, accepted.term), None)
        for refused in effects.refused:
            if refused.token in run.reading:
                run.reading.pop(refused.token)(0)
            elif refused.token in run.asked:
                run.asked.pop(refused.token)(None, refused.why)
        for ready in effects.reads:
            on_ready = run.reading.pop(ready.token, None)
            if on_ready is not None:
                on_ready(ready.index)
        if effects.apply:
            run.committed.extend(effects.apply)
            self._apply_soon(run)
        if effects.install is not None:
            self._fetch(run, effects.install)

    def _role(self, run: Run, change: Any) -> None:
        self.world.trace.note(
            f"{self.id} {run.group} {change.role.value} {change.term} {change.leader}: {change.reason}"
        )
        run.role, run.leader = change.role, change.leader
        if change.role is Role.LEADER:
            if run.leading_term != change.term:
                run.leading_term, run.epoch = change.term, 0
                log = self.host.log(run.group)
                self.world.judges.election.leads(run.group, change.term, self.id)
                self.world.judges.completeness.leads(run.group, self.id, change.term, log.floor.index, log.term_at)
            if self.world.on_leader is not None:
                on_leader, self.world.on_leader = self.world.on_leader, None
                on_leader(self.host)
            self._maybe_fence(run)
        else:
            run.leading_term = run.epoch = 0

    # --- applying ----------------------------------------------------------------------------------------------------

    def _apply_soon(self, run: Run) -> None:
        if not run.applying:
            run.applying = True
            delay_s = self.world.regime.apply_s * self._source.random()
            self.later(delay_s, lambda: self.host.disk.when_it_answers(lambda: self.guarded(lambda: self._apply(run))))

    def _apply(self, run: Run) -> None:
        run.applying = False
        state = self.host.state(run.group)
        self.crash_point("applying")
        first = state.index
        while run.committed:
            entry = run.committed.popleft()
            if entry.index <= state.index:
                continue  # an installed state has it
            self._apply_one(run, entry)
        self.crash_point("applied")
        if state.index > first:
            self.world.judges.application.state(run.group, self.id, state.index, state.digest)
            self.post(run.group, Applied(state.index))
        self._settle(run)
        self._maybe_fence(run)
        self._maybe_trim(run)

    def _apply_one(self, run: Run, entry: Entry) -> None:
        judges, state = self.world.judges, self.host.state(run.group)
        digest = self.world.digest(entry)
        if judges.application.applied(run.group, self.id, state.index, entry.index, entry.term, digest):
            judges.completeness.committed(run.group, entry.index, entry.term, run.machine.term)
        decided = state.apply(entry)
        state.chain = self.host.log(run.group).chain_at(entry.index)
        outcome = None
        if decided is not None:
            command, outcome = decided
            if outcome.result is Result.DONE and outcome.index == entry.index:
                if command.verb is Verb.FENCE:
                    judges.epochs.given(run.group, entry.index, command.epoch, command.proposer)
                else:
                    judges.epochs.acted(run.group, entry.index, command.epoch, command.proposer)
                    judges.acknowledged.effect(run.group, command.request, entry.index)
        for term, on_applied in run.waiting.pop(entry.index, ()):
            on_applied(outcome if term == entry.term else None)

    def _settle(self, run: Run) -> None:
        """Answer who waited for an index that the state has reached."""
        index = self.host.state(run.group).index
        for waited in [one for one in run.waiting if one <= index]:
            for _, on_applied in run.waiting.pop(waited):
                on_applied(None)  # jumped over by an installed state: the client asks again
        ready = [action for wanted, action in run.readers if wanted <= index]
        run.readers = [(wanted, action) for wanted, action in run.readers if wanted > index]
        for action in ready:
            action()

    def _maybe_trim(self, run: Run) -> None:
        kept = self.world.regime.kept
        if self.host.state(run.group).index - self.host.log(run.group).floor.index <= 2 * kept + 4:
            return

        def trim() -> Input | None:
            log, index = self.host.log(run.group), run.machine.applied_index - kept
            if index <= log.floor.index:
                return None
            floor = run.machine.floor_at(index)
            assert log.trim(index) == floor, (log.floor, floor)
            return Trimmed(floor, self.id.encode())

        self.post(run.group, trim)

    # --- installing --------------------------------------------------------------------------------------------------

    def _fetch(self, run: Run, wanted: InstallState) -> None:
        """Fetch the state of ``source``, which is at the floor or beyond."""
        if run.installing:
            return
        run.installing = True
        self.world.trace.note(f"{self.id} {run.group} fetches {wanted.floor.index} from {wanted.source}")
        delay_s = 0.005 + 1.5 * self._source.random() ** 3

        def arrived() -> None:
            state = self.world.state_copy(self.host, wanted.source, run.group, wanted.floor.index)
            self.post(run.group, lambda: self._put_in_place(run, wanted, state))

        self.later(delay_s, arrived)

    def _put_in_place(self, run: Run, wanted: InstallState, state: Any) -> Input | None:
        run.installing = False
        if state is None:
            return InstallFailed(wanted.floor.index)
        own = self.host.state(run.group)
        if state.index > own.index:
            self.world.judges.application.state(run.group, self.id, state.index, state.digest)
            self.host.disk.image.states[run.group] = own = state
        self.crash_point("installing")
        floor = Floor(own.index, own.term, own.configuration)
        self.host.log(run.group).reset(floor, own.chain)
        self.world.trace.note(f"{self.id} {run.group} installed {floor.index}")
        self.later(0.0, lambda: self._settle(run))
        return Installed(floor)

    # --- the service above -------------------------------------------------------------------------------------------

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens

    def _maybe_fence(self, run: Run) -> None:
        """A leader whose first entry is applied takes the next epoch."""
        term, state = run.leading_term, self.host.state(run.group)
        if not term or run.fenced_term == term or state.term != term:
            return
        run.fenced_term = term
        if self.world.breakage.acts_unfenced and state.epoch:
            run.epoch = state.epoch
            return
        epoch = state.epoch + 1 if not self.world.breakage.reuses_epochs else max(state.epoch, 1)

        def decided(outcome: Outcome | None) -> None:
            if outcome is not None and outcome.result is Result.DONE and run.leading_term == term:
                run.epoch = epoch
                self.world.trace.note(f"{self.id} {run.group} owns epoch {epoch}")
            elif run.leading_term == term:
                self.post(run.group, StepDown("fenced"))

        def again() -> None:
            run.fenced_term = 0
            self._maybe_fence(run)

        command = Command(Verb.FENCE, epoch, self.id, b"", claim=state.claim(self.id, term))
        self._propose(run, command, decided, lambda _why: self.later(0.2, again))

    def _propose(
        self,
        run: Run,
        command: Command | None,
        decided: Callable[[Outcome | None], None],
        refused: Callable[[Why], None],
        configuration: Configuration | None = None,
    ) -> None:
        token = self._token()

        def answered(place: tuple[int, int] | None, why: Why | None) -> None:
            if place is None:
                assert why is not None
                refused(why)
            else:
                run.waiting.setdefault(place[0], []).append((place[1], decided))

        run.asked[token] = answered
        self.post(run.group, Propose(token, b"" if command is None else encode(command), configuration))

    def write(self, group: str, make: Callable[[int, str], Command], reply: Reply) -> None:
        """Propose the command that ``make`` returns for an epoch and this node, if it owns one."""
        run = self.runs[group]
        if not run.epoch:
            reply(None)
            return
        command = make(run.epoch, self.id)

        def decided(outcome: Outcome | None) -> None:
            done = outcome is not None and outcome.result is Result.DONE
            if done and outcome is not None:
                self.world.judges.acknowledged.acknowledged(group, command.request, outcome.index)
            reply(outcome if done else None)

        self._propose(run, command, decided, lambda _why: reply(None))

    def change(self, group: str, configuration: Configuration, request: bytes) -> None:
        """Propose a change of membership; by a leader that owns no epoch without a command, as the machine allows."""
        run = self.runs[group]
        run.proposed.append(configuration)
        command = Command(Verb.MEMBER, run.epoch, self.id, request) if run.epoch else None
        self._propose(
            run, command, lambda _outcome: None, lambda _why: run.proposed.remove(configuration), configuration
        )

    def proposed(self, group: str) -> list[Configuration]:
        """Return the configurations that were proposed here and are not refused."""
        return self.runs[group].proposed[-2:]

    def read(self, group: str, register: str, reply: Reply) -> None:
        """Answer with the register's value, linearizably."""
        run, token = self.runs[group], self._token()

        def value() -> None:
            state = self.host.state(group)
            reply(Outcome(Result.DONE, state.index, state.value(register)))

        def ready(index: int) -> None:
            if index == 0:
                reply(None)
            elif index <= self.host.state(group).index:
                value()
            else:
                run.readers.append((index, value))

        run.reading[token] = ready
        self.post(group, Read(token))

    def transfer(self, group: str, target: NodeId | None) -> None:
        """Ask the machine to hand leadership over."""
        run, token = self.runs[group], self._token()
        run.asked[token] = lambda _place, _why: None
        self.post(group, Transfer(token, target))

    # --- what comes from outside -------------------------------------------------------------------------------------

    def receive(self, messages: tuple[Any, ...]) -> None:
        """A frame arrived."""
        for message in messages:
            self._inbox.append((message.group, Received(message)))
        self._wake()

    def hint(self, peer: NodeId) -> None:
        """The connection to ``peer`` closed."""
        for group in self.runs:
            self.post(group, Hint(peer))

    def _claims(self) -> None:
        """Ask the other voters what they saw of this node, until enough have answered.

        The claims themselves are ideal: peers know a directory that was put back, and the log knows its damage. Whether
        enough of them can be asked now is the network's to say.
        """
        missing = False
        for run in self.runs.values():
            if run.machine.trusted:
                continue
            missing = True
            if self.host.suspect(run.group) and not self.world.breakage.trusts_restored:
                continue
            voters = self.host.newest_configuration(run.group).voters
            others = [voter for voter in voters if voter != self.id]
            answering = sum(self.world.answers(self.host, voter) for voter in others)
            if answering >= (len(others) + 1) // 2:
                self.post(run.group, Trust(True))
        if missing:
            self.later(0.25, self._claims)
