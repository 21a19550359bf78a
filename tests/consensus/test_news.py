"""The news that more is committed: it goes with what is sent anyway, or by itself (`effects.Timing.news_s`)."""

from __future__ import annotations

import pytest

from srengine.consensus import effects as fx
from srengine.consensus.entries import Configuration
from srengine.consensus.messages import Append, AppendReply, ReadIndex, ReadIndexReply, Vote
from srengine.consensus.progress import Flow
from tests.consensus.groups import GROUP, Group

NEWS_S = 0.01


@pytest.fixture
def group():
    """Three nodes, a leads, everybody knows that everything is committed."""
    made = Group(("a", "b", "c"), timing=fx.Timing(news_s=NEWS_S))
    made.elect("a")
    made.run(0.35)  # between two heartbeats
    assert {node.machine.commit_index for node in made.nodes.values()} == {2}
    return made


def commit(group, data, configuration=None):
    """Have an entry committed at the leader, which nobody else knows, and take what it says then."""
    group.propose("a", data, configuration)
    sent, group.on_way = group.on_way, []
    answers = []
    for out in sent:
        group.deliver(out)
        answers, group.on_way = answers + group.on_way, []
    for out in answers:
        group.deliver(out)
    said, group.on_way = group.on_way, []
    assert group["a"].commit_index == group["a"].last_index > group["b"].commit_index
    return said


def test_news_goes_with_the_next_entries(group):
    """An entry that is committed is told of with the next one, and never by a message of its own."""
    assert commit(group, b"x") == []
    group.propose("a", b"y")
    told = {out.target: out.message for out in group.on_way}
    assert {message.commit_index for message in told.values()} == {3}
    assert {len(message.entries) for message in told.values()} == {1}
    assert group["a"].next_deadline == group["a"].state.heartbeat_at, "nobody waits for news any more"
    group.flow()
    assert {group[name].commit_index for name in "bc"} == {3}


def test_news_is_sent_when_nothing_else_comes(group):
    """What has waited for its time is sent once, to everybody; the machine is due then, and not before."""
    assert commit(group, b"x") == []
    due = group["a"].next_deadline
    assert due == pytest.approx(group.now + NEWS_S)
    group.now = due
    group["a"].tick(group.now)
    group.settle("a")
    assert [(out.target, out.message.commit_index, out.message.entries) for out in group.on_way] == [
        ("b", 3, ()),
        ("c", 3, ()),
    ]
    group.on_way.clear()
    assert group["a"].next_deadline > group.now + NEWS_S
    group["a"].tick(group.now)
    assert group["a"].drain() is fx.NOTHING


def test_an_answer_does_not_put_the_news_off(group):
    """Who has not been told yet and says something meanwhile is told when it was to be told before."""
    assert commit(group, b"x") == []
    due = group["a"].next_deadline
    group.now += NEWS_S / 2
    round_ = group["a"].state.round
    group.step("a", fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=3, round=round_)))
    assert group["a"].next_deadline == due


def test_news_is_not_sent_after_a_heartbeat(group):
    """A heartbeat says it, too; when the time of the news comes nobody has to be told."""
    group.now = group["a"].state.heartbeat_at - NEWS_S / 2
    assert commit(group, b"x") == []
    group.now += NEWS_S / 2
    group["a"].tick(group.now)
    group.settle("a")
    assert {out.message.commit_index for out in group.on_way} == {3}
    group.on_way.clear()
    group.now += NEWS_S
    group["a"].tick(group.now)
    assert group["a"].drain() is fx.NOTHING
    assert group["a"].next_deadline > group.now


def test_news_does_not_make_a_leader_due_that_waits_for_its_disk(group):
    """Nothing is sent by the way while the log is written, so there is nothing to be awake for."""
    assert commit(group, b"x") == []
    due = group["a"].next_deadline
    group.blocked.add("a")
    group.propose("a", b"y")
    assert group["a"].next_deadline > due
    group.now = due
    group["a"].tick(group.now)
    assert group["a"].drain() is fx.NOTHING
    assert group["a"].next_deadline > due
    group.unblock("a")
    group["a"].tick(group.now)
    assert group["a"].drain() is fx.NOTHING
    assert group["a"].next_deadline > due


def test_who_could_not_be_told_is_told_when_it_has_answered(group):
    """A peer that the leader is feeling its way to misses the news; it is planned again with its answer."""
    state = group["a"].state
    state.peers["b"].refused(2, 2)
    assert state.peers["b"].flow is Flow.PROBE
    group.cut = {("a", "b")}
    assert commit(group, b"x") == []
    group.now = group["a"].next_deadline
    group["a"].tick(group.now)
    group.settle("a")
    assert [out.target for out in group.on_way] == ["c"]
    group.on_way.clear()
    group.step("a", fx.Received(AppendReply(GROUP, 2, "b", success=True, match_index=3, round=state.round)))
    assert state.peers["b"].flow is Flow.REPLICATE
    group.now = group["a"].next_deadline
    group["a"].tick(group.now)
    group.settle("a")
    assert [(out.target, out.message.commit_index) for out in group.on_way] == [("b", 3)]


def test_an_answer_under_a_lease_brings_the_news():
    """H10: who asked for an index to read at waits until it has applied that, so it hears first that it is committed.
    (Without a lease the round that confirms the leader says so.)
    """
    group = Group(("a", "b", "c"), timing=fx.Timing(lease_reads=True, news_s=NEWS_S))
    group.elect("a")
    group.run(0.35)
    assert commit(group, b"x") == []
    group.step("a", fx.Received(ReadIndex(GROUP, 2, "b", 9)))
    kinds = [(out.target, type(out.message), getattr(out.message, "commit_index", None)) for out in group.on_way]
    assert kinds == [("b", Append, 3), ("b", ReadIndexReply, None)]


def test_who_joins_is_told_at_once(group):
    """A node that has just become a peer knows nothing: the first message to it says what is committed."""
    group.add("d", type(group.nodes["b"].log)())
    group.propose("a", b"", Configuration(("a", "b", "c"), ("d",)))
    assert {out.message.commit_index for out in group.on_way if out.target == "d"} == {2}


def test_a_removed_node_that_stands_for_election_is_told_at_once(group):
    """It is met again as somebody who knows nothing, and nothing else is on its way to it."""
    group.propose("a", b"", Configuration(("a", "b")))
    group.flow()
    group.run(1.5)  # it has heard of it, and is forgotten
    assert set(group["a"].progress) == {"b"}
    group.on_way.clear()
    group.step("a", fx.Received(Vote(GROUP, 3, "c", 2, 2, pre=True)))
    assert [(out.target, out.message.commit_index) for out in group.on_way if isinstance(out.message, Append)] == [
        ("c", 3)
    ]


def test_a_leader_that_was_removed_says_so_before_it_leaves(group):
    """The news that it is not in the group any more does not wait: nobody else would tell it."""
    said = commit(group, b"", Configuration(("b", "c")))
    assert group["a"].role is not fx.Role.LEADER
    assert [(out.target, out.message.commit_index) for out in said if isinstance(out.message, Append)] == [
        ("b", 3),
        ("c", 3),
    ]
