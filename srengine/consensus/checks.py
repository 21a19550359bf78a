"""Whether the values of a message make sense: what a peer sends is checked, never asserted.

The decoder has checked the types. What is found here is dropped and counted (`RaftMachine.dropped`); whether a message
is late or comes from a stranger is the rules' business, not this module's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import assert_never

from srengine import limits
from srengine.consensus.entries import Configuration, Entry, EntryKind
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

NUMBER_MAX = (1 << 53) - 1
"""Numbers on the wire are at most that (docs/formats-wire.md). All its bits are set: several numbers are in the range
exactly when what they are together, bit by bit, is.
"""


def is_sound(message: Message) -> bool:
    """Return whether every value is in its range and fits the others."""
    # Only who has heard of nobody yet is in term 0: it has nothing to say, but may be asked.
    if message.term == 0:
        if not isinstance(message, VoteReply | ReadIndexReply):
            return False
    elif not 0 < message.term <= NUMBER_MAX:
        return False
    match message:
        case Append():
            return _is_sound_append(message)
        case AppendReply():
            return _is_sound_reply(message)
        case Vote(last_index=index, last_term=term):
            return _is_place(index, term) and term <= message.term
        case Install():
            return _is_sound_install(message)
        case ReadIndex(token=token):
            return 0 <= token <= NUMBER_MAX
        case ReadIndexReply(token=token, index=index):
            return 0 <= token | index <= NUMBER_MAX
        case VoteReply() | TimeoutNow():
            return True
    assert_never(message)


def is_sound_configuration(configuration: Configuration) -> bool:
    """Return whether it has voters, and everybody once, sorted, as one or the other."""
    nodes = configuration.nodes
    return (
        0 < len(nodes) <= limits.GROUP_NODES_MAX
        and bool(configuration.voters)
        and all(nodes)
        and all(before < after for before, after in pairwise(nodes))
        and list(configuration.voters) == sorted(configuration.voters)
        and list(configuration.learners) == sorted(configuration.learners)
    )


def _is_place(index: int, term: int) -> bool:
    """Whether there may be an entry of ``term`` at ``index``; (0, 0) is the place before the first."""
    return 0 <= index | term <= NUMBER_MAX and (index == 0) == (term == 0)


def _is_sound_append(message: Append) -> bool:
    if not _is_place(message.previous_index, message.previous_term):
        return False
    if not 0 <= message.commit_index | message.round | message.nonce | message.barrier <= NUMBER_MAX:
        return False
    index, term = message.previous_index, message.previous_term
    for entry in message.entries:
        if entry.index != index + 1 or not term <= entry.term <= message.term or not _is_sound_entry(entry):
            return False
        index, term = entry.index, entry.term
    return term <= message.term and index <= NUMBER_MAX


def _is_sound_entry(entry: Entry) -> bool:
    if entry.term == 0:
        return False
    if entry.kind is not EntryKind.CONFIGURATION:
        return entry.configuration is None
    return entry.configuration is not None and is_sound_configuration(entry.configuration)


def _is_sound_reply(message: AppendReply) -> bool:
    numbers = message.match_index | message.round | message.previous_index | message.conflict_term | message.nonce
    if not 0 <= numbers <= NUMBER_MAX:
        return False
    if not message.success and (message.match_index == 0) != (message.conflict_term == 0):
        return False
    return message.votes == (message.nonce == 0) and message.conflict_term <= message.term


def _is_sound_install(message: Install) -> bool:
    return (
        _is_place(message.index, message.index_term)
        and message.index > 0
        and message.index_term <= message.term
        and 0 <= message.round <= NUMBER_MAX
        and is_sound_configuration(message.configuration)
    )
