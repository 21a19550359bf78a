"""Deliberate breakages: each a bug that somebody could write, in one rule of the machine, its driver or the service
above. The simulator must find every one of them (test_breakages.py); what it cannot find, it cannot exclude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.simulator.regime import Regime, regime_of


@dataclass(frozen=True, slots=True)
class Breakage:
    """``machine``: changes a machine that was just made. ``shows``: whether it can show in a regime at all; other seeds
    need not be run. The rest breaks what surrounds the machine.
    """

    name: str
    text: str
    machine: Callable[[Any], None] | None = None
    shows: Callable[[Regime], bool] = lambda _regime: True
    sends_before_persist: bool = False
    """The driver sends, then writes and syncs."""
    trusts_restored: bool = False
    """Peers' claims and damage found at the start are ignored."""
    acts_unfenced: bool = False
    """A leader acts for the newest epoch, whoever owns it."""
    reuses_epochs: bool = False
    """A leader claims the newest epoch instead of the next one, and gets it."""
    repeats_requests: bool = False
    """The outcomes of requests are not looked at."""


def _leases(regime: Regime) -> bool:
    return regime.timing.lease_reads


def _with(*faults: str) -> Callable[[Regime], bool]:
    return lambda regime: any(weight > 0 for fault, weight in regime.weights if fault in faults)


def _untrusted(regime: Regime) -> bool:
    return regime.torn > 0 or _with("damage", "restore")(regime)


NONE = Breakage("none", "nothing is broken")


def _always(name: str, value: Any) -> Callable[[Any], None]:
    def change(machine: Any) -> None:
        assert hasattr(machine, name), name
        setattr(machine, name, lambda *_given, **_named: value)

    return change


def _vote_twice(machine: Any) -> None:
    machine._vote_is_free = lambda _message: True


def _skip_term_checks(machine: Any) -> None:
    vote_reply, append_reply = machine._on_vote_reply, machine._on_append_reply

    def of_this_term(message: Any) -> Any:
        return msgspec.structs.replace(message, term=machine.term)

    machine._on_vote_reply = lambda message: vote_reply(message if message.pre else of_this_term(message))
    machine._on_append_reply = lambda message: append_reply(of_this_term(message))


def _lease_from_receipt(machine: Any) -> None:
    original = machine._hear_round

    def hear_round(leader: Any, peer: Any, number: int) -> None:
        original(leader, peer, number)
        if number == peer.acked_round:
            peer.acked_at = machine.now

    machine._hear_round = hear_round


def _cut_on_every_append(machine: Any) -> None:
    machine._fresh = lambda entries: tuple(entry for entry in entries if entry.index > machine.commit_index)


def _count_learners(machine: Any) -> None:
    def held(leader: Any) -> int:
        places = [
            machine.view.durable_index if node == machine.node_id else leader.peers[node].match_index
            for node in machine.configuration.nodes
        ]
        return sorted(places, reverse=True)[len(machine.configuration.voters) // 2]

    machine._held_by_majority = held


def _skip_previous_term(machine: Any) -> None:
    machine._fits = lambda index, _term: machine.view.term_at(index) is not None


def _commit_alone(machine: Any) -> None:
    machine._held_by_majority = lambda _leader: machine.view.durable_index


def _apply_what_came(machine: Any) -> None:
    def learn(_index: int) -> None:
        machine.commit_index = max(machine.commit_index, machine.view.last_index)

    machine._learn_commit = learn


def _count_untrusted(machine: Any) -> None:
    def hear(peer: Any, message: Any) -> None:
        peer.matched(message.match_index)
        peer.counted_index = max(peer.counted_index, message.match_index)

    machine._hear_match = hear


def _keep_lease_when_handing_over(machine: Any) -> None:
    original = machine._send_timeout_now

    def send(leader: Any, target: Any) -> None:
        original(leader, target)
        leader.leases = True

    machine._send_timeout_now = send


def _configure_when_committed(machine: Any) -> None:
    kind = type(machine)

    def configuration(self: Any) -> Any:
        committed = max(self.commit_index, self.view.floor.index)
        return self.view.configuration_at(min(committed, self.view.last_index))

    machine.__class__ = type("Broken", (kind,), {"configuration": property(configuration)})


def _forget_promise(machine: Any) -> None:
    machine.promise_until = machine.now


def shows(seed: int, breakage: Breakage) -> bool:
    """Whether the breakage can show in this seed's regime."""
    return breakage.shows(regime_of(seed))


BREAKAGES: dict[str, Breakage] = {
    breakage.name: breakage
    for breakage in (
        Breakage("vote twice", "a voter gives its vote of a term again", _vote_twice),
        Breakage("skip term checks", "answers of terms that are over count in this one", _skip_term_checks),
        Breakage("commit by count", "what a majority holds is committed, of any term", _always("_may_commit", True)),
        Breakage(
            "send before persist", "messages leave before what they say is on the disk", sends_before_persist=True
        ),
        Breakage("no election restriction", "anybody is voted for, whatever it holds", _always("_is_up_to_date", True)),
        Breakage("no promise", "voters vote within what they promised a leader", _always("_promised", False), _leases),
        Breakage("no promise after a start", "a voter that has started forgets its promise", _forget_promise, _leases),
        Breakage(
            "lease from receipt", "a leader counts its lease from when the answer came", _lease_from_receipt, _leases
        ),
        Breakage(
            "lease kept on transfer",
            "a leader that hands over reads on",
            _keep_lease_when_handing_over,
            lambda regime: _leases(regime) and _with("transfer")(regime),
        ),
        Breakage(
            "read unconfirmed",
            "a leader answers reads without asking whether it still leads",
            lambda machine: setattr(machine, "_confirmed_round", lambda leader: leader.round),
        ),
        Breakage("read before own entry", "a new leader reads at once", _always("_term_settled", True)),
        Breakage(
            "several voters at once",
            "a change of membership has any size",
            _always("_why_no_step", None),
            _with("member"),
        ),
        Breakage(
            "configure when committed",
            "a configuration is in force once committed",
            _configure_when_committed,
            _with("member"),
        ),
        Breakage("cut on every append", "a late append cuts off what came after it", _cut_on_every_append),
        Breakage("skip previous term", "entries are put behind any entry", _skip_previous_term),
        Breakage("commit alone", "a leader calls committed what only it holds", _commit_alone),
        Breakage("apply what came", "a follower applies what it has, committed or not", _apply_what_came),
        Breakage("count learners", "learners count for commitment", _count_learners, _with("member")),
        Breakage("count untrusted", "answers of nodes that may not vote count", _count_untrusted, _untrusted),
        Breakage(
            "trust restored", "a directory that was put back or damaged votes", trusts_restored=True, shows=_untrusted
        ),
        Breakage(
            "trust too early", "the first leader that is heard restores trust", _always("_is_proved", True), _untrusted
        ),
        Breakage("act unfenced", "a leader acts for the newest epoch without owning it", acts_unfenced=True),
        Breakage("reuse an epoch", "a leader claims the newest epoch and gets it", reuses_epochs=True),
        Breakage("repeat requests", "a request that comes twice is applied twice", repeats_requests=True),
    )
}
