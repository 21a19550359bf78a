"""Epochs: each has one owner, they rise by one along the log, and whoever acts for one owns the newest applied (P2)."""

from __future__ import annotations

from tests.simulator.checkers.violation import Violation


class Epochs:
    """Told of every epoch that a state machine gave away, and of every command that took effect."""

    def __init__(self) -> None:
        self._owners: dict[tuple[str, int], tuple[str, int]] = {}
        self._newest: dict[str, tuple[int, int]] = {}

    def given(self, group: str, index: int, epoch: int, owner: str) -> None:
        """The entry at ``index`` gave ``epoch`` to ``owner``; told once for each node that applies it, in any order."""
        known = self._owners.setdefault((group, epoch), (owner, index))
        if known != (owner, index):
            raise Violation(
                "epochs",
                f"group {group}: epoch {epoch} was given to {known[0]} at {known[1]} and to {owner} at {index}",
            )
        newest, at = self._newest.get(group, (0, 0))
        if index > at:
            if epoch != newest + 1:
                raise Violation("epochs", f"group {group}: epoch {epoch} at {index} follows {newest} at {at}")
            self._newest[group] = (epoch, index)

    def acted(self, group: str, index: int, epoch: int, proposer: str) -> None:
        """The entry at ``index``, proposed by ``proposer`` for ``epoch``, changed the state."""
        owner = self._owners.get((group, epoch))
        if owner is None or owner[0] != proposer or owner[1] >= index:
            raise Violation(
                "epochs", f"group {group}: {proposer} acted at {index} for epoch {epoch}, whose owner is {owner}"
            )
        later = self._owners.get((group, epoch + 1))
        if later is not None and later[1] < index:
            raise Violation(
                "epochs",
                f"group {group}: {proposer} acted at {index} for epoch {epoch}, but {epoch + 1} is there since "
                f"{later[1]}",
            )
