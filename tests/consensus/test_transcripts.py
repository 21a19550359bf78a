"""Transcripts of a group: what is done to it, what its machines say, as text that can be read as a story.

A file in ``transcripts/`` is a row of blocks: commands, ``----``, what was said, and how the nodes stand that changed.
Lines with ``#`` explain. With ``SRENGINE_REWRITE=1`` the outputs are written anew: read the difference before you keep
it. A command that begins with ``quietly`` is done without being listened to.

=====================================  ==============================================================================
group a b c [learners=d,e] [lease]     nodes that all hold the bootstrap entry (1 of term 1); lease: reads under it
alone d                                one more node, with an empty log
log a 1 1 4 term=5                     give a node that log (terms from index 1), that term, nothing else
elect a                                let promises lapse, let it stand, deliver everything; it has to win
stand a                                let it ask for votes now, deliver nothing
propose a x · read a                   · members a a,b,c [learners=d] · transfer a [b] · hint b a · stepdown a why
trust a [held=3@2] · distrust a        · trim a 3 · fetch b · fetch b fails
time 0.5                               that much passes for everybody, in small steps, everything is delivered
tick a 0.5                             the clock moves, one node notices, nothing is delivered
flow                                   deliver everything, and what follows from it
deliver a>b [2]                        deliver the next messages from a to b
lose a>b [2] · repeat a>b              throw them away · deliver the next one, and keep it on its way
cut a>b · cut a · mend                 nothing arrives in that direction · nothing from and to a · heal
crash a [untrusted] [empty]            start it anew from its disk (untrusted: it may be an old one; empty: it is new)
hang a · wake a                        its disk does not answer · answers
stop a · go a                          its process does not run · goes on; what was sent to it is waiting
jump a 3600                            its clock alone jumps
inject a append term=9 … · state       a message out of nowhere arrives · how all nodes stand
=====================================  ==============================================================================

Said: ``a>b append 2 after 1@1: 2@2 noop (commit 1, round 1)`` is a message of term 2; ``1@1`` is index@term.
``a persists``, ``a applies``, ``a takes proposal 1 as 3@2``, ``a answers read 1 at 3`` are the rest of what it says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from srengine.consensus import effects as fx
from srengine.consensus.entries import Configuration, Entry, EntryKind, HardState
from srengine.consensus.machine import RaftMachine
from srengine.consensus.messages import (
    Append,
    AppendReply,
    Install,
    Message,
    ReadIndex,
    ReadIndexReply,
    TimeoutNow,
    Vote,
    VoteReply,
)
from srengine.consensus.roles import PreCandidate
from tests.consensus import breakages
from tests.consensus.groups import GROUP, Group, MemoryLog, Node

FOLDER = Path(__file__).parent / "transcripts"


def told_entry(entry: Entry) -> str:
    content = entry.data.decode() or entry.kind.name.lower()
    if entry.configuration is not None:
        content = f"members {told_configuration(entry.configuration)}"
    return f"{entry.index}@{entry.term} {content}"


def told_configuration(configuration: Configuration) -> str:
    learners = f" learners {','.join(configuration.learners)}" if configuration.learners else ""
    return ",".join(configuration.voters) + learners


def told_message(message: Message) -> str:
    match message:
        case Append():
            entries = "".join(f" {told_entry(entry)}," for entry in message.entries).rstrip(",")
            proof = f", barrier {message.barrier}" if message.barrier else ""
            return (
                f"append {message.term} after {message.previous_index}@{message.previous_term}:{entries or ' -'} "
                f"(commit {message.commit_index}, round {message.round}{proof})"
            )
        case AppendReply(success=True):
            votes = "" if message.votes else ", may not vote"
            return f"holds {message.match_index} (term {message.term}, round {message.round}{votes})"
        case AppendReply():
            votes = "" if message.votes else ", may not vote"
            return (
                f"refuses {message.previous_index}: try {message.match_index}@{message.conflict_term} "
                f"(term {message.term}, round {message.round}{votes})"
            )
        case Vote():
            kind = "would you vote" if message.pre else "vote"
            passing = " (handed over)" if message.transfer else ""
            return f"{kind} for me in {message.term}? I hold {message.last_index}@{message.last_term}{passing}"
        case VoteReply():
            answer = ("would" if message.pre else "yes") if message.granted else ("would not" if message.pre else "no")
            return f"{answer} (term {message.term})"
        case TimeoutNow():
            return f"stand now (term {message.term})"
        case Install():
            return f"install {message.index}@{message.index_term} (term {message.term}, round {message.round})"
        case ReadIndex():
            return f"read index? (term {message.term})"
        case ReadIndexReply():
            return f"read index {message.index}"


class Told(Group):
    """A group that writes down what is said."""

    def __post_init__(self) -> None:
        self.said: list[str] = []
        super().__post_init__()

    def note(self, node: Node, said: fx.Effects) -> None:
        name = node.name
        lines = []
        if said.persist is not None:
            state, entries = said.persist.hard_state, said.persist.entries
            parts = [f"term {state.term} vote {state.vote or '-'}"] if state else []
            parts += [told_entry(entry) for entry in entries]
            lines.append(f"{name} persists {', '.join(parts)}")
        lines += [f"{name}>{out.target} {told_message(out.message)}" for out in said.send]
        if said.apply:
            lines.append(f"{name} applies {', '.join(told_entry(entry) for entry in said.apply)}")
        lines += [f"{name} takes proposal {done.token} as {done.index}@{done.term}" for done in said.accepted]
        lines += [
            f"{name} refuses {done.token}: {done.why.value}, leader {done.leader or 'unknown'}"
            + (f" ({done.message})" if done.message else "")
            for done in said.refused
        ]
        lines += [f"{name} answers read {ready.token} at {ready.index}" for ready in said.reads]
        if said.install is not None:
            lines.append(f"{name} fetches the state at {said.install.floor.index} from {said.install.source}")
        lines += [
            f"{name} is {change.role.value} in {change.term}, leader {change.leader or 'unknown'} ({change.reason})"
            for change in said.roles
        ]
        self.said += lines
        super().note(node, said)

    def shown(self, name: str) -> str:
        node, machine = self.nodes[name], self.nodes[name].machine
        log = " ".join(f"{entry.index}@{entry.term}" for entry in node.log.all)
        floor = f"[{node.log.floor.index}@{node.log.floor.term}] " if node.log.floor.index else ""
        role = "pre-candidate" if isinstance(machine.state, PreCandidate) else machine.role.value
        trust = "" if machine.trusted else " untrusted"
        dropped = "".join(
            f", {count} {reason}" for reason, count in sorted(machine.dropped.items()) if reason != "late"
        )
        lease = machine.lease_until
        leased = f", lease for {lease - self.now:.2f} s" if self.timing.lease_reads and lease > self.now else ""
        return (
            f"= {name} {role}{trust} {machine.term} of {told_configuration(machine.configuration) or 'nobody'}: "
            f"{floor}{log or '-'}; commit {machine.commit_index}{leased}{dropped}"
        )


@dataclass
class Story:
    """One transcript being told."""

    machine_type: type[RaftMachine] = RaftMachine
    group: Told | None = None
    shown: dict[str, str] = field(default_factory=dict)

    def do(self, line: str) -> None:
        quietly = line.startswith("quietly ")
        parts = line.removeprefix("quietly ").split()
        options = dict(part.split("=", 1) for part in parts[1:] if "=" in part)
        words = [part for part in parts if "=" not in part]
        before = list(self.group.said) if self.group is not None else []
        if words[0] == "group":
            names = tuple(word for word in words[1:] if word != "lease")
            learners = tuple(filter(None, options.get("learners", "").split(",")))
            timing = fx.Timing(lease_reads="lease" in words)
            self.group = Told(names, learners, timing=timing, machine_type=self.machine_type, now=100.0)
            self.shown = {}
        else:
            assert self.group is not None
            getattr(self, f"do_{words[0]}")(self.group, words[1:], options)
        if quietly:
            self.group.said = before

    def do_alone(self, group, words, options):
        group.add(words[0], MemoryLog())

    def do_log(self, group, words, options):
        voters = Configuration(group.names, group.learners)
        terms = [int(word) for word in words[1:]]
        entries = [Entry(1, terms[0], EntryKind.CONFIGURATION, b"bootstrap", voters)]
        entries += [Entry(index, term, EntryKind.COMMAND, b"%d" % term) for index, term in enumerate(terms[1:], 2)]
        state = HardState(int(options.get("term", terms[-1])))
        group.nodes[words[0]] = group.add(words[0], MemoryLog(entries), state)

    def do_elect(self, group, words, options):
        group.elect(words[0])

    def do_stand(self, group, words, options):
        group.now = max(group.now, group[words[0]].promise_until)
        group[words[0]].tick(group.now)
        group[words[0]]._campaign(0)
        group.settle(words[0])

    def do_propose(self, group, words, options):
        group.propose(words[0], " ".join(words[1:]).encode())

    def do_members(self, group, words, options):
        learners = tuple(filter(None, options.get("learners", "").split(",")))
        group.propose(words[0], b"members", Configuration(tuple(words[1].split(",")), learners))

    def do_read(self, group, words, options):
        group.read(words[0])

    def do_transfer(self, group, words, options):
        group.tokens += 1
        group.step(words[0], fx.Transfer(group.tokens, words[1] if len(words) > 1 else None))

    def do_hint(self, group, words, options):
        group.step(words[0], fx.Hint(words[1]))

    def do_stepdown(self, group, words, options):
        group.step(words[0], fx.StepDown(" ".join(words[1:])))

    def do_trust(self, group, words, options):
        index, term = map(int, options.get("held", "0@0").split("@"))
        group.step(words[0], fx.Trust(trusted=True, held=(term, index)))

    def do_distrust(self, group, words, options):
        group.step(words[0], fx.Trust(trusted=False))

    def do_trim(self, group, words, options):
        floor = group[words[0]].floor_at(int(words[1]))
        group.nodes[words[0]].log.trim(floor)
        group.step(words[0], fx.Trimmed(floor, b"state"))

    def do_fetch(self, group, words, options):
        node = group.nodes[words[0]]
        wanted, node.installing = node.installing, None
        if len(words) > 1:
            group.step(node.name, fx.InstallFailed(wanted.floor.index))
            return
        floor = group[wanted.source].floor_at(group[wanted.source].applied_index)
        node.log.install(floor)
        node.applied = list(group.nodes[wanted.source].applied)
        group.step(node.name, fx.Installed(floor))

    def do_time(self, group, words, options):
        group.run(float(words[0]))

    def do_tick(self, group, words, options):
        group.now += float(words[1])
        group[words[0]].tick(group.now)
        group.settle(words[0])

    def do_flow(self, group, words, options):
        group.flow()

    def on_way(self, group, words):
        source, target = words[0].split(">")
        count = int(words[1]) if len(words) > 1 else 1
        found = [out for out in group.on_way if (out.message.sender, out.target) == (source, target)][:count]
        assert len(found) == count, (words, group.on_way)
        return found

    def do_deliver(self, group, words, options):
        for out in self.on_way(group, words):
            group.on_way.remove(out)
            group.deliver(out)

    def do_repeat(self, group, words, options):
        for out in self.on_way(group, words):
            group.deliver(out)

    def do_lose(self, group, words, options):
        for out in self.on_way(group, words):
            group.on_way.remove(out)

    def do_cut(self, group, words, options):
        if ">" in words[0]:
            group.cut.add(tuple(words[0].split(">")))
        else:
            group.cut |= {
                pair for other in group.nodes for pair in ((words[0], other), (other, words[0])) if other != words[0]
            }

    def do_mend(self, group, words, options):
        group.cut.clear()

    def do_crash(self, group, words, options):
        group.held.pop(words[0], None)
        group.blocked.discard(words[0])
        if "empty" in words:
            group.add(words[0], MemoryLog(), trusted="untrusted" not in words)
        else:
            group.restart(words[0], trusted="untrusted" not in words)

    def do_stop(self, group, words, options):
        group.stopped.add(words[0])

    def do_go(self, group, words, options):
        group.stopped.discard(words[0])

    def do_jump(self, group, words, options):
        group[words[0]].tick(group.now + float(words[1]))
        group.settle(words[0])

    def do_hang(self, group, words, options):
        group.blocked.add(words[0])

    def do_wake(self, group, words, options):
        group.unblock(words[0])

    def do_inject(self, group, words, options):
        numbers = {key: int(value) for key, value in options.items() if key != "sender"}
        sender = options["sender"]
        match words[1]:
            case "append":
                terms = numbers.pop("entry", 0)
                at = numbers.pop("at", 0)
                entries = (Entry(at, terms, EntryKind.COMMAND, b"injected"),) if terms else ()
                message = Append(GROUP, sender=sender, entries=entries, **numbers)
            case "holds":
                message = AppendReply(GROUP, sender=sender, success=True, **numbers)
            case "vote":
                message = Vote(GROUP, sender=sender, pre="pre" in words, transfer="transfer" in words, **numbers)
            case "yes":
                message = VoteReply(GROUP, sender=sender, granted=True, **numbers)
            case "install":
                configuration = Configuration(group.names, group.learners)
                message = Install(GROUP, sender=sender, configuration=configuration, **numbers)
            case "timeout":
                message = TimeoutNow(GROUP, sender=sender, **numbers)
            case _:
                raise AssertionError(words)
        group.step(words[0], fx.Received(message))

    def do_state(self, group, words, options):
        self.shown = {}

    def stand(self) -> list[str]:
        assert self.group is not None
        now = {name: self.group.shown(name) for name in sorted(self.group.nodes)}
        changed = [line for name, line in now.items() if self.shown.get(name) != line]
        self.shown = now
        return changed


def tell(text: str, machine_type: type[RaftMachine] = RaftMachine) -> str:
    """Run a transcript; return it with the outputs that the machines give now."""
    story = Story(machine_type)
    told: list[str] = []
    for block in text.strip().split("\n\n"):
        commands = [line for line in block.split("\n----")[0].splitlines() if line != "----"]
        done = [line for line in commands if not line.startswith("#")]
        for line in done:
            story.do(line)
        if not done:
            told.append("\n".join(commands))
            continue
        assert story.group is not None
        told.append("\n".join([*commands, "----", *story.group.said, *story.stand()]))
        story.group.said.clear()
    return "\n\n".join(told) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    """The machines do exactly what their transcript says."""
    text = path.read_text()
    told = tell(text)
    if os.environ.get("SRENGINE_REWRITE"):
        path.write_text(told)
    assert told == text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (breakages.VotesTwice, "vote_once"),
        (breakages.ForgetsItsVote, "vote_once"),
        (breakages.VotesForShorterLogs, "vote_restriction"),
        (breakages.VotesByLengthAlone, "vote_restriction"),
        (breakages.FollowsOldTerms, "repeated_and_late"),
        (breakages.CommitsByCountAlone, "figure8_replaced"),
        (breakages.CommitsWithoutMajority, "old_leader"),
        (breakages.WinsWithHalf, "split_vote"),
        (breakages.DoesNotCheckThePlaceBefore, "figure7_f"),
        (breakages.BelievesEveryCommitIndex, "repeated_and_late"),
        (breakages.BreaksItsPromise, "promise"),
        (breakages.ReadsWithoutAsking, "read_index"),
        (breakages.ReadsBeforeTheTermIsSettled, "no_change_before_own_term"),
        (breakages.CountsItsLeaseFromReceipt, "late_answers_give_no_lease"),
        (breakages.KeepsItsLeaseWhileHandingOver, "transfer_times_out"),
        (breakages.ChangesTwoVotersAtOnce, "one_change_at_a_time"),
        (breakages.ChangesWithoutWaiting, "no_change_before_own_term"),
        (breakages.TrustsItself, "untrusted"),
        (breakages.CountsTheUntrusted, "untrusted_does_not_count"),
        (breakages.TrustsWithoutBarrier, "untrusted"),
        (breakages.ForgetsWhatOthersHold, "restored_majority"),
        (breakages.AnswersOldTermsWithTheirRound, "answer_to_an_old_term"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_rule_tells_another_story(kind, name):
    """Each rule is held by a transcript: a machine without it says something else, or is stopped by an assertion."""
    text = (FOLDER / f"{name}.txt").read_text()
    try:
        told = tell(text, kind)
    except AssertionError:
        return
    assert told != text


def test_every_breakage_has_its_transcript():
    """No deliberate breakage is left out of the test above."""
    (mark,) = test_a_broken_rule_tells_another_story.pytestmark
    assert {kind for kind, _ in mark.args[1]} == set(breakages.ALL)
