"""What transcripts do not show well: bounds, deadlines, the order of effects, the driver's mistakes."""

from __future__ import annotations

import random

import pytest

from srengine import limits
from srengine.consensus import effects as fx
from srengine.consensus import quorum
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState, bytes_of, entry_bytes
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import Append, AppendReply
from srengine.consensus.progress import Flow, Progress
from srengine.consensus.view import LogView
from tests.consensus.groups import GROUP, Group, MemoryLog

FIRST = Entry(1, 1, EntryKind.CONFIGURATION, b"bootstrap", Configuration(("a", "b", "c")))


@pytest.fixture
def group():
    """Three nodes, a leads term 2, everything is committed everywhere."""
    made = Group(("a", "b", "c"))
    made.elect("a")
    return made


def appends(group, target):
    return [out.message for out in group.on_way if out.target == target and isinstance(out.message, Append)]


# --- the order of effects --------------------------------------------------------------------------------------------


def test_what_need_not_wait_for_the_disk_comes_first(group):
    """A leader's messages, committed entries and answers do not wait for the fsync of its next entries."""
    group.propose("a", b"x")
    reply = AppendReply(GROUP, 2, "b", success=True, match_index=3, round=1)
    group["a"].step(fx.Received(reply))
    group["a"].step(fx.Propose(7, b"y"))
    first, second = group["a"].drain(), group["a"].drain()
    assert first.persist is None
    assert [entry.index for entry in first.apply] == [3]
    assert {out.target for out in first.send} == {"b", "c"}
    assert [entry.data for entry in second.persist.entries] == [b"y"]
    assert [accepted.token for accepted in second.accepted] == [7]
    assert not second.send


def test_a_vote_leaves_with_the_state_that_makes_it_durable(group):
    """F01: a follower's answer is never in other effects than what it depends on."""
    machine = group["b"]
    message = Append(GROUP, 2, "a", 2, 2, 2, 1, (Entry(3, 2, EntryKind.COMMAND, b"x"),))
    machine.step(fx.Received(message))
    effects = machine.drain()
    assert effects.persist.entries == message.entries
    assert [type(out.message) for out in effects.send] == [AppendReply]


def test_nothing_is_stepped_while_something_is_persisted(group):
    """A driver that steps between a drain and its Persisted is told so."""
    group["a"].step(fx.Propose(1, b"x"))
    assert group["a"].drain().send
    assert group["a"].drain().persist
    with pytest.raises(AssertionError):
        group["a"].step(fx.Propose(2, b"y"))


def test_a_group_of_one_says_nothing_of_a_term_that_is_not_durable():
    """A sole voter leads at once, but its learners do not hear of the term before it is on the disk."""
    log = MemoryLog([Entry(1, 1, EntryKind.CONFIGURATION, b"", Configuration(("a",), ("l",)))])
    made = {"group": GROUP, "node_id": "a", "log": log, "hard_state": HardState(), "applied_index": 0}
    machine = RaftMachine(**made, timing=fx.Timing(), random=random.Random(1), now=0.0, trusted=True)
    machine.tick(0.0)
    effects = machine.drain()
    assert machine.role is fx.Role.LEADER
    assert effects.persist.hard_state == HardState(2, "a")
    machine.tick(0.2)
    assert not machine.drain().send
    log.persist(effects.persist.entries)
    machine.step(fx.Persisted(2))
    assert [out.target for out in machine.drain().send] == ["l"]


def test_a_drained_machine_has_nothing_to_say(group):
    """Effects are there once, and false when there is nothing to do."""
    group.propose("a", b"x")
    assert not group["a"].drain()


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_proposals_are_refused_when_too_much_is_not_committed(group):
    """A leader without followers takes what fits, and at least one."""
    group.cut = {("a", "b"), ("a", "c")}
    half = bytes(limits.UNCOMMITTED_BYTES_MAX // 2)
    tokens = [group.propose("a", half) for _ in range(3)]
    assert tokens[0] in group.nodes["a"].accepted
    assert group.nodes["a"].refused[tokens[2]].why is fx.Why.FULL
    group.cut.clear()
    group.run(0.3)
    assert group.propose("a", half) in group.nodes["a"].accepted


def test_one_entry_larger_than_the_bound_is_taken_alone(group, monkeypatch):
    """An entry that is larger than all that may wait is taken when nothing waits."""
    monkeypatch.setattr(limits, "UNCOMMITTED_BYTES_MAX", 100)
    assert group.propose("a", bytes(200)) in group.nodes["a"].accepted
    assert group.nodes["a"].refused[group.propose("a", b"x")].why is fx.Why.FULL


def test_an_entry_has_a_largest_size(group, monkeypatch):
    """Nothing is taken that no message and no transaction could hold."""
    monkeypatch.setattr(limits, "ENTRY_BYTES_MAX", 100)
    assert group.nodes["a"].refused[group.propose("a", bytes(101))].why is fx.Why.INVALID


def test_reads_that_wait_are_bounded(group, monkeypatch):
    """At a leader, at a follower, and for a follower at the leader."""
    monkeypatch.setattr(limits, "READS_WAITING_MAX", 2)
    group.cut = {(one, other) for one in "abc" for other in "abc"}
    for name in "ab":
        tokens = [group.read(name) for _ in range(3)]
        assert list(group.nodes[name].refused) == tokens[2:]


def test_messages_on_their_way_are_bounded(group, monkeypatch):
    """F26: a follower that does not answer gets a window full of messages, and heartbeats, no more."""
    monkeypatch.setattr(limits, "IN_FLIGHT_MESSAGES_MAX", 3)
    for _ in range(10):
        group.propose("a", b"x")
    assert len(appends(group, "b")) == 3
    group.flow()
    assert group["b"].last_index == 12
    assert group["a"].progress["b"].in_flight_bytes == 0


def test_bytes_on_their_way_are_bounded(group, monkeypatch):
    """The window is full when it holds its bytes; one message may pass over it."""
    monkeypatch.setattr(limits, "APPEND_BYTES_MAX", 1000)
    monkeypatch.setattr(limits, "IN_FLIGHT_BYTES_MAX", 2000)
    for _ in range(10):
        group.propose("a", bytes(900))
    assert len(appends(group, "b")) == 3
    group.flow()
    assert group["b"].last_index == 12


def test_everybody_is_sent_what_he_lacks(group, monkeypatch):
    """Peers that lack the same are said the same, once made; one that lacks more gets more in the same turn."""
    monkeypatch.setattr(limits, "IN_FLIGHT_MESSAGES_MAX", 1)
    group.propose("a", b"x")
    [to_b], [to_c] = appends(group, "b"), appends(group, "c")
    assert to_b is to_c
    assert [entry.data for entry in to_b.entries] == [b"x"]
    group.on_way.clear()

    def answer(name, index):
        return fx.Received(AppendReply(GROUP, 2, name, success=True, match_index=index, round=1))

    def sent():
        return {
            name: [[e.data for e in said.entries] for said in appends(group, name) if said.entries] for name in "bc"
        }

    group.step("a", answer("b", 3))
    group.propose("a", b"y")
    assert sent() == {"b": [[b"y"]], "c": []}
    group.on_way.clear()
    for given in (answer("b", 4), answer("c", 3), fx.Propose(99, b"z")):
        group["a"].step(given)
    group.settle("a")
    assert sent() == {"b": [[b"z"]], "c": [[b"y", b"z"]]}


@pytest.mark.parametrize("doubted", ["b", "c"])
def test_the_proof_of_trust_is_said_to_whom_it_concerns(group, doubted):
    """Also when others are said the same but for that."""
    doubt = AppendReply(GROUP, 2, doubted, success=True, match_index=2, round=1, votes=False, nonce=7)
    group.step("a", fx.Received(doubt))
    for name in sorted({"b", "c"} - {doubted}):
        group.step("a", fx.Received(AppendReply(GROUP, 2, name, success=True, match_index=3, round=1)))
    assert group["a"].commit_index == 3, "the barrier is committed"
    group.on_way.clear()
    group.propose("a", b"x")
    said = {name: (message.nonce, message.barrier) for name in "bc" for message in appends(group, name)}
    assert said == {name: (7, 3) if name == doubted else (0, 0) for name in "bc"}


def test_one_message_holds_many_small_entries(group):
    """What was proposed in one turn leaves in one message."""
    for token in range(50):
        group["a"].step(fx.Propose(token, b"x"))
    group.settle("a")
    (message,) = appends(group, "b")
    assert len(message.entries) == 50


def test_a_leader_counts_its_own_copy_when_it_is_durable(group):
    """Entries leave before the leader's own disk has them. Until it has, one answer of three is no majority, two are,
    and even then nothing is applied here.
    """
    machine, node = group["a"], group.nodes["a"]
    machine.step(fx.Propose(1, b"x"))
    assert [outgoing.target for outgoing in machine.drain().send] == ["b", "c"]
    machine.step(fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=3, round=1)))
    assert machine.commit_index == 2
    machine.step(fx.Received(AppendReply(GROUP, 2, "c", success=True, match_index=3, round=1)))
    assert machine.commit_index == 3
    effects = machine.drain()
    assert effects.persist is None
    assert not effects.apply
    node.log.persist(machine.drain().persist.entries)
    machine.step(fx.Persisted(3))
    assert [entry.index for entry in machine.drain().apply] == [3]


def test_committed_entries_are_handed_out_in_bounded_portions(group, monkeypatch):
    """No more than the bound is handed out and not applied; the rest follows."""
    monkeypatch.setattr("srengine.consensus.machine.APPLY_BYTES_MAX", 300)
    machine, node = group["a"], group.nodes["a"]
    for token in range(10):
        machine.step(fx.Propose(token, b"x"))
    assert machine.drain().send
    node.log.persist(machine.drain().persist.entries)
    machine.step(fx.Persisted(12))
    machine.step(fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=12, round=1)))
    handed = machine.drain().apply
    assert [entry.index for entry in handed] == [3, 4, 5, 6]
    assert [entry.index for entry in machine.drain().apply] == [7]
    assert not machine.drain().apply
    machine.step(fx.Applied(5))
    assert [entry.index for entry in machine.drain().apply] == [8, 9]


def test_rounds_that_are_too_old_renew_nothing(group, monkeypatch):
    """An answer to a round whose beginning is forgotten counts as no contact."""
    monkeypatch.setattr(limits, "ROUNDS_KEPT_MAX", 2)
    for _ in range(4):
        group.now += 0.1
        group["a"].tick(group.now)
        group.settle("a")
    before = group["a"].progress["b"].acked_at
    group.step("a", fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=2, round=3)))
    assert group["a"].progress["b"].acked_at == before
    group.step("a", fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=2, round=5)))
    assert group["a"].progress["b"].acked_at == group.now


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_tick_at_the_deadline_moves_it(group):
    """A driver that ticks at next_deadline and nothing else never spins and misses nothing."""
    for name in "abc":
        machine = group[name]
        for _ in range(30):
            due = machine.next_deadline
            machine.tick(due)
            while (said := machine.drain()).persist:
                group.persist(group.nodes[name], said)
            assert machine.next_deadline > due


def test_a_leader_is_due_when_its_disk_has_taken_too_long():
    """Between two heartbeats as well: it gives up at the very moment, though it has a majority by itself."""
    group = Group(("a",), timing=fx.Timing(heartbeat_s=0.4, election_s_min=1.0))
    group.elect("a")
    group.blocked.add("a")
    group.propose("a", b"x")
    since = group["a"].persisting_since
    while group["a"].role is fx.Role.LEADER:
        assert group.now < group["a"].next_deadline
        group.now = group["a"].next_deadline
        group["a"].tick(group.now)
        group.settle("a")
    assert group.now == since + 1.0


def test_a_follower_that_waits_for_its_disk_is_not_due(group):
    """It may do nothing until it is persisted, so no deadline of its own wakes the driver."""
    group.blocked.add("b")
    group.propose("a", b"x")
    group.flow()
    assert group["b"].persisting_since is not None
    assert group["b"].next_deadline == float("inf")


def test_a_node_without_group_campaigns_never():
    """An empty log has no configuration: years pass."""
    made = {"group": GROUP, "node_id": "a", "log": MemoryLog(), "hard_state": HardState(), "applied_index": 0}
    machine = RaftMachine(**made, timing=fx.Timing(), random=random.Random(1), now=0.0, trusted=True)
    for year in range(10):
        machine.tick(year * 3e7)
        assert not machine.drain()
    assert (machine.role, machine.term) == (fx.Role.LEARNER, 0)


def test_time_that_goes_back_stands_still(group):
    """F22: an earlier time than the last one changes nothing."""
    group["a"].tick(group.now - 5)
    assert group["a"].now == group.now


# --- what the driver may ask -----------------------------------------------------------------------------------------


def test_floor_at_has_the_configuration_of_its_place(group):
    """The floor of an index carries who belonged to the group there, not who does now."""
    group.propose("a", b"members", Configuration(("a", "b", "c"), ("d",)))
    group.flow()
    assert group["a"].floor_at(2) == Floor(2, 2, Configuration(("a", "b", "c")))
    assert group["a"].floor_at(3) == Floor(3, 2, Configuration(("a", "b", "c"), ("d",)))


def test_a_trimmed_log_serves_what_is_left(group):
    """After Trimmed the machine asks its log for nothing that is gone, and still knows the floor's term."""
    for _ in range(4):
        group.propose("a", b"x")
    group.flow()
    machine = group["a"]
    floor = machine.floor_at(4)
    group.nodes["a"].log.trim(floor)
    group.step("a", fx.Trimmed(floor, b"here"))
    assert (machine.view.term_at(3), machine.view.term_at(4), machine.view.term_at(5)) == (None, 2, 2)
    assert machine.reference == b"here"
    assert machine.configuration == FIRST.configuration


def test_a_log_may_not_be_trimmed_above_what_is_applied(group):
    """Our own mistake, found at once."""
    group.propose("a", b"x")
    with pytest.raises(AssertionError):
        group["a"].floor_at(3)


def test_leases_need_an_entry_of_the_own_term(group):
    """A leader that has committed nothing yet may have less than what is committed: no lease."""
    assert group["a"].lease_until > group.now
    assert group["b"].lease_until == float("-inf")
    group["a"].state.first_index = 99
    assert group["a"].lease_until == float("-inf")


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "agreed"),
    [((5,), 5), ((5, 3), 3), ((5, 3, 9), 5), ((5, 3, 9, 1), 3), ((5, 3, 9, 1, 7), 5)],
)
def test_what_a_majority_has_reached(held, agreed):
    """The largest value that more than half of the voters have."""
    assert quorum.agreed(held) == agreed


def test_two_majorities_share_a_voter():
    """Of one configuration, and of two that differ by one voter."""
    for voters in range(1, 8):
        assert 2 * quorum.majority(voters) > voters
        assert quorum.majority(voters) + quorum.majority(voters + 1) > voters + 1


def test_fitting_goes_back_by_terms():
    """5.3: the place where two logs may still be equal is found without looking at every entry."""
    terms = [1, 1, 1, 4, 4, 5, 5, 6, 6, 6]
    view = LogView(MemoryLog([Entry(index, term, EntryKind.NOOP) for index, term in enumerate(terms, 1)]))
    assert [view.fitting(10, term) for term in (6, 5, 4, 3, 1, 0)] == [10, 7, 5, 3, 3, 0]
    assert view.fitting(4, 9) == 4


def test_a_replaced_entry_counts_as_durable_no_more():
    """While a durable entry is being replaced, the log ends before it."""
    view = LogView(MemoryLog([Entry(1, 1, EntryKind.NOOP), Entry(2, 1, EntryKind.NOOP), Entry(3, 1, EntryKind.NOOP)]))
    view.append([Entry(2, 2, EntryKind.NOOP)])
    assert (view.durable_index, view.last_index, view.last_term, view.term_at(3)) == (1, 2, 2, None)


def test_installing_keeps_what_matches_and_drops_what_does_not():
    """Rule 9 of the formats: entries behind the floor stay if the entry at it has its term."""
    for term, last in ((1, 3), (2, 2)):
        log = MemoryLog([FIRST, Entry(2, 1, EntryKind.NOOP), Entry(3, 1, EntryKind.NOOP)])
        view = LogView(log)
        floor = Floor(2, term, FIRST.configuration)
        log.install(floor)
        view.installed(floor)
        assert (view.floor, view.last_index, view.configuration) == (floor, last, FIRST.configuration)


def test_size_of_an_entry_counts_empty_ones():
    """Entries without data are bounded, too."""
    empty = Entry(1, 1, EntryKind.NOOP)
    assert entry_bytes(empty) > 0
    change = Entry(2, 1, EntryKind.CONFIGURATION, b"xy", Configuration(("a", "b"), ("c",)))
    assert entry_bytes(change) > entry_bytes(empty) + 2 + 3 * 32
    for entries in ((), (empty,), (empty, change), (change, empty, empty)):
        assert bytes_of(entries) == sum(map(entry_bytes, entries))


def test_late_refusals_do_not_move_a_peer_back():
    """A refusal of something below what is known to match, or not of the last question, is ignored."""
    peer = Progress(next_index=10, match_index=6)
    peer.refused(5, 3)
    assert (peer.flow, peer.next_index) == (Flow.REPLICATE, 10)
    peer.refused(9, 3)
    assert (peer.flow, peer.next_index) == (Flow.PROBE, 7)
    peer.refused(9, 2)
    assert peer.next_index == 7


@pytest.mark.parametrize("flow", [Flow.PROBE, Flow.REPLICATE])
def test_a_peer_that_refuses_what_it_matched_is_believed(flow):
    """F14: an acknowledgement of before a disk was put back came after the peer's new nonce: it is not held on to."""
    peer = Progress(next_index=10, match_index=9, counted_index=9, flow=flow)
    peer.refused(9, 3)
    assert (peer.flow, peer.match_index, peer.counted_index, peer.next_index) == (Flow.PROBE, 0, 0, 3)
