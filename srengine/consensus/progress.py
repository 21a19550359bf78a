"""What a leader knows of one peer's log, and how much it may send it.

::

                 answer fits                       floor passed it
    Flow.PROBE ---------------> Flow.REPLICATE   any ------------> Flow.INSTALL
         ^       <---------------                                        |
         |        answer does not fit                                    |
         +---------------------------------------------------------------+
                                answer holds the floor

REPLICATE: the next messages leave before the answers to the last ones come, up to bounds in messages and bytes; so it
begins, since most logs are equal when a term begins. PROBE: one message at a time, to find the last place in common.
INSTALL: the log does not reach back far enough, the peer
fetches the state; heartbeats repeat the offer.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from srengine import limits


class Flow(enum.Enum):
    """How a leader sends to one peer."""

    PROBE = "probe"
    REPLICATE = "replicate"
    INSTALL = "install"


@dataclass(slots=True)
class Progress:
    """One peer as its leader sees it. ``counted_index <= match_index < next_index``."""

    next_index: int
    """The next entry to send; optimistic in REPLICATE: everything before it is on its way."""
    match_index: int = 0
    """Up to here the peer's log was once equal to ours, durably. Only for sending: a peer without trust may have lost
    what it had, see ``counted_index``."""
    counted_index: int = 0
    """Up to here the peer counts for commitment: what it acknowledged while it was trusted."""
    flow: Flow = Flow.REPLICATE
    probing: bool = False
    """PROBE: entries are on their way; the next ones wait for an answer or for the next heartbeat."""
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    """REPLICATE: (last index, bytes) of each unanswered message with entries."""
    in_flight_bytes: int = 0
    install_index: int = 0
    """INSTALL: the state that was offered; the peer holds it when it matches so far."""
    acked_round: int = 0
    """The newest heartbeat round that the peer answered while trusted."""
    acked_at: float = float("-inf")
    """When that round began: its promise to us runs from then at the latest, by our clock."""
    heard_at: float = float("-inf")
    """When any answer last came."""
    trusted: bool = True
    """Whether its last answer said that it may vote."""
    nonce: int = 0
    """Of the last start in which it was not trusted."""
    barrier: int = 0
    """The entry made after we heard ``nonce``; 0: none was asked for."""
    commit_sent: int = 0
    """The commit index that it was last told."""

    def may_send(self) -> bool:
        """Return whether entries may leave to this peer now."""
        match self.flow:
            case Flow.PROBE:
                return not self.probing
            case Flow.REPLICATE:
                return (
                    len(self.in_flight) < limits.IN_FLIGHT_MESSAGES_MAX
                    and self.in_flight_bytes < limits.IN_FLIGHT_BYTES_MAX
                )
            case Flow.INSTALL:
                return False

    def sent(self, last_index: int, sent_bytes: int) -> None:
        """Take note that entries up to ``last_index`` are on their way."""
        if self.flow is Flow.PROBE:
            self.probing = True
            return
        assert self.flow is Flow.REPLICATE, self.flow
        self.next_index = last_index + 1
        self.in_flight.append((last_index, sent_bytes))
        self.in_flight_bytes += sent_bytes

    def matched(self, match_index: int) -> None:
        """Take note that the peer holds our log up to ``match_index``."""
        sent_fits = not self.probing or match_index >= self.next_index
        self.match_index = max(self.match_index, match_index)
        self.next_index = max(self.next_index, self.match_index + 1)
        while self.in_flight and self.in_flight[0][0] <= match_index:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
        if self.flow is Flow.INSTALL:
            if self.match_index >= self.install_index:
                self._enter(Flow.PROBE)
                self.next_index = self.match_index + 1
        elif self.flow is Flow.PROBE and sent_fits and self.match_index + 1 == self.next_index:
            self._enter(Flow.REPLICATE)

    def refused(self, previous_index: int, next_index: int) -> None:
        """Take note that what came after ``previous_index`` did not fit; ``next_index`` is the next that may.

        A peer that refuses the very place up to which it matched is believed: a late answer of before it lost its disk
        said so, or this one is late; then the next one says so again.
        """
        late = previous_index != self.next_index - 1 if self.flow is Flow.PROBE else previous_index < self.match_index
        if late or self.flow is Flow.INSTALL:
            return
        if previous_index == self.match_index:
            self.match_index = self.counted_index = 0
        self._enter(Flow.PROBE)
        self.next_index = max(min(next_index, previous_index), self.match_index + 1)

    def install(self, index: int) -> None:
        """Offer the state at ``index``: the log does not reach back to what the peer needs."""
        self._enter(Flow.INSTALL)
        self.install_index = index

    def forget(self, nonce: int) -> None:
        """Start over with a peer that has started anew without trust: it may have lost anything."""
        self.nonce = nonce
        self.barrier = 0
        self.match_index = self.counted_index = 0
        self._enter(Flow.PROBE)

    def _enter(self, flow: Flow) -> None:
        self.flow = flow
        self.probing = False
        self.in_flight.clear()
        self.in_flight_bytes = 0
        self.install_index = 0
