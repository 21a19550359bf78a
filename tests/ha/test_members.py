"""Members: admission, stability, roles, addresses, removal, tickets; and which change is allowed now."""

from __future__ import annotations

import random

import msgspec
import pytest

from srengine import errors
from srengine.consensus.entries import Configuration
from srengine.ha import members as m
from srengine.ha import membership as ms
from srengine.ha.journal import Command
from srengine.ha.metadata import Applying
from srengine.types import NodeId
from tests.ha.agreed import add, address, bootstrap, command, node_id


def member(node, name: str) -> m.Member:
    found = m.find_member(node.store, name)
    assert found is not None
    return found


def holder(node, name: str) -> m.Holder:
    found = member(node, name)
    return m.Holder(found.node_id, found.incarnation)


def stable(name: str, number: int, *, to: bool = True) -> Command:
    return command(m.SET_STABLE, m.SetStable(name, node_id(number), to))


def role(name: str, number: int, to: m.MemberRole) -> Command:
    return command(m.SET_ROLE, m.SetRole(name, node_id(number), to))


def remove(name: str, number: int) -> Command:
    return command(m.REMOVE, m.RemoveMember(name, node_id(number)))


def moved(name: str, number: int, to: int) -> Command:
    return command(m.UPDATE_ADDRESS, m.UpdateAddress(name, node_id(number), address(to)))


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_a_cluster_is_made_once(node):
    """The first entry names the first members; a second one, or one elsewhere in the journal, is a Conflict."""
    node.must(bootstrap())
    assert node.names() == ["n0", "n1", "n2"]
    assert m.read_membership(node.store) == m.Membership(1, 3, 6)
    assert m.read_cluster(node.store).name == "prod"
    node.refused(bootstrap(), errors.Conflict)


@pytest.mark.parametrize("what", ["name", "address", "node_id"])
def test_first_members_are_different(node, what):
    """Two first members with the same name, address or id are refused; so are ids for some only."""
    two = [m.Member("a", address(1), 0, node_id=node_id(1)), m.Member("b", address(2), 1, node_id=node_id(2))]
    two[1] = msgspec.structs.replace(two[1], **{what: getattr(two[0], what)})
    node.refused(command(m.BOOTSTRAP, m.Bootstrap(m.Cluster("c" * 32, "prod"), tuple(two))), errors.InvalidValue)
    assert node.names() == []


def test_all_first_members_have_ids_or_none(node):
    """A cluster cannot be half identified."""
    some = (m.Member("a", address(1), 0, node_id=node_id(1)), m.Member("b", address(2), 1))
    node.refused(command(m.BOOTSTRAP, m.Bootstrap(m.Cluster("c" * 32, "prod"), some)), errors.InvalidValue)


# --- join, unstable, stable, leave
# -------------------------------------------------------------------------------------


def test_the_life_of_a_follower(node):
    """B10: join, unstable, stable and leave stand in one log, in this order, with the indexes of the journal."""
    node.must(bootstrap())
    joined = node.must(add("n3", 9))
    assert (member(node, "n3").stable, member(node, "n3").incarnation, member(node, "n3").number) == (False, joined, 3)
    promoted = node.must(stable("n3", 9))
    left = node.must(remove("n3", 9))
    events = [(event.index, event.event) for event in m.read_events(node.store) if event.name == "n3"]
    assert events == [(joined, "joined"), (joined, "unstable"), (promoted, "stable"), (left, "left")]
    assert m.find_removed(node.store, node_id(9)).index == left
    assert node.names() == ["n0", "n1", "n2"]


def test_an_observer_is_never_unstable(node):
    """H18: an observer learns for ever; making it stable is refused."""
    node.must(bootstrap())
    node.must(add("o1", 9, role="observer"))
    assert not member(node, "o1").votes
    node.refused(stable("o1", 9), errors.Conflict)
    assert ms.configuration_of(m.read_members(node.store)).learners == (node_id(9),)


def test_an_unstable_mark_is_a_row(node, other):
    """B11: the set of unstable nodes is in the agreed state, so any later leader has it."""
    for each in (node, other):
        each.must(bootstrap())
        each.must(add("n3", 9))
        each.fence(2, term=2)
    for each in (node, other):
        assert [row.name for row in m.read_members(each.store) if not row.stable] == ["n3"]
    assert node.machine.digest() == other.machine.digest()


def test_events_and_removed_ids_are_bounded(node, monkeypatch):
    """The tables keep the latest rows only."""
    monkeypatch.setattr(m, "EVENTS_KEPT", 10)
    monkeypatch.setattr(m, "REMOVED_KEPT", 3)
    node.must(bootstrap(1))
    for number in range(10, 20):
        node.must(add("x", number))
        node.must(remove("x", number))
    assert len(m.read_events(node.store)) == 10
    assert m.read_events(node.store)[-1].event == "left"
    kept = [number for number in range(10, 20) if m.find_removed(node.store, node_id(number)) is not None]
    assert kept == [17, 18, 19]


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_removed_id_stays_removed(node):
    """F32, H12: a removed id is told so, with the epoch, and is never admitted again; the name may be, by another
    id.
    """
    node.must(bootstrap())
    node.fence()
    node.fence(2)
    node.must(remove("n2", 3))
    refusal = node.refused(add("n2", 3), errors.Removed)
    assert refusal.epoch == 2
    assert refusal.exit_code == 12
    again = node.must(add("n2", 9))
    assert (member(node, "n2").node_id, member(node, "n2").incarnation) == (node_id(9), again)


def test_a_wiped_node_comes_back_under_its_name(node):
    """H29, F12: another id takes the name of the wiped one in one entry, unstable, with a later incarnation."""
    node.must(bootstrap())
    before = member(node, "n1")
    index = node.must(add("n1", 9, at=1, replaces=holder(node, "n1")))
    after = member(node, "n1")
    assert (after.node_id, after.number, after.stable) == (node_id(9), before.number, False)
    assert after.incarnation == index > before.incarnation
    assert m.find_removed(node.store, before.node_id) is not None
    node.refused(stable("n1", 2), errors.MemberNotFound)


def test_the_newer_of_two_ids_at_one_address_wins(node):
    """B16, H15: who is added at an address in use replaces exactly the one it names, in the same entry."""
    node.must(bootstrap())
    node.must(add("n9", 9, at=2, replaces=holder(node, "n2")))
    assert node.names() == ["n0", "n1", "n9"]
    assert [event.event for event in m.read_events(node.store) if event.name == "n2"][-1] == "replaced"


@pytest.mark.parametrize("replaces", [None, ("other", 1), ("same", 99)])
def test_nobody_is_removed_by_mistake(node, replaces):
    """B16: without naming the holder, or naming another id or an older admission of it, nothing happens."""
    node.must(bootstrap())
    before = m.membership_digest(node.store)
    named = None
    if replaces is not None:
        named = m.Holder(node_id(1) if replaces[0] == "other" else node_id(3), replaces[1])
    node.refused(add("n9", 9, at=2, replaces=named), errors.Conflict)
    assert m.membership_digest(node.store) == before


def test_one_entry_replaces_one_member(node):
    """A name of one member and the address of another: Conflict; so is replacing somebody who is somewhere else."""
    node.must(bootstrap())
    node.refused(add("n1", 9, at=2, replaces=holder(node, "n1")), errors.Conflict)
    node.refused(add("n9", 9, at=9, replaces=holder(node, "n1")), errors.Conflict)
    assert node.names() == ["n0", "n1", "n2"]


def test_racing_replacements_never_remove_a_third(node):
    """B16: a thousand races for one address, each contender having read the members before the first entry: one
    wins, and nobody but the one that all of them named is gone.
    """
    node.must(bootstrap(1))
    dice = random.Random(16)
    node.must(add("x", 100, at=50))
    number = 100
    for _ in range(1000):
        named = m.Holder(node_id(number), member(node, "x").incarnation)
        contenders = [number + 1 + offset for offset in range(dice.choice((2, 3)))]
        racing = enumerate(
            (add("x", each, at=50, replaces=named) for each in contenders), node.machine.applied_index + 1
        )
        outcomes = [
            outcome.refusal for outcome in node.machine.apply_all([Applying(index, 1, each) for index, each in racing])
        ]
        assert outcomes[0] is None
        assert all(isinstance(refusal, errors.Conflict) for refusal in outcomes[1:])
        assert node.names() == ["n0", "x"]
        assert member(node, "x").node_id == node_id(contenders[0])
        number = contenders[0]


def test_an_id_is_a_member_once(node):
    """The same id under another name is a Conflict; a bad id, name or address is InvalidValue."""
    node.must(bootstrap())
    node.refused(add("n9", 1, at=9), errors.Conflict)
    node.refused(command(m.ADD, m.AddMember("n9", "short", address(9))), errors.InvalidValue)
    node.refused(command(m.ADD, m.AddMember("a b", node_id(9), address(9))), errors.InvalidValue)
    node.refused(command(m.ADD, m.AddMember("n9", node_id(9), "nowhere")), errors.InvalidValue)
    node.refused(Command(m.ADD, b"\xff"), errors.InvalidValue)


# --- changes ---------------------------------------------------------------------------------------------------------


def test_an_address_changes_live(node):
    """B15, H15: one entry moves a member; the address of another is a Conflict, an unknown member is not found."""
    node.must(bootstrap())
    node.must(moved("n2", 3, 20))
    assert member(node, "n2").address == address(20)
    node.refused(moved("n2", 3, 1), errors.Conflict)
    node.refused(moved("n7", 3, 21), errors.MemberNotFound)
    node.refused(moved("n2", 1, 21), errors.MemberNotFound)
    version = m.read_membership(node.store).version
    node.must(moved("n2", 3, 20))
    assert m.read_membership(node.store).version == version


def test_roles_change_both_ways(node):
    """B32: a follower becomes an observer, and an observer an unstable follower first."""
    node.must(bootstrap())
    node.must(role("n2", 3, "observer"))
    assert ms.configuration_of(m.read_members(node.store)) == Configuration(
        (NodeId(node_id(1)), NodeId(node_id(2))), (NodeId(node_id(3)),)
    )
    node.must(role("n2", 3, "follower"))
    assert (member(node, "n2").role, member(node, "n2").stable) == ("follower", False)
    node.must(stable("n2", 3))
    assert member(node, "n2").votes


def test_a_mark_for_an_old_id_is_refused(node):
    """A promotion that was meant for a node that was replaced meanwhile does not promote the new one."""
    node.must(bootstrap())
    node.must(add("n3", 8))
    node.must(add("n3", 9, at=8, replaces=holder(node, "n3")))
    node.refused(stable("n3", 8), errors.MemberNotFound)
    assert not member(node, "n3").stable


# --- group size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joiners", range(6))
def test_the_override_of_the_group_size(node, joiners):
    """B12, H14: followers without the unstable ones while there are any, 0 when there are none; voters never change."""
    node.must(bootstrap())
    for number in range(joiners):
        node.must(add(f"j{number}", 20 + number))
    size = ms.group_size(m.read_members(node.store))
    assert size == (3 + joiners, joiners, 0, 3, joiners, 3 if joiners else 0)
    for number in range(joiners):
        node.must(stable(f"j{number}", 20 + number))
    assert ms.group_size(m.read_members(node.store)) == (3 + joiners, 0, 0, 3 + joiners, 0, 0)


def test_views_are_equal_after_churn(node, other):
    """H27, B09: after the same script of changes, refused ones included, version, digest and lists are equal."""
    dice = random.Random(27)
    script = [bootstrap()]
    for step in range(300):
        number = dice.randrange(1, 12)
        name = f"n{dice.randrange(6)}"
        script.append(
            dice.choice(
                [
                    add(name, number, role=dice.choice(("follower", "observer"))),
                    remove(name, number),
                    stable(name, number, to=bool(step % 3)),
                    role(name, number, dice.choice(("follower", "observer"))),
                    moved(name, number, dice.randrange(30)),
                ]
            )
        )
    for each in (node, other):
        changed = sum(each.put(change).refusal is None for change in script)
        assert 5 < changed < 250
    assert m.read_membership(node.store) == m.read_membership(other.store)
    assert m.membership_digest(node.store) == m.membership_digest(other.store)
    assert m.read_members(node.store) == m.read_members(other.store)


# --- tickets ---------------------------------------------------------------------------------------------------------


def test_a_ticket_admits_once(node):
    """A ticket admits one node, as what it says, under the name that it says; the journal never holds the secret."""
    node.must(bootstrap())
    secret, mint = ms.mint_ticket("observer", "o1")
    assert secret.encode() not in mint.body
    node.must(mint)
    digest = ms.ticket_digest(secret)
    node.refused(add("o1", 9, ticket=digest), errors.Denied)
    node.refused(add("o2", 9, ticket=digest, role="observer"), errors.Denied)
    node.refused(add("o1", 9, ticket=ms.ticket_digest("guess"), role="observer"), errors.Denied)
    node.must(add("o1", 9, ticket=digest, role="observer"))
    node.refused(add("o2", 8, ticket=digest, role="observer"), errors.Denied)
    assert m.read_tickets(node.store) == []


def test_a_refused_add_keeps_the_ticket(node):
    """What did not happen did not use the ticket up."""
    node.must(bootstrap())
    secret, mint = ms.mint_ticket()
    node.must(mint)
    node.refused(add("n0", 9, ticket=ms.ticket_digest(secret)), errors.Conflict)
    node.must(add("n3", 9, ticket=ms.ticket_digest(secret)))


def test_tickets_end_by_an_entry(node):
    """An entry ends a ticket; a leader proposes it when it has seen the ticket for an hour of its own clock."""
    node.must(bootstrap())
    secret, mint = ms.mint_ticket()
    node.must(mint)
    keeper = ms.TicketKeeper()
    assert keeper.due(100.0, m.read_tickets(node.store)) == []
    assert keeper.due(100.0 + ms.TICKET_S - 1, m.read_tickets(node.store)) == []
    (end,) = keeper.due(100.0 + ms.TICKET_S, m.read_tickets(node.store))
    node.must(end)
    node.refused(add("n3", 9, ticket=ms.ticket_digest(secret)), errors.Denied)
    node.refused(end, errors.NotFound)
    assert keeper.due(9e9, m.read_tickets(node.store)) == []


def test_tickets_are_bounded(node):
    """A leader does not fill the tables with tickets."""
    for _ in range(m.TICKETS_MAX):
        node.must(ms.mint_ticket()[1])
    node.refused(ms.mint_ticket()[1], errors.QuotaExceeded)


# --- plans -----------------------------------------------------------------------------------------------------------

LEADER = NodeId(node_id(1))


def planned(node, change: Command, *alive: int, force: bool = False) -> ms.Plan:
    return ms.plan(
        node.store,
        change,
        index=node.machine.applied_index + 1,
        leader=LEADER,
        alive={NodeId(node_id(number)) for number in alive},
        force=force,
    )


def voters(plan: ms.Plan) -> list[int]:
    assert plan.configuration is not None
    return [int(each, 16) for each in plan.configuration.voters]


def learners(plan: ms.Plan) -> list[int]:
    assert plan.configuration is not None
    return [int(each, 16) for each in plan.configuration.learners]


def test_a_joiner_becomes_a_learner_and_then_a_voter(node):
    """H13, B11: adding changes learners alone; promoting adds one voter."""
    node.must(bootstrap())
    joining = planned(node, add("n3", 9), 1, 2, 3)
    assert (voters(joining), learners(joining)) == ([1, 2, 3], [9])
    node.must(add("n3", 9))
    promoting = planned(node, stable("n3", 9), 1, 2, 3, 9)
    assert (voters(promoting), learners(promoting)) == ([1, 2, 3, 9], [])


def test_the_leader_is_not_removed(node):
    """B14: removing the leader, making it a learner or an observer, or taking its address is MASTER_STATE."""
    node.must(bootstrap())
    for change in (
        remove("n0", 1),
        stable("n0", 1, to=False),
        role("n0", 1, "observer"),
        add("n9", 9, at=0, replaces=holder(node, "n0")),
    ):
        with pytest.raises(errors.MasterState):
            planned(node, change, 1, 2, 3, force=True)


def test_a_stranger_is_not_found(node):
    """B14: removing nobody is NOT_FOUND."""
    node.must(bootstrap())
    with pytest.raises(errors.MemberNotFound):
        planned(node, remove("n7", 7), 1, 2, 3)


def test_a_quorum_is_kept(node):
    """H25: with one of three dead, the other living follower cannot be removed without force; the dead one can."""
    node.must(bootstrap())
    with pytest.raises(errors.NoQuorum) as caught:
        planned(node, remove("n1", 2), 1, 2)
    assert (caught.value.alive, caught.value.voters) == (1, 2)
    assert voters(planned(node, remove("n1", 2), 1, 2, force=True)) == [1, 3]
    assert voters(planned(node, remove("n2", 3), 1, 2)) == [1, 2]
    with pytest.raises(errors.NoQuorum):
        planned(node, role("n1", 2, "observer"), 1, 2)
    with pytest.raises(errors.NoQuorum):
        planned(node, stable("n1", 2, to=False), 1, 2)


def test_a_dead_joiner_of_a_group_of_two_can_be_dropped(node):
    """H14: a learner counts for nothing, so dropping a dead one needs nobody's consent but the voters'."""
    node.must(bootstrap(2))
    node.must(add("n2", 9))
    dropping = planned(node, remove("n2", 9), 1, 2)
    assert (voters(dropping), learners(dropping)) == ([1, 2], [])
    assert planned(node, remove("n2", 9), 1).configuration is not None


def test_a_replacement_is_one_step(node):
    """H15: the stale voter goes and the new one learns, in one configuration, if the rest is a majority of the rest."""
    node.must(bootstrap())
    plan = planned(node, add("n2", 9, at=2, replaces=holder(node, "n2")), 1, 2)
    assert (voters(plan), learners(plan)) == ([1, 2], [9])
    with pytest.raises(errors.NoQuorum):
        planned(node, add("n2", 9, at=2, replaces=holder(node, "n2")), 1)


def test_what_does_not_concern_votes_changes_no_configuration(node):
    """An address, a ticket and an observer that becomes a follower are plain entries."""
    node.must(bootstrap())
    node.must(add("o1", 9, role="observer"))
    for change in (moved("n2", 3, 20), ms.mint_ticket()[1], role("o1", 9, "follower")):
        assert planned(node, change, 1).configuration is None


def test_a_running_cluster_is_not_founded_again(node):
    """Its members are admitted, never exchanged: an id is a vote."""
    node.must(bootstrap())
    with pytest.raises(errors.Conflict):
        planned(node, bootstrap(), 1, 2, 3)


def test_a_plan_is_never_refused_when_it_is_applied(node):
    """Whatever is planned on the applied state is applied as planned: the table and the configuration agree."""
    dice = random.Random(3)
    node.must(bootstrap(5))
    made = 0
    for step in range(400):
        number = dice.randrange(1, 12)
        name = f"n{dice.randrange(8)}"
        row = m.find_member(node.store, name)
        named = None if row is None else m.Holder(row.node_id, row.incarnation)
        known = number if row is None or step % 4 == 0 else int(row.node_id, 16)
        change = dice.choice(
            [
                add(name, number + step * 100, at=dice.randrange(12), replaces=named),
                remove(name, known),
                stable(name, known, to=dice.random() < 0.7),
                role(name, known, dice.choice(("follower", "observer"))),
                moved(name, known, dice.randrange(12)),
            ]
        )
        everybody = [int(each.node_id, 16) for each in m.read_members(node.store)]
        alive = {1, *(each for each in everybody if dice.random() < 0.8)}
        try:
            plan = planned(node, change, *alive)
        except errors.Error:
            continue
        before = ms.configuration_of(m.read_members(node.store))
        node.must(change)
        made += 1
        after = ms.configuration_of(m.read_members(node.store))
        assert after == (plan.configuration or before)
        assert LEADER in after.voters
        assert len(set(before.voters) ^ set(after.voters)) <= 1
    assert made > 60
