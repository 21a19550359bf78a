"""A group of nodes in one thread: real machines, plain-Python tablets, a lossy network, disks that are wiped and put
back.

Everything random comes from one seed; time is a number. A crash loses what runs (questions, answers, a transaction that
has not committed, a stage), never what was durable. Faults that make a node lose durable data (wipe, restore to an
older copy) are injected only while all the others are intact and in step, which is what the promise speaks of; crashes
at any moment.

Records also rot: one is changed, lost or added on one node while the root that its tablet carries stays, or a record
is forged together with the root. A scrub finds the first kind now and then; rows that do not fit and roots that differ
find the rest.

Checked all the time: nothing is served before a start is complete; ``committed`` never goes back in a run, and a
majority holds it, or held it when a disk was lost that the leader has not heard of yet (nobody can tell a disk that is
lost just before it counts from one that is lost just after); a read sees acknowledged data only. Checked at the end:
every acknowledged write is there, all replicas are equal.
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
    void: int = 0
    """Runs up to this one spoke of a disk that was lost since: what is still on its way of them does not arrive."""
    held: int = 0
    """The sequence that its disk had when it was lost last; 0 once everybody was whole again."""


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
        self.repairs = 0
        self.rows_max = ROWS_MAX
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
                provable=True,
            )
            self._leader_turn()
        else:
            node.follower = fm.FollowerMachine(
                own=node.disk.position,
                filling=node.disk.filling,
                created=node.disk.sequence == 0,
                now=self.now,
                provable=True,
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
        node.held = node.disk.sequence
        node.disk, node.trusted, node.void = ReferenceTablet(LINEAGE), False, node.run

    def restore(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.up
        node.held = node.disk.sequence
        if node.backups:
            node.disk, node.trusted, node.void = self.random.choice(node.backups).copy(), False, node.run

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
            if not node.up or node.run != run or node.leader is None or not node.leader.serving:
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
        run = node.run
        if effects.prove is not None:
            self.after(self.random.uniform(0.01, 0.3), lambda: self._leader_proves(run))
        if effects.repair is not None:
            repair = effects.repair
            self.after(self.random.uniform(0.01, 0.5), lambda: self._leader_repairs(run, repair))

    def _leader_proves(self, run: int) -> None:
        node = self.first
        if node.up and node.run == run and node.leader is not None:
            node.leader.step(lm.Proved(node.disk.whole, "" if node.disk.whole else "the records do not give the root"))
            self._leader_turn()

    def _leader_repairs(self, run: int, repair: lm.Repair) -> None:
        node, source = self.first, self.nodes[repair.replica]
        if not node.up or node.run != run or node.leader is None:
            return
        follower = source.follower
        if follower is None or source.disk.filling or self.random.random() < self.loss:
            node.leader.step(lm.RepairFailed("the source went away"))
        elif source.disk.position != repair.target:
            node.leader.step(lm.RepairFailed("the source moved on"))
        else:
            # What may be acknowledged is never given up.
            assert source.disk.sequence >= node.leader.committed, (source.disk.position, node.leader.committed)
            try:
                position = node.disk.repair_by(source.disk, recount=repair.recount)
            except errors.Diverged as error:
                node.leader.step(lm.RepairFailed(error.message))
            else:
                self.repairs += 1
                for token, rows in list(self._writes.items()):
                    if rows[-1][0] > position.sequence:
                        del self._writes[token]
                node.leader.step(lm.Repaired(position))
        self._leader_turn()

    def _send_answer(self, node: SimNode, answer: lm.Answer) -> None:
        replica, run, number, base = self._pulls.pop(answer.token)
        target = self.nodes[replica]
        state, delta, reason = fm.SourceState.NOTHING, None, answer.reason
        match answer.kind:
            case lm.AnswerKind.ROWS:
                delta = node.disk.delta_since(base, rows_max=self.rows_max)
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
                    None
                    if node.disk.sequence == 0
                    else source.disk.delta_since(node.disk.sequence, rows_max=self.rows_max)
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
        match effects.ask or effects.apply or effects.copy or effects.prove:
            case fm.Ask() as ask:
                claim = lm.Claim(ask.position, node.trusted, ask.filling, ask.committed_known, ask.check)
                self.send(self.first, lambda: self._pulled(node.name, run, ask.number, claim))
                self.after(
                    limits.PULL_TIMEOUT_S, lambda: self._follower_step(node, run, fm.Failed(ask.number, "no answer"))
                )
            case fm.ApplyDelta():
                self.after(self.random.uniform(0.001, 0.02), lambda: self._apply_delta(node, run))
            case fm.Prove():
                self.after(self.random.uniform(0.01, 0.3), lambda: self._proved(node, run))
            case fm.Copy(path=fm.Path.SKETCH) as copy:
                self.after(self.random.uniform(0.02, 0.3), lambda: self._exchanged(node, run, copy))
            case fm.Copy() as copy:
                leader = self.first.leader
                if copy.path is fm.Path.DELTA and leader is not None and leader.may_ship:
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
        if (self.first.run, run, number) <= last or run <= self.nodes[replica].void:
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

    def _proved(self, node: SimNode, run: int) -> None:
        whole = node.disk.whole
        reason = "" if whole else "the records do not give the root"
        self._follower_step(node, run, fm.Proved(node.disk.position, whole, reason))

    def _exchanged(self, node: SimNode, run: int, copy: fm.Copy) -> None:
        if not node.up or node.run != run:
            return
        leader = self.first.leader
        failed = fm.CopyFailed("cut", node.disk.position, node.disk.filling)
        if leader is None or not leader.serving or self.random.random() < self.loss:
            self._follower_step(node, run, failed)
            return
        # Invariant 2: never by a source that is behind.
        assert self.first.disk.sequence >= node.disk.sequence, (self.first.disk.position, node.disk.position)
        try:
            position = node.disk.repair_by(self.first.disk, recount=copy.recount)
        except errors.Diverged as error:
            self._follower_step(
                node, run, fm.CopyFailed(error.message, node.disk.position, node.disk.filling, unproven=True)
            )
        else:
            self.repairs += 1
            self._follower_step(node, run, fm.Copied(position, 1000))

    def _copied(self, node: SimNode, run: int) -> None:
        if not node.up or node.run != run:
            return
        if not self.first.up or self.random.random() < self.loss:
            self._follower_step(node, run, fm.CopyFailed("cut", node.disk.position, node.disk.filling))
            return
        leader = self.first.leader
        if leader is None or not leader.may_ship or not self.first.disk.whole:
            # The leader refuses while it doubts its copy; a copy of damaged records is not proved by their root.
            self._follower_step(node, run, fm.CopyFailed("refused", node.disk.position, node.disk.filling))
            return
        position = node.disk.replace_by(self.first.disk)
        self._follower_step(node, run, fm.Copied(position, position.count))

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        leader = self.first.leader
        if leader is None or not isinstance(leader.state, lm.Serving | lm.Doubting):
            return
        assert leader.own == self.first.disk.position or self.first.disk.sequence >= leader.own.sequence
        if leader.committed > self.committed_ever:
            holders = [node for node in self.nodes.values() if max(node.disk.sequence, node.held) >= leader.committed]
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
        self.scrub()
        for _ in range(400):
            self.run(0.25)
            leader = self.first.leader
            if leader is not None and any(node.disk.sequence > leader.own.sequence for node in self.nodes.values()):
                # A leader that went back waits for writes to pass a replica that it cannot judge before.
                self.write()
            if leader is not None and leader.serving and all(self._in_step(node) for node in self.nodes.values()):
                break
        else:
            raise AssertionError(
                f"not settled: {[(each.name, each.disk.position, each.disk.whole) for each in self.nodes.values()]}, "
                f"{self.first.leader and self.first.leader.why_not_serving()}, "
                f"{[each.follower and (each.follower.state, each.follower.halted) for each in self.nodes.values()]}"
            )
        assert all(node.disk.whole for node in self.nodes.values()), [node.name for node in self.nodes.values()]
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

    def story(self, seconds: float = 60.0, *, rot: bool = False) -> None:
        """Writes all the time, crashes at random, one loss of data at a time (``rot``: or rot); then `settle`."""
        if rot:
            # NB: a leader that rots while all others are half through a bulk delta of its rows leaves no whole copy
            # anywhere. That takes a person; it is two faults at a time, and not what is promised.
            self.rows_max = 1 << 30
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
            if rot and self.random.random() < 0.02:
                self.scrub()
            if self.now >= next_loss:
                next_loss = self.now + self.random.uniform(5, 20)
                node = self.nodes[self.random.choice(self.names)]
                if rot and self.random.random() < 0.7:
                    self._rot(node)
                else:
                    self._lose(node)

    def _lose(self, node: SimNode) -> None:
        self.settle()
        for each in self.nodes.values():
            each.trusted, each.held = True, 0
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

    def scrub(self) -> None:
        """Look at the records of all who run; tell them what does not add up."""
        for node in self.nodes.values():
            if not node.up or node.disk.whole:
                continue
            if node.leader is not None:
                node.leader.step(lm.Damaged("the records do not give the root"))
                self._leader_turn()
            elif node.follower is not None:
                node.follower.step(fm.Damaged("the records do not give the root"))
                self._follower_turn(node)

    def _rot(self, node: SimNode) -> None:
        """Let the records of one node rot while all others are whole, running or stopped."""
        self.settle()
        self.loss = 0.15
        for each in self.nodes.values():
            each.trusted = True
        if not node.disk.records:
            return
        stopped = self.random.random() < 0.5
        if stopped:
            self.crash(node.name)
        key = self.random.choice(sorted(node.disk.records))
        match self.random.choice(("lose", "change", "add", "forge")):
            case "lose":
                node.disk.rot(lambda records: records.pop(key))
            case "change":
                node.disk.rot(lambda records: records.update({key: (*records[key][:2], b"rotten")}))
            case "add":
                node.disk.rot(lambda records: records.update({b"added": (b"added", node.disk.sequence, b"rotten")}))
            case _ if stopped:
                node.disk.forge(key, b"forged")
        if stopped:
            self.start(node.name)
