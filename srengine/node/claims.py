"""Whether this node may vote: asks the other voters what they remember of it, and answers their questions.

The rules are `ha.claims_machine`'s; this module asks (`ClaimVote` to every other voter, again until it answers), and
tells the group. Everybody is asked, also when enough have answered: so each voter has heard of this start, and an older
state of this directory would give itself away at any of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from srengine import errors, limits
from srengine.ha.claims_machine import Answer, Claim, ClaimsMachine, Verdict, Voters
from srengine.ha.contact import Contact
from srengine.ha.group import AlarmSink
from srengine.ha.messages import ClaimVote, Remembered
from srengine.ha.roster_machine import Verdict as Judgement
from srengine.node.wire import NodeWire
from srengine.transport import Peer, Reply
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

ASK_AGAIN_S: Final = 0.2
TIMEOUT_S: Final = 2.0


class Group(Protocol):
    """The group whose votes are at stake, as this node sees it."""

    @property
    def voters(self) -> tuple[NodeId, ...]:
        """Voters of the newest configuration in the log; empty before there is one."""
        ...

    @property
    def promised(self) -> tuple[int, int]:
        """Return (term, last index) of the own log and hard state."""
        ...

    @property
    def held(self) -> tuple[int, int]:
        """Return (term, index) of the last entry of the own log."""
        ...

    def remembered(self, node: NodeId) -> tuple[int, int]:
        """Return (term, index) that the node is known to have promised and acknowledged; zeros when nothing is."""
        ...

    def trust(self, *, trusted: bool, held: tuple[int, int] = (0, 0)) -> None:
        """Tell the group whether this node may vote; ``held``: only for whom holds that much (`effects.Trust`)."""
        ...


class Claims:
    """One node's question to the others, and its answers to theirs."""

    def __init__(
        self,
        *,
        boot_number: Callable[[], int],
        distrusted: Callable[[], bool],
        copied: Callable[[], bool],
        contact: Contact,
        wire: NodeWire,
        group: Group,
        alarm: AlarmSink,
        refused: Callable[[Judgement, int], None],
        foreign: Callable[[errors.ForeignData], None],
    ) -> None:
        """``distrusted``: the directory is an older state or a copy. ``copied``: its identity file is a copy, so the
        original may be alive. ``refused``: another voter would not have this process. ``foreign``: those that should be
        the others belong to another cluster.
        """
        self._foreign = foreign
        self._name = contact.name
        self._node_id = NodeId(contact.process_id.node_id)
        self._boot_number = boot_number
        self._distrusted = distrusted
        self._copied = copied
        self._contact = contact
        self._wire = wire
        self._group = group
        self._alarm = alarm
        self._refused = refused
        self._begun = 0
        self._doubled_since: float | None = None
        """When another voter first took this process for a double."""
        self._heard = False
        """Whether another voter has answered in this run."""
        self.machine = self._new_machine()

    def _new_machine(self) -> ClaimsMachine:
        term, last_index = self._group.promised
        return ClaimsMachine(Claim(self._boot_number(), term, last_index, self._distrusted()))

    def begin_again(self) -> None:
        """Claim anew: the directory turned out to be an older state, so this node is another one than it said."""
        self._group.trust(trusted=False)
        self.machine = self._new_machine()
        self._begun += 1

    async def run(self) -> None:
        """Ask until every other voter has answered; tell the group as soon as the verdict is clear."""
        done = -1
        while True:
            if done == self._begun:
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            self.machine.step(Voters(tuple(node for node in self._group.voters if node != self._node_id)))
            self._tell()
            waiting = self.machine.unanswered
            if not waiting and self._group.voters:
                done = self._begun
                continue
            await asyncio.gather(*(self._ask(node) for node in waiting))
            await asyncio.sleep(ASK_AGAIN_S)

    async def _ask(self, node: NodeId) -> None:
        claim = self.machine.claim
        question = ClaimVote(self._name, self._contact.process_id, claim.term, claim.last_index, copied=self._copied())
        try:
            reply, _ = await self._wire.request(node, question, timeout_s=TIMEOUT_S)
        except errors.ForeignData as error:
            # At the addresses that this node was given there is another cluster: its directory is not of this one. Who
            # was heard by one of its own keeps to them.
            if error.details.get("theirs") and not self._heard:
                self._foreign(error)
            return
        except errors.Error as error:
            _logger.debug("%s does not say what it remembers: %s", node, error.message)
            return
        if not isinstance(reply, Remembered):
            self._alarm("bad_answer", f"{node} answered a claim with {type(reply).__name__}")
            return
        if reply.verdict != Judgement.ACCEPTED.value:
            self._hear_refusal(question, reply)
            return
        self._heard = True
        held = (reply.held_term, reply.held_index)
        self.machine.step(Answer(node, reply.highest, reply.term, reply.last_index, reply.trusted, held))
        self._tell()

    def _hear_refusal(self, question: ClaimVote, reply: Remembered) -> None:
        """Stop or distrust the directory, as `refused` decides.

        A double may be the own predecessor, killed a moment ago and not silent for long enough: asked again first.
        """
        if question.process != self._contact.process_id:
            return
        verdict = Judgement(reply.verdict)
        if verdict is Judgement.DUPLICATE:
            now = asyncio.get_running_loop().time()
            self._doubled_since = now if self._doubled_since is None else self._doubled_since
            if now - self._doubled_since <= limits.DUPLICATE_PATIENCE_S:
                return
        self._refused(verdict, reply.highest)

    def _tell(self) -> None:
        effects = self.machine.drain()
        if effects.alarm:
            self._alarm("votes_unproved", effects.alarm)
        match effects.verdict:
            case Verdict.TRUSTED:
                self._group.trust(trusted=True, held=effects.held)
                _logger.info("this node may vote", extra={"event": "votes"})
            case Verdict.BELOW:
                self._group.trust(trusted=False)
                _logger.warning(
                    "others remember more of this node than its directory does: it votes once it has caught up",
                    extra={"event": "votes_not"},
                )
            case Verdict.WAITING | None:
                pass

    async def answer(self, peer: Peer, message: ClaimVote, attachments: Sequence[memoryview]) -> Reply:
        """Say what this node remembers of another one, and remember this start of it."""
        del attachments
        if peer.node_id != message.process.node_id:
            raise errors.ForeignData(f"{message.name} claims for another node than it said hello as")
        judged = self._contact.meet(message.name, message.process, copied=message.copied)
        term, index = self._group.remembered(NodeId(message.process.node_id))
        held_term, held_index = self._group.held
        return Reply(
            Remembered(
                self._contact.process_id,
                judged.verdict.value,
                judged.highest,
                term,
                index,
                trusted=not self._distrusted(),
                held_term=held_term,
                held_index=held_index,
            )
        )
