"""Deliberate breakages: each a bug that somebody could write, in one rule of the machine, its driver or the service
above. The simulator must find every one of `BREAKAGES` (test_breakages.py); what it cannot find, it cannot exclude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from srengine.consensus.effects import Timing
from tests.simulator.network import Weather
from tests.simulator.regime import Regime


@dataclass(frozen=True, slots=True)
class Breakage:
    """``machine``: changes a machine that was just made. The rest breaks what surrounds it."""

    name: str
    text: str
    machine: Callable[[Any], None] | None = None
    narrowed: Callable[[Regime], Regime] = lambda regime: regime
    """The regime in which it is looked for: a bug of leases needs leases, and much of what endangers them."""
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


NONE = Breakage("none", "nothing is broken")
LONG_IN_OFFICE = Timing(lease_s=0.2, election_s_min=1.0, election_s_max=2.0)
"""A leader without contact leads on for long after its lease: another one leads beside it."""


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
            machine._count_contact(leader)

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


def _configure_when_committed(machine: Any) -> None:
    kind = type(machine)

    def configuration(self: Any) -> Any:
        committed = max(self.commit_index, self.view.floor.index)
        return self.view.configuration_at(min(committed, self.view.last_index))

    machine.__class__ = type("Broken", (kind,), {"configuration": property(configuration)})


def _forget_promise(machine: Any) -> None:
    # Its first campaign waits for the promise, too.
    machine.state.campaign_at -= machine.promise_until - machine.now
    machine.promise_until = machine.now


def _busy(regime: Regime, *faults: str, **changed: Any) -> Regime:
    """Three voters that are quick, a register that everybody wants, and these faults, often."""
    return replace(
        regime,
        **{
            "hosts": 3,
            "voters": 3,
            "groups": 1,
            "clients": 4,
            "registers": 1,
            "length_s": 12.0,
            "fault_every_s": 0.3,
            "fault_lasts_s": 0.5,
            "think_s": 0.02,
            "weather": Weather(delay_s_max=0.001),
            "disk_s": (0.000_1, 0.000_5),
            "apply_s": 0.000_2,
            "metadata": False,
            "weights": tuple((fault, 1.0) for fault in faults),
            **changed,
        },
    )


def _by_lease(regime: Regime, *faults: str, **changed: Any) -> Regime:
    timing = Timing(lease_reads=True)
    return _busy(regime, *faults, timing=timing, clock_drift=timing.drift, **changed)


def _calm(regime: Regime, *faults: str, **changed: Any) -> Regime:
    """One fault after the other, and clients that soon ask somebody else."""
    clients = {"clients": 2, "think_s": 0.05, "patience_s": 0.1, "roams": 0.3, "mix": (6, 2, 1)}
    return _busy(regime, *faults, **{"fault_every_s": 1.0, "fault_lasts_s": 0.8, **clients, **changed})


def _of_promises(regime: Regime) -> Regime:
    # Between two heartbeats a leader hears nothing unless it writes, and whoever missed a write is not elected: few of
    # both.
    timing = Timing(heartbeat_s=0.25, lease_s=0.3, election_s_min=0.4, election_s_max=0.9, lease_reads=True)
    return _calm(regime, "camps", timing=timing, clock_drift=timing.drift, clients=4, think_s=0.02, mix=(40, 1, 0))


def _of_late_answers(regime: Regime) -> Regime:
    weather = Weather(delay_s_max=0.001, late=0.1, late_s=3.0)
    return _by_lease(regime, "isolate", "freeze", weather=weather)


def _of_starts(regime: Regime) -> Regime:
    timing = Timing(lease_s=1.0, election_s_min=1.0, election_s_max=2.0, lease_reads=True)
    return _calm(regime, "crash others", timing=timing, clock_drift=timing.drift)


def _of_young_leaders(regime: Regime) -> Regime:
    small = (("APPEND_BYTES_MAX", 1), ("IN_FLIGHT_MESSAGES_MAX", 1), ("ROUNDS_KEPT_MAX", 1024))
    timing = Timing(lease_s=0.2, election_s_min=0.25, election_s_max=0.6)
    return _busy(
        regime,
        "young leader",
        weather=Weather(delay_s_max=0.1),
        disk_s=(0.001, 0.01),
        timing=timing,
        fault_every_s=0.2,
        limits=small,
    )


def _of_changes(regime: Regime) -> Regime:
    return _busy(regime, "member", "member", "split", "isolate", hosts=5, voters=4)


def _of_leaps(regime: Regime) -> Regime:
    return _calm(regime, "leap", hosts=5)


def _of_amnesia(regime: Regime) -> Regime:
    return _calm(regime, "amnesia", timing=LONG_IN_OFFICE, fault_every_s=1.5)


def _of_two_leaders(regime: Regime) -> Regime:
    return _calm(regime, "camps", "isolate", timing=LONG_IN_OFFICE)


def _of_echoes(regime: Regime) -> Regime:
    # Few rounds of heartbeats in a term: those of an earlier one have the same numbers.
    return _calm(regime, "swing", timing=LONG_IN_OFFICE, fault_every_s=2.0)


def _of_harm(regime: Regime) -> Regime:
    return _busy(regime, "damage", "restore", "young leader", "isolate", torn=0.2, weather=Weather(delay_s_max=0.02))


def _of_storms(regime: Regime) -> Regime:
    weather = Weather(loss=0.05, duplicate=0.2, late=0.05, late_s=3.0, delay_s_max=0.04, in_order=False)
    timing = Timing(lease_s=0.2, election_s_min=0.25, election_s_max=0.6)
    return _busy(regime, "young leader", "isolate", "crash", weather=weather, timing=timing)


BREAKAGES: dict[str, Breakage] = {
    breakage.name: breakage
    for breakage in (
        Breakage("vote twice", "a voter gives its vote of a term again", _vote_twice),
        Breakage("skip term checks", "answers of terms that are over count in this one", _skip_term_checks, _of_echoes),
        Breakage("follow the past", "a leader whose term is over is followed", _always("_is_over", False), _of_storms),
        Breakage(
            "commit by count",
            "what a majority holds is committed, of any term",
            _always("_may_commit", True),
            _of_young_leaders,
        ),
        Breakage(
            "send before persist", "messages leave before what they say is on the disk", sends_before_persist=True
        ),
        Breakage("no election restriction", "anybody is voted for, whatever it holds", _always("_is_up_to_date", True)),
        Breakage(
            "no promise", "voters vote within what they promised a leader", _always("_promised", False), _of_promises
        ),
        Breakage(
            "no promise after a start", "a voter that has started forgets its promise", _forget_promise, _of_starts
        ),
        Breakage(
            "lease from receipt",
            "a leader counts its lease from when the answer came",
            _lease_from_receipt,
            _of_late_answers,
        ),
        Breakage(
            "read unconfirmed",
            "a leader answers reads without asking whether it still leads",
            lambda machine: setattr(machine, "_confirmed_round", lambda leader: leader.round),
            _of_two_leaders,
        ),
        Breakage("read before own entry", "a new leader reads at once", _always("_term_settled", True)),
        Breakage(
            "several voters at once", "a change of membership has any size", _always("_why_no_step", None), _of_leaps
        ),
        Breakage(
            "configure when committed",
            "a configuration is in force once committed",
            _configure_when_committed,
            _of_changes,
        ),
        Breakage("cut on every append", "a late append cuts off what came after it", _cut_on_every_append, _of_storms),
        Breakage("skip previous term", "entries are put behind any entry", _skip_previous_term),
        Breakage("commit alone", "a leader calls committed what only it holds", _commit_alone),
        Breakage("apply what came", "a follower applies what it has, committed or not", _apply_what_came),
        Breakage("count learners", "learners count for commitment", _count_learners, _of_changes),
        Breakage("count untrusted", "answers of nodes that may not vote count", _count_untrusted, _of_amnesia),
        Breakage(
            "trust restored",
            "a directory that was put back or damaged votes",
            trusts_restored=True,
            narrowed=_of_harm,
        ),
        Breakage(
            "trust too early", "the first leader that is heard restores trust", _always("_is_proved", True), _of_harm
        ),
        Breakage("act unfenced", "a leader acts for the newest epoch without owning it", acts_unfenced=True),
        Breakage("reuse an epoch", "a leader claims the newest epoch and gets it", reuses_epochs=True),
        Breakage("repeat requests", "a request that comes twice is applied twice", repeats_requests=True),
    )
}
