"""Transcripts of the machines: what goes in, what comes out, as text that can be read as a story.

A file in ``transcripts/`` is a row of blocks: commands, ``----``, and what the machine did. Lines with ``#`` explain.
With ``SRENGINE_REWRITE=1`` the outputs are written anew: read the difference before you keep it.

Leader (n1; roots are ``r<sequence>``, the ring holds all)::

    leader n=3 own=5 [untrusted] [broken] [provable]     make one
    pull n2 seq=5 [root=x] [known=3] [untrusted] [filling] [lineage=other] [check=whole|damaged]
    applied 7 · wait quorum 7 · wait all 7 · tick 0.5 · recovered 9 · failed why · distrust why
    damaged why · proved whole|damaged · repaired 7 · unrepaired why

Follower (n2)::

    follower own=5 [filling] [created] [provable]        make one
    answer nothing source=5 committed=5 · answer delta target=7 source=7 committed=6
    answer copy|too_large|… source=9 [lineage=other] [reason=why]
    lost why · applied 7 · refused why [diverged] · copied 7 [path=full] · interrupted 5 [filling] [unproven] · wait 7
    tick 0.5 · kick · damaged why · proved whole|damaged
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from srengine.ha import follower_machine as fm
from srengine.ha import leader_machine as lm
from srengine.ha.proof import Check
from srengine.types import Position

FOLDER = Path(__file__).parent / "transcripts"
LINEAGE = "l"


def position(sequence: int, options: dict[str, str] | None = None) -> Position:
    given = options or {}
    return Position(given.get("lineage", LINEAGE), sequence, given.get("root", f"r{sequence}").encode(), sequence)


class LeaderStory:
    def __init__(self, options: dict[str, str]) -> None:
        others = [f"n{number}" for number in range(2, int(options["n"]) + 1)]
        self.now = 0.0
        self.token = 0
        self.roots: dict[int, bytes] = {}
        """Roots that a repair brought, in place of the ring's."""
        short = "short" in options

        def root_at(sequence: int) -> bytes | None:
            known = f"r{sequence}".encode() if not short or sequence >= 5 else None
            return self.roots.get(sequence, known)

        self.machine = lm.LeaderMachine(
            name="n1",
            others=others,
            own=position(int(options["own"])),
            own_trusted="untrusted" not in options,
            own_whole="broken" not in options,
            root_at=root_at,
            now=0.0,
            provable="provable" in options,
        )

    def do(self, words: list[str], options: dict[str, str]) -> None:
        self.token += 1
        match words[0]:
            case "pull":
                claim = lm.Claim(
                    position(int(options["seq"]), options),
                    trusted="untrusted" not in options,
                    filling="filling" in options,
                    committed_known=int(options.get("known", 0)),
                    check=Check(options.get("check", "")),
                )
                self.machine.step(lm.Pulled(words[1], claim, self.token))
            case "applied":
                self.machine.step(lm.Applied(position(int(words[1]))))
            case "wait":
                self.machine.step(lm.Await(self.token, int(words[2]), lm.Need(words[1])))
            case "recovered":
                self.machine.step(lm.Recovered(position(int(words[1]))))
            case "failed":
                self.machine.step(lm.RecoveryFailed(" ".join(words[1:])))
            case "distrust":
                self.machine.step(lm.Distrusted(" ".join(words[1:])))
            case "damaged":
                self.machine.step(lm.Damaged(" ".join(words[1:])))
            case "proved":
                self.machine.step(lm.Proved(words[1] == "whole", "" if words[1] == "whole" else "other sums"))
            case "repaired":
                reached = position(int(words[1]), options)
                self.roots[reached.sequence] = reached.root
                self.machine.step(lm.Repaired(reached))
            case "unrepaired":
                self.machine.step(lm.RepairFailed(" ".join(words[1:])))
            case "tick":
                self.now += float(words[1])
                self.machine.tick(self.now)
            case _:
                raise AssertionError(words)

    def said(self) -> list[str]:
        effects = self.machine.drain()
        lines = [
            f"answer #{answer.token} {answer.kind.value} committed={answer.committed} leader={answer.leader.sequence}"
            + (f" ({answer.reason})" if answer.reason else "")
            for answer in effects.send
        ]
        lines += [f"release #{release.token}" for release in effects.release]
        if effects.recover is not None:
            lines.append(f"recover from {effects.recover.replica} to {effects.recover.target.sequence}")
        if effects.prove is not None:
            lines.append("prove the own copy")
        if effects.repair is not None:
            how = ", recounting" if effects.repair.recount else ""
            lines.append(f"repair from {effects.repair.replica} at {effects.repair.target.sequence}{how}")
        lines += [f"alarm {alarm.event}: {alarm.message}" for alarm in effects.alarms]
        return lines

    def state(self) -> str:
        machine = self.machine
        held = " ".join(f"{name}:{machine.progress[name].held}" for name in machine.others)
        why = machine.why_not_serving()
        return f"= {type(machine.state).__name__} committed={machine.committed} {held}" + (f" ({why})" if why else "")


class FollowerStory:
    def __init__(self, options: dict[str, str]) -> None:
        self.now = 0.0
        self.token = 0
        self.machine = fm.FollowerMachine(
            own=position(int(options["own"])),
            filling="filling" in options,
            created="created" in options,
            now=0.0,
            provable="provable" in options,
        )

    def do(self, words: list[str], options: dict[str, str]) -> None:
        machine = self.machine
        number = machine.state.number if isinstance(machine.state, fm.Asking) else 0
        match words[0]:
            case "answer":
                target = position(int(options["target"])) if "target" in options else None
                machine.step(
                    fm.Answered(
                        int(options.get("number", number)),
                        fm.SourceState(words[1]),
                        position(int(options["source"]), options),
                        int(options.get("committed", 0)),
                        target,
                        bytes_received=100 if target else 0,
                        reason=options.get("reason", ""),
                    )
                )
            case "lost":
                machine.step(fm.Failed(number, " ".join(words[1:])))
            case "applied":
                machine.step(fm.DeltaApplied(position(int(words[1]))))
            case "refused":
                machine.step(fm.DeltaRefused(words[1], diverged=words[-1] == "diverged"))
            case "copied":
                path = fm.Path(options["path"]) if "path" in options else None
                machine.step(fm.Copied(position(int(words[1])), 5000, path))
            case "interrupted":
                machine.step(
                    fm.CopyFailed(
                        "cut", position(int(words[1])), "filling" in options, 700, unproven="unproven" in options
                    )
                )
            case "damaged":
                machine.step(fm.Damaged(" ".join(words[1:])))
            case "proved":
                whole = words[1] == "whole"
                machine.step(fm.Proved(machine.own, whole, "" if whole else "other sums"))
            case "wait":
                self.token += 1
                machine.step(fm.AwaitCommitted(self.token, int(words[1])))
            case "kick":
                machine.step(fm.Kick())
            case "tick":
                self.now += float(words[1])
                machine.tick(self.now)
            case _:
                raise AssertionError(words)

    def said(self) -> list[str]:
        effects = self.machine.drain()
        lines = []
        if effects.ask is not None:
            lines.append(
                f"ask #{effects.ask.number} at {effects.ask.position.sequence} knows {effects.ask.committed_known}"
                + (f", {effects.ask.check.value}" if effects.ask.check is not Check.NONE else "")
            )
        if effects.apply is not None:
            lines.append("apply the delta")
        if effects.copy is not None:
            how = ", recounting" if effects.copy.recount else ""
            lines.append(f"copy {effects.copy.path.value} from {effects.copy.source.sequence}{how}")
        if effects.prove is not None:
            lines.append("prove the own copy")
        lines += [f"release #{release.token}" for release in effects.release]
        lines += [f"alarm {alarm.event}: {alarm.message}" for alarm in effects.alarms]
        return lines

    def state(self) -> str:
        machine = self.machine
        shown = f"= {machine.replica_state(self.now).value} {type(machine.state).__name__} at {machine.own.sequence}"
        last = machine.catch_up
        return f"{shown} behind {machine.behind}, {last.path.value}, {last.bytes_received} bytes: {last.reason}"


def tell(text: str) -> str:
    """Run a transcript; return it with the outputs that the machine gives now."""
    story: LeaderStory | FollowerStory | None = None
    told: list[str] = []
    for block in text.strip().split("\n\n"):
        commands = [line for line in block.split("\n----")[0].splitlines() if line != "----"]
        said: list[str] = []
        for line in commands:
            if line.startswith("#"):
                continue
            parts = line.split()
            words = [part for part in parts if "=" not in part and part not in FLAGS]
            options = dict(part.split("=", 1) for part in parts if "=" in part) | {f: "" for f in parts if f in FLAGS}
            if words[0] == "leader":
                story = LeaderStory(options)
            elif words[0] == "follower":
                story = FollowerStory(options)
            else:
                assert story is not None
                story.do(words, options)
            assert story is not None
            said += story.said()
        if story is not None and any(not line.startswith("#") for line in commands):
            told.append("\n".join([*commands, "----", *said, story.state()]))
        else:
            told.append("\n".join(commands))
    return "\n\n".join(told) + "\n"


FLAGS = {"untrusted", "filling", "created", "broken", "short", "provable", "unproven"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    """The machine does exactly what its transcript says."""
    text = path.read_text()
    told = tell(text)
    if os.environ.get("SRENGINE_REWRITE"):
        path.write_text(told)
    assert told == text
