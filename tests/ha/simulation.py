"""A group of nodes in one thread: real machines, plain-Python tablets, a lossy network, disks that are wiped and put
back.

Everything random comes from one seed; time is a number. A crash loses what runs (questions, answers, a transaction that
has not committed, a stage), never what was durable. Faults that make a node lose durable data (wipe, restore to an
older copy) are injected only while all the others are intact and in step, which is what the promise speaks of; crashes
at any moment.

Checked all the time: nothing is served before a start is complete; ``committed`` never goes back in a run, and a
majority really holds it; a read sees acknowledged data only. Checked at the end: every acknowledged write is there, all
replicas are equal.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from srengine import errors, limits
from srengine.ha import follower_machine as fm
from srengine.ha import leader_machine as lm
from srengine.ha.quorum import majority
from tests.reference.replica import ReferenceDelta, ReferenceTablet

ROWS_MAX = 6
"""Rows that fit into an answer: small, so that copies are common."""
LINEAGE = "aa" * 16


@dataclass
class SimNode:
    name: str
    disk: ReferenceTablet
    trusted: bool = True
    up: bool = False
    run: int = 0
    """Number of the current process; events of older ones are void."""
    leader: lm.LeaderMachine | None = None
    follower: fm.FollowerMachine | None = None
    delta: ReferenceDelta | None = None
    backups: list[ReferenceTablet] = field(default_factory=list)


class Simulation:
    """One group under faults; `run` for a while, then `settle`."""

    def __init__(self, seed: int, *, nodes: int = 3) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.nodes = {name: SimNode(name, ReferenceTablet(LINEAGE)) for name in self.names}
        self.loss = 0.15
        self.acknowledged: dict[int, tuple[bytes, bytes | None]] = {}
        self.committed_ever = 0
        self.reads = 0
        self.alarms: list[str] = []
        self.stopped_faults = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._tokens = itertools.count(1)
        self._writes: dict[int, list[tuple[int, bytes, bytes | None]]] = {}
        self._pulls: dict[int, tuple[str, int, int, int]] = {}
        for name in self.names:
            self.start(name)

    # --- time --------------------------------------------------------------------------------------------------------

    def after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self.check()
        self.now = end

    # --- processes ---------------------------------------------------------------------------------------------------

    @property
    def first(self) -> SimNode:
        return self.nodes[self.names[0]]

    def start(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.up
        node.up, node.run, node.delta = True, node.run + 1, None
        node.disk = node.disk.reopened()
        if name == self.names[0]:
            node.leader = lm.LeaderMachine(
                name=name,
                others=self.names[1:],
                own=node.disk.position,
                own_trusted=node.trusted,
                root_at=node.disk.root_at,
                now=self.now,
            )
            self._leader_turn()
        else:
            node.follower = fm.FollowerMachine(
                own=node.disk.position,
                filling=node.disk.filling,
                created=node.disk.sequence == 0,
                now=self.now,
            )
            self._follower_turn(node)
        self._tick(node, node.run)

    def crash(self, name: str) -> None:
        node = self.nodes[name]
        node.up, node.leader, node.follower, node.delta = False, None, None, None
        if name == self.names[0]:
            self._writes.clear()
            self._pulls.clear()

    def wipe(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.up
        node.disk, node.trusted = ReferenceTablet(LINEAGE), False

    def restore(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.up
        if node.backups:
            node.disk, node.trusted = self.random.choice(node.backups).copy(), False

    def _tick(self, node: SimNode, run: int) -> None:
        if not node.up or node.run != run:
            return
        if node.leader is not None:
            node.leader.tick(self.now)
            self._leader_turn()
        if node.follower is not None:
            node.follower.tick(self.now)
            self._follower_turn(node)
        self.after(0.05, lambda: self._tick(node, run))

    # --- network -----------------------------------------------------------------------------------------------------

    def send(self, target: SimNode, action: Callable[[], None]) -> None:
        """Deliver to the process that runs at the target then, perhaps twice, perhaps never."""
        for _ in range(2 if self.random.random() < self.loss / 3 else 1):
            if self.random.random() < self.loss:
                continue
            delay = self.random.uniform(0.001, 0.03) * (40 if self.random.random() < self.loss / 5 else 1)
            self.after(delay, lambda: action() if target.up else None)

    # --- the leader's service ----------------------------------------------------------------------------------------

    def write(self) -> None:
        """Apply a few pairs at the leader as one transaction, which takes a moment and may be lost by a crash."""
        node, run = self.first, self.first.run
        if node.leader is None or not node.leader.serving:
            return
        pairs = [
            (
                b"k%d" % self.random.randrange(30),
                None if self.random.random() < 0.2 else b"v%d" % self.random.randrange(10**9),
            )
            for _ in range(self.random.randint(1, 3))
        ]

        def commit() -> None:
            if not node.up or node.run != run or node.leader is None:
                return
            base = node.disk.sequence
            position = node.disk.apply(pairs)
            node.leader.step(lm.Applied(position))
            token = next(self._tokens)
            self._writes[token] = [(base + 1 + place, *pair) for place, pair in enumerate(pairs)]
            node.leader.step(lm.Await(token, position.sequence))
            self._leader_turn()

        self.after(self.random.uniform(0.001, 0.02), commit)

    def _leader_turn(self) -> None:
        node = self.first
        leader = node.leader
        assert leader is not None
        effects = leader.drain()
        for alarm in effects.alarms:
            self.alarms.append(alarm.event)
        for release in effects.release:
            for sequence, key, value in self._writes.pop(release.token, []):
                assert sequence <= leader.committed, (sequence, leader.committed)
                self.acknowledged[sequence] = (key, value)
        for answer in effects.send:
            self._send_answer(node, answer)
        if effects.recover is not None:
            self._recover(effects.recover)

    def _send_answer(self, node: SimNode, answer: lm.Answer) -> None:
        replica, run, number, base = self._pulls.pop(answer.token)
        target = self.nodes[replica]
        state, delta, reason = fm.SourceState.NOTHING, None, answer.reason
        match answer.kind:
            case lm.AnswerKind.ROWS:
                delta = node.disk.delta_since(base, rows_max=ROWS_MAX)
                state = fm.SourceState.TOO_LARGE if delta is None else fm.SourceState.DELTA
            case kind:
                state = fm.SourceState(kind.value)

        def arrive() -> None:
            follower = target.follower
            if follower is None or target.run != run:
                return
            asking = isinstance(follower.state, fm.Asking) and follower.state.number == number
            if asking:
                target.delta = delta
            follower.step(
                fm.Answered(
                    number,
                    state,
                    source=answer.leader,
                    committed=answer.committed,
                    target=None if delta is None else delta.position,
                    bytes_received=0 if delta is None else len(delta.rows),
                    reason=reason,
                )
            )
            self._follower_turn(target)

        self.send(target, arrive)

    def _recover(self, effect: lm.Recover) -> None:
        node, run, source = self.first, self.first.run, self.nodes[effect.replica]

        def finish() -> None:
            if not node.up or node.run != run or node.leader is None:
                return
            if not source.up or source.disk.filling or self.random.random() < self.loss:
                node.leader.step(lm.RecoveryFailed("the source went away"))
            else:
                delta = (
                    None if node.disk.sequence == 0 else source.disk.delta_since(node.disk.sequence, rows_max=ROWS_MAX)
                )
                if delta is None:
                    position = node.disk.replace_by(source.disk)
                else:
                    position = node.disk.apply_delta(delta)
                node.trusted = True
                node.leader.step(lm.Recovered(position))
            self._leader_turn()

        self.after(self.random.uniform(0.01, 0.5), finish)

    # --- a replica's service -----------------------------------------------------------------------------------------

    def _follower_turn(self, node: SimNode) -> None:
        follower, run = node.follower, node.run
        assert follower is not None
        effects = follower.drain()
        self.alarms += [alarm.event for alarm in effects.alarms]
        match effects.ask or effects.apply or effects.copy:
            case fm.Ask() as ask:
                claim = lm.Claim(ask.position, node.trusted, ask.filling, ask.committed_known)
                self.send(self.first, lambda: self._pulled(node.name, run, ask.number, claim))
                self.after(
                    limits.PULL_TIMEOUT_S, lambda: self._follower_step(node, run, fm.Failed(ask.number, "no answer"))
                )
            case fm.ApplyDelta():
                self.after(self.random.uniform(0.001, 0.02), lambda: self._apply_delta(node, run))
            case fm.Copy() as copy:
                if copy.path is fm.Path.DELTA:
                    node.disk.filling = True
                self.after(self.random.uniform(0.05, 0.6), lambda: self._copied(node, run))
            case None:
                pass

    def _follower_step(self, node: SimNode, run: int, message: fm.Input) -> None:
        if node.up and node.run == run and node.follower is not None:
            node.follower.step(message)
            self._follower_turn(node)

    def _pulled(self, replica: str, run: int, number: int, claim: lm.Claim) -> None:
        leader = self.first.leader
        assert leader is not None
        last = self._last.get(replica, (0, 0, 0))
        if (self.first.run, run, number) <= last:
            return
        self._last[replica] = (self.first.run, run, number)
        token = next(self._tokens)
        self._pulls[token] = (replica, run, number, claim.position.sequence)
        leader.step(lm.Pulled(replica, claim, token))
        self._leader_turn()

    @property
    def _last(self) -> dict[str, tuple[int, int, int]]:
        return self.__dict__.setdefault("_last_pulls", {})

    def _apply_delta(self, node: SimNode, run: int) -> None:
        if not node.up or node.run != run or node.delta is None:
            return
        try:
            position = node.disk.apply_delta(node.delta)
        except errors.Diverged as error:
            self._follower_step(node, run, fm.DeltaRefused(error.message, diverged=True))
        else:
            self._follower_step(node, run, fm.DeltaApplied(position))

    def _copied(self, node: SimNode, run: int) -> None:
        if not node.up or node.run != run:
            return
        if not self.first.up or self.random.random() < self.loss:
            self._follower_step(node, run, fm.CopyFailed("cut", node.disk.position, node.disk.filling))
            return
        position = node.disk.replace_by(self.first.disk)
        self._follower_step(node, run, fm.Copied(position, position.count))

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        leader = self.first.leader
        if leader is None or not leader.serving:
            return
        assert leader.own == self.first.disk.position or self.first.disk.sequence >= leader.own.sequence
        if leader.committed > self.committed_ever:
            holders = [node for node in self.nodes.values() if node.disk.sequence >= leader.committed]
            assert len(holders) >= majority(len(self.names)), (
                leader.committed,
                [node.disk.position for node in holders],
            )
            self.committed_ever = leader.committed

    def read(self) -> None:
        """Read some key at some replica that says it is SYNCED: only acknowledged or committed data."""
        node = self.nodes[self.random.choice(self.names[1:])]
        follower = node.follower
        if follower is None or not follower.synced(self.now):
            return
        self.reads += 1
        for _, sequence, _ in node.disk.records.values():
            if sequence <= follower.committed_known:
                assert sequence <= self.committed_ever, (sequence, self.committed_ever)
        # As of: all that was acknowledged when the question was asked is there.
        assert follower.own.sequence == node.disk.sequence, (follower.own, node.disk.position)

    def settle(self) -> None:
        """Let everybody live and the network be good until all are equal; then check what was promised."""
        self.loss = 0.0
        for node in self.nodes.values():
            if not node.up:
                self.start(node.name)
        for _ in range(400):
            self.run(0.25)
            leader = self.first.leader
            if leader is not None and leader.serving and all(self._in_step(node) for node in self.nodes.values()):
                break
        else:
            raise AssertionError(
                f"not settled: {[(each.name, each.disk.position, each.follower) for each in self.nodes.values()]}"
            )
        positions = {node.disk.position for node in self.nodes.values()}
        assert len(positions) == 1, positions
        records = self.first.disk.records
        for sequence, (key, value) in sorted(self.acknowledged.items()):
            row = records.get(key)
            assert row is not None, (sequence, key)
            assert row[1] >= sequence, (sequence, row)
            assert row[1] != sequence or row[2] == value, (sequence, row, value)

    def _in_step(self, node: SimNode) -> bool:
        if node is self.first:
            return True
        assert node.follower is not None
        return node.follower.synced(self.now) and node.disk.position == self.first.disk.position

    # --- a whole story -----------------------------------------------------------------------------------------------

    def story(self, seconds: float = 60.0) -> None:
        """Writes all the time, crashes at random, one loss of data at a time; then `settle`."""
        end = self.now + seconds
        next_loss = self.now + self.random.uniform(5, 15)
        while self.now < end:
            self.run(self.random.uniform(0.01, 0.3))
            for _ in range(self.random.choice((1, 1, 2, 8))):
                self.write()
            self.read()
            name = self.random.choice(self.names)
            node = self.nodes[name]
            if node.up and self.random.random() < 0.03:
                self.crash(name)
            elif not node.up and self.random.random() < 0.2:
                self.start(name)
            if self.now >= next_loss:
                next_loss = self.now + self.random.uniform(5, 20)
                self._lose(self.nodes[self.random.choice(self.names)])

    def _lose(self, node: SimNode) -> None:
        self.settle()
        for each in self.nodes.values():
            each.trusted = True
        self.loss = 0.15
        for each in self.nodes.values():
            each.backups = [*each.backups[-3:], each.disk.copy()]
        self.run(0.5)
        for _ in range(5):
            self.write()
            self.run(0.2)
        self.crash(node.name)
        self.restore(node.name) if self.random.random() < 0.5 else self.wipe(node.name)
        self.start(node.name)
