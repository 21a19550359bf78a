"""Settings of the backend ``raft``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from srengine import errors
from srengine.consensus.effects import Timing
from srengine.consensus.services import Bounds

NEWS_S: Final = 0.01
"""See `effects.Timing.news_s`."""


class RaftOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``heartbeat_s`` to ``drift``: see `effects.Timing`. ``entries_kept``: of the log, for nodes that lag a little;
    ``persist_s_max``: a transaction of the log that takes longer is reported. ``unstable_grace_s``: a follower that has
    caught up stays unstable for so long at least. ``catch_up_s``: how fast it must be to count as caught up.
    ``reconcile_s``: how often a node compares its agreed state with the others'.
    """

    heartbeat_s: float = 0.1
    lease_s: float = 0.5
    election_s_min: float = 1.0
    election_s_max: float = 2.0
    drift: float = 0.01
    entries_kept: int = 10_000
    persist_s_max: float = 0.5
    unstable_grace_s: float = 0.0
    catch_up_s: float = 1.0
    reconcile_s: float = 30.0

    @property
    def timing(self) -> Timing:
        """For the group's machine."""
        return Timing(
            self.heartbeat_s,
            self.lease_s,
            self.election_s_min,
            self.election_s_max,
            self.drift,
            news_s=min(NEWS_S, self.heartbeat_s),
        )

    @property
    def bounds(self) -> Bounds:
        """For the driver."""
        return Bounds(persist_s_max=self.persist_s_max, entries_kept=self.entries_kept)


def raft_options(settings: Mapping[str, Any]) -> RaftOptions:
    """Return the options in ``settings``; `InvalidValue` for an unknown name, another type, or what makes no sense."""
    try:
        options = msgspec.convert(dict(settings), type=RaftOptions)
    except msgspec.ValidationError as error:
        raise errors.InvalidValue(f"a setting of the backend raft: {error}") from error
    times = (0.0, options.heartbeat_s, options.lease_s)
    if not (
        times[0] < times[1] < times[2] <= options.election_s_min < options.election_s_max and 0 <= options.drift < 1
    ):
        raise errors.InvalidValue(
            "settings of the backend raft need 0 < heartbeat_s < lease_s <= election_s_min < election_s_max, drift < 1"
        )
    if (
        min(options.entries_kept, options.unstable_grace_s) < 0
        or min(options.persist_s_max, options.catch_up_s, options.reconcile_s) <= 0
    ):
        raise errors.InvalidValue("a setting of the backend raft is below its least value")
    return options
