r"""Runs the machines of many groups over one log and one transport.

::

      posts of peers    timers    proposals, reads
            \             |            /
             '-----> inbox of each group                          loop
                          |  a turn: step everything that arrived, drain every group
                          v
              one transaction for all of them                     turns.py
                          |  Persisted
                          v
              send: one bundle for each peer; apply               loop, apply thread (applying.py)
                          |  proposals and reads end
                          v
                        again

* **A turn.** A group whose effects wait for the disk is *busy*: nothing is stepped into it, what arrives waits in its
  inbox. So everything that arrives during one transaction of the log shares the next one: group commit needs no timer.
  A busy group is still ticked and drained: its leader beats on, and gives up when its own disk hangs. What a leader
  sends does not wait for its transaction.
* **A new leader.** Its first entry is held back for a few turns of the loop, some tenths of a millisecond: what those
  who wait for an election propose at once, an epoch above all, is then decided together with it.
* **The disk.** A transaction that takes too long, or a full disk (tried again until there is space), shows in `health`;
  its groups stay busy, so they promise nothing and their machines step down. An input/output error fences the log: no
  group takes part any more.
* **Damage.** A group whose log opened damaged is not trusted by what peers say, only by catching up; then the mark is
  lifted (`NodeLog.heal`). A group that meets damage while it runs stops taking part.

The driver knows nothing of what entries mean (services.py names what does). Everything runs on the loop but the log's
transactions, `StateMachine.apply` and what a `StateSink` returns.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable
from typing import Any, Final

from srengine import errors, limits
from srengine.clock import Clock
from srengine.consensus.applying import Applying
from srengine.consensus.effects import (
    NOTHING,
    Effects,
    Hint,
    Input,
    Persisted,
    Propose,
    Read,
    Received,
    Role,
    RoleChanged,
    StepDown,
    Transfer,
    Trust,
)
from srengine.consensus.entries import Configuration
from srengine.consensus.hosting import NEVER, Group
from srengine.consensus.log import GroupLog, NodeLog
from srengine.consensus.messages import Bundle
from srengine.consensus.outbox import Outbox, bundles, message_bytes
from srengine.consensus.services import (
    Bounds,
    GroupStatus,
    Health,
    Machine,
    Peers,
    PostChannel,
    StateMachine,
    StateSink,
    StateSource,
)
from srengine.consensus.turns import Batch, LogTurns, wait_for_end
from srengine.consensus.waiting import PROPOSAL, READ, TRANSFER, WaitingRoom, no_leader
from srengine.consensus.worker import Done, Job
from srengine.metrics import Metrics
from srengine.soon import Soon
from srengine.transport import Peer
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

INBOX_MESSAGES_MAX: Final = 4096
"""Messages of peers that wait for a busy group; later ones are dropped, as a network may."""
INBOX_BYTES_MAX: Final = 64 * limits.MIB
LOG: Final = ""
"""Of whose disk health is told, beside those of the groups' states, which have names."""
_HEALTHS: Final = list(Health)
"""From well to worst."""
HELD_TURNS: Final = 3
"""Turns of the loop that a new leader's first entry is held back: whoever hears of the election in these adds to it."""

_GREETING: Final = Bundle(())
"""Says nothing; whoever gets it knows that its sender can be reached."""


class Driver:
    """Runs groups; made and used on one event loop. See the module's text."""

    def __init__(
        self,
        node: NodeId,
        log: NodeLog,
        peers: Peers,
        clock: Clock,
        *,
        bounds: Bounds | None = None,
        metrics: Metrics | None = None,
        on_health: Callable[[Health, errors.Error | None], None] | None = None,
        on_group_failed: Callable[[str, errors.Error], None] | None = None,
    ) -> None:
        """``on_health``: told of every change of `health`. ``on_group_failed``: a group takes part no more."""
        self.node = node
        self.log = log
        self.health = Health.OK
        """The worst of the log's and of what each group's state met last."""
        self._healths: dict[str, Health] = {}
        """What is not well: the log under `LOG`, a state under its group's name."""
        self.metrics = metrics if metrics is not None else Metrics()
        self._peers = peers
        self._clock = clock
        self._bounds = bounds if bounds is not None else Bounds()
        self._on_health = on_health
        self._on_group_failed = on_group_failed
        self._loop = asyncio.get_running_loop()
        self._soon = Soon.of(self._loop)
        self._groups: dict[str, Group] = {}
        self._ready: dict[str, Group] = {}
        """Groups with something in their inbox, or whose deadline has passed."""
        self._due = False
        self._fresh: dict[str, Group] = {}
        """Groups that this node has just begun to lead; empty unless something is held back."""
        self._held = 0
        """Turns for which everything that leaves and all new entries are still held back."""
        self._deadlines: list[tuple[float, str]] = []
        """A heap; an entry that is not its group's deadline any more is void."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._to_apply: dict[str, Group] = {}
        """Groups that were given entries to apply in this turn."""
        self._outbox: Outbox = {}
        self._watched: dict[NodeId, PostChannel] = {}
        self._greet: set[NodeId] = set()
        """Nodes to be told that this one is here: they may be waiting out a back-off."""
        self.stopped = False
        self._turns = LogTurns(self, log, self._bounds, self.metrics, self._loop)
        self._applying = Applying(self, log, self._bounds, self.metrics, self._loop)

    # --- groups ------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        machine: Machine,
        state: StateMachine,
        *,
        source: StateSource | None = None,
        sink: StateSink | None = None,
        on_visible: Callable[[int], None] | None = None,
    ) -> None:
        """Begin to run a group; ``machine`` was made with what `prepare` returned.

        Without ``source`` and ``sink`` a node that lags behind what the others keep cannot catch up. ``on_visible``:
        told up to which index the state machine shows entries, whenever that changes.
        """
        log = self.log.group(name)
        assert name not in self._groups, name
        assert log.damage is None or not machine.trusted, (name, log.damage)
        role = RoleChanged(Role.FOLLOWER, log.hard_state.term, None, "started")
        waiting = WaitingRoom(name, self._loop)
        group = Group(
            name, machine, log, state, source, sink, role, state.applied.index, waiting, on_visible=on_visible
        )
        if log.floor.index:
            group.inbox.append(group.trimmed)
        self._groups[name] = group
        self._greet.update(set(log.configuration.nodes) - {self.node})
        self.wake(group)

    def watch_roles(self, name: str, watcher: Callable[[RoleChanged], None]) -> Callable[[], None]:
        """Call ``watcher`` with the present role now, and with every change, in order; return what ends that."""
        group = self._group(name)
        group.watchers.append(watcher)
        watcher(group.role)
        return lambda: group.watchers.remove(watcher)

    def status(self, name: str) -> GroupStatus:
        """Return how a group stands. `NotFound`."""
        group = self._group(name)
        damage = group.log.damage
        return GroupStatus(
            group.role.role,
            group.role.term,
            group.role.leader,
            group.log.floor.index,
            group.log.last_index,
            group.visible,
            len(group.waiting),
            group.machine.trusted,
            damage.detail if damage is not None else None,
            group.failed,
        )

    def _group(self, name: str) -> Group:
        group = self._groups.get(name)
        if group is None:
            raise errors.NotFound(f"this node runs no group {name}", group=name)
        return group

    # --- what the layer above asks -----------------------------------------------------------------------------------

    async def propose(
        self, name: str, data: bytes, configuration: Configuration | None = None, *, timeout_s: float = 10.0
    ) -> tuple[int, int]:
        """Append an entry and return its (index, term) once it was applied here.

        Raises `NotLeader` (``leader``: the id of who leads), `NoLeader`, `NotReady` (busy, or too much is waiting) and
        `InvalidValue` (no such step of membership): nothing happened; `Conflict`: another leader's entry took its
        place, it will never be applied; `TimedOut`, `Closed`, and what ended the group: not known.
        """
        group, token, future = self._begin(name, PROPOSAL, timeout_s)
        before, group.lone = group.lone, len(group.waiting) == 1
        if before and group.lone:
            self._step_now(group, Propose(token, data, configuration))
        else:
            self.step(group, Propose(token, data, configuration))
        decided: tuple[int, int] = await future
        return decided

    async def read_index(self, name: str, *, timeout_s: float = 10.0) -> int:
        """Return an index that is applied here and at which reads are linearizable. Raises as `propose`."""
        group, token, future = self._begin(name, READ, timeout_s)
        self.step(group, Read(token))
        index: int = await future
        return index

    async def transfer(self, name: str, target: NodeId | None = None, *, timeout_s: float = 10.0) -> NodeId:
        """Hand leadership over and return who leads then. Raises as `propose`."""
        group, token, future = self._begin(name, TRANSFER, timeout_s)
        self.step(group, Transfer(token, target))
        leader: NodeId = await future
        return leader

    def step_down(self, name: str, reason: str) -> None:
        """Give up leadership of a group, if this node has it."""
        self.step(self._group(name), StepDown(reason))

    def trust(self, name: str, *, trusted: bool, held: tuple[int, int] = (0, 0)) -> bool:
        """Tell whether this node may vote in a group, see `effects.Trust`; return whether that was passed on: a damaged
        log is not trusted by what peers say, only by catching up.
        """
        group = self._group(name)
        if trusted and group.log.damage is not None:
            return False
        self.step(group, Trust(trusted, held))
        return True

    def _begin(self, name: str, what: str, timeout_s: float) -> tuple[Group, int, asyncio.Future[Any]]:
        group = self._group(name)
        if self.stopped:
            raise errors.Closed("the node stops")
        if group.failed is not None:
            raise _again(group.failed)
        if group.busy and self.health is not Health.OK and group.role.role is not Role.LEADER:
            # The machine cannot be asked while the disk does not answer, and what it would say is known.
            raise no_leader(name, group.role.leader)
        return (group, *group.waiting.begin(what, timeout_s))

    # --- arriving ----------------------------------------------------------------------------------------------------

    def receive(self, peer: Peer, bundle: Bundle) -> None:
        """Take the posts of a peer: the handler of `messages.Bundle` at the peer port."""
        if peer.node_id is None or self.stopped:
            return
        sender = NodeId(peer.node_id)
        channel = self._watched.get(sender)
        if channel is not None and not channel.connected:
            # It is there: no reason to wait for the end of a back-off.
            channel.wake()
        for message in bundle.messages:
            group = self._groups.get(message.group)
            if message.sender != sender or group is None or group.failed is not None:
                self.metrics.add("srengine_consensus_messages_refused_total")
                continue
            size = message_bytes(message)
            if group.inbox_messages >= INBOX_MESSAGES_MAX or group.inbox_bytes + size > INBOX_BYTES_MAX:
                self.metrics.add("srengine_consensus_messages_dropped_total")
                continue
            group.inbox_messages += 1
            group.inbox_bytes += size
            self.step(group, Received(message))

    def _hint(self, node: NodeId) -> None:
        for group in self._groups.values():
            self.step(group, Hint(node))

    def step(self, group: Group, arrived: Input) -> None:
        """Hand an input to a group's machine, in its next turn."""
        if group.failed is None:
            group.inbox.append(arrived)
            self.wake(group)

    def _step_now(self, group: Group, arrived: Input) -> None:
        """`step`, and have the turn now: nobody is there whose proposals could share it."""
        try:
            with self._soon:
                self.step(group, arrived)
        except Exception as error:  # noqa: BLE001  (the group has failed: whoever waits is told, and this is a bug)
            self._loop.call_exception_handler({"message": "a turn failed", "exception": error})

    def wake(self, group: Group) -> None:
        """Give a group its part in the next turn."""
        self._ready[group.name] = group
        if not self._due and not self.stopped:
            self._due = True
            self._soon.call(self._turn)

    # --- a turn ------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._due = False
        if self.stopped:
            return
        now = self._clock.boottime_s()
        if self._fresh:
            self._ready.update(self._fresh)
            if self._held:
                self._held -= 1
            if not self._held:
                self._fresh.clear()
        ready, self._ready = self._ready, {}
        for group in ready.values():
            if group.failed is None and not group.locked:
                self._advance(group, now)
        if self._held:
            self._due = True
            self._loop.call_soon(self._turn)
        else:
            # First what leaves: others work while this node's disk does, and the disk while entries are applied.
            if self._outbox or self._greet:
                self._send()
            self._turns.work()
            self._arm(now)
        to_apply, self._to_apply = self._to_apply, {}
        for group in to_apply.values():
            self._applying.apply(group)

    def _advance(self, group: Group, now: float) -> None:
        """Step what arrived into a group that is not busy, and take what comes out of it."""
        machine = group.machine
        try:
            if now < group.deadline < NEVER:
                machine.pass_time(now)
            else:
                machine.tick(now)
            while True:
                if not group.busy:
                    self._step_inbox(group)
                if group.name in self._fresh:
                    break
                effects = machine.drain()
                if effects is NOTHING:
                    break
                if effects.persist is not None:
                    assert not group.busy, group.name
                    self._turns.add(group, effects)
                    break
                self._carry_out(group, effects)
        except errors.Error as error:
            self.fail_group(group, error)
            return
        except BaseException:
            self.fail_group(group, errors.Error(f"the machine of {group.name} failed"))
            raise
        deadline = machine.next_deadline
        if deadline != group.deadline and deadline < NEVER:
            heapq.heappush(self._deadlines, (deadline, group.name))
        group.deadline = deadline

    def _step_inbox(self, group: Group) -> None:
        inbox = group.inbox
        while inbox:
            arrived = inbox.popleft()
            if isinstance(arrived, Propose | Read | Transfer) and arrived.token not in group.waiting:
                continue  # who asked has gone
            group.machine.step(arrived)
        group.inbox_messages = group.inbox_bytes = 0

    def _carry_out(self, group: Group, effects: Effects) -> None:
        """Do what comes after the persist, in the order of the duties."""
        waiting = group.waiting
        for accepted in effects.accepted:
            waiting.accepted(accepted)
        for refused in effects.refused:
            waiting.refused(refused)
        for role in effects.roles:
            self._publish(group, role)
        for read in effects.reads:
            waiting.read_ready(read, group.visible, group.role.leader)
        for outgoing in effects.send:
            self._outbox.setdefault(outgoing.target, []).append(outgoing.message)
        if effects.apply:
            group.to_apply.extend(effects.apply)
            self._to_apply[group.name] = group
        if effects.install is not None:
            self._applying.install(group, effects.install)
        if group.log.damage is not None and group.machine.trusted:
            self._heal(group)

    def _publish(self, group: Group, role: RoleChanged) -> None:
        group.role = role
        self.metrics.add("srengine_consensus_role_changes_total", role=role.role.value)
        if role.leader is not None and role.leader != self.node:
            group.waiting.leads(role.leader)
        if group.busy and role.role is not Role.LEADER:
            self._refuse_inbox(group, role.leader)
        if role.role is Role.LEADER:
            self._fresh[group.name] = group
            self._held = self._held or HELD_TURNS
        for watcher in list(group.watchers):
            watcher(role)

    def _refuse_inbox(self, group: Group, leader: NodeId | None) -> None:
        """Let those go whose question the machine has not seen: nobody leads here, and it cannot be asked now."""
        for arrived in group.inbox:
            if isinstance(arrived, Propose | Read | Transfer):
                group.waiting.end(arrived.token, no_leader(group.name, leader))

    # --- time --------------------------------------------------------------------------------------------------------

    def _arm(self, now: float) -> None:
        """Have a turn at the earliest deadline. A timer that is too early stays: to look once in vain costs less than
        to set another one with every turn.
        """
        deadlines = self._deadlines
        while deadlines and self._groups[deadlines[0][1]].deadline != deadlines[0][0]:
            heapq.heappop(deadlines)
        if not deadlines:
            return
        at = deadlines[0][0]
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.0, at - now), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._clock.boottime_s()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, name = heapq.heappop(self._deadlines)
            group = self._groups[name]
            if group.deadline == deadline:
                group.deadline = NEVER
                self.wake(group)
        if not self._due:
            self._arm(now)

    # --- the log -----------------------------------------------------------------------------------------------------

    def persisted(self, batch: Batch) -> None:
        """See `turns.Host`."""
        for name, effects in batch.items():
            group = self._groups[name]
            if group.failed is not None:
                continue
            group.busy = False
            self._carry_out(group, effects)
            group.inbox.appendleft(Persisted(group.log.last_index))
            self._ready[name] = group
        if not self._held:
            # Others wait for it: before the machines hear of it.
            self._send()
        self._turn()

    def log_failed(self, error: BaseException) -> None:
        """See `turns.Host`."""
        typed = error if isinstance(error, errors.Error) else errors.Error(f"the log failed: {error!r}")
        if typed is not error:
            _logger.error("the log failed", exc_info=error)
        self.set_health(Health.FENCED, typed)
        for group in self._groups.values():
            self.fail_group(group, typed)

    def set_health(self, health: Health, error: errors.Error | None, *, of: str = LOG) -> None:
        """Say how the disk is under the log, or under the state of the group ``of``; what is fenced stays so."""
        if health is not Health.OK:
            self._healths[of] = health
        elif self._healths.pop(of, None) is None:
            return
        worst = max(self._healths.values(), key=_HEALTHS.index, default=Health.OK)
        if worst is self.health or self.health is Health.FENCED:
            return
        self.health = worst
        if self._on_health is not None:
            self._on_health(worst, error)

    def fail_group(self, group: Group, error: errors.Error) -> None:
        """End a group on this node, for this process."""
        if group.failed is not None:
            return
        _logger.error("the group %s takes part no more: %s", group.name, error.message)
        group.failed = error
        group.deadline = NEVER
        group.inbox.clear()
        group.to_apply.clear()
        self._turns.drop(group)
        self.set_health(Health.OK, None, of=group.name)
        self._publish(group, RoleChanged(Role.FOLLOWER, group.role.term, None, error.message))
        group.waiting.end_all(lambda: _again(error))
        if self._on_group_failed is not None:
            self._on_group_failed(group.name, error)

    def _heal(self, group: Group) -> None:
        if group.healing:
            return
        group.healing = True

        def healed(error: BaseException | None) -> None:
            group.healing = False
            if error is None:
                _logger.warning("the log of %s is whole again", group.name)

        self.write(group, lambda: self.log.heal(group.name), healed)

    def write(self, group: Group, job: Job, done: Done) -> None:
        """Run a job of a group on the log as soon as nothing of the group is being written."""
        self._turns.job(group, job, done)
        self.wake(group)

    # --- sending -----------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        outbox, self._outbox = self._outbox, {}
        made: list[Bundle] = []
        for target, messages in outbox.items():
            channel = self._channel(target)
            if channel is None:
                self.metrics.add("srengine_consensus_messages_unroutable_total", len(messages))
                continue
            self._greet.discard(target)
            made = bundles(messages, made)
            for bundle in made:
                channel.post(bundle)
        while self._greet:
            channel = self._channel(self._greet.pop())
            if channel is not None:
                channel.post(_GREETING)

    def _channel(self, node: NodeId) -> PostChannel | None:
        channel = self._peers.channel(node)
        if channel is not None and self._watched.get(node) is not channel:
            self._watched[node] = channel
            channel.on_down = lambda _: self._hint(node)
        return channel

    # --- the end -----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop taking part: whoever waits gets `Closed`, what is being written is finished. Idempotent.

        The log may be closed afterwards. Hand leadership over before (`transfer`) where that matters. `TimedOut` when
        the disk does not answer in `STOP_S`: closing the log would wait for it.
        """
        if self.stopped:
            return
        self.stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for channel in self._watched.values():
            channel.on_down = None
        for group in self._groups.values():
            group.waiting.end_all(lambda: errors.Closed("the node stops"))
        await self._applying.stop(self._groups.values())
        await self._turns.stop()
        await wait_for_end(self._applying.worker, self._loop)


def prepare(log: NodeLog, name: str, state: StateMachine) -> GroupLog:
    """Return a group's log fit for a machine: a log that ends before what the state machine holds begins behind it.

    Raises `CorruptionError` when term and vote are lost: the node can promise nothing under its id any more.
    """
    group = log.group(name)
    if group.damage is not None and group.damage.lost:
        raise errors.CorruptionError(
            f"what this node promised in {name} is lost: {group.damage.detail}", group=name, kind=group.damage.kind
        )
    applied = state.applied
    if applied.index < group.floor.index:
        raise errors.CorruptionError(
            f"the state of {name} is at {applied.index} and its log begins behind {group.floor.index}: a part is gone",
            group=name,
        )
    if applied.index > group.last_index:
        if applied.term > group.hard_state.term:
            raise errors.CorruptionError(
                f"the log of {name} is of term {group.hard_state.term} and the state has applied term {applied.term}",
                group=name,
            )
        log.install(name, applied)
    return group


def _again(error: errors.Error) -> errors.Error:
    return errors.from_code(error.code, error.message, {**error.details})
