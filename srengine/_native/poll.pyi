"""Waiting for the descriptors of an event loop; see ext/poll.pyx."""

class Poller:
    """Waits on one epoll descriptor, which stays its caller's.

    ``busy_s``: how long to wait busily at most, up to 1. It does so only after a wait that took no longer: whatever
    comes rarely is waited for asleep.
    """

    sleeps: int
    """How often it has slept so far."""
    busy_waits: int
    """How often it has waited busily so far, whether that ended asleep or not."""

    def __init__(self, fd: int, busy_s: float) -> None: ...
    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Return [(descriptor, epoll's event mask), ...] as soon as some are ready; [] after ``timeout_s`` (below 0:
        never), and when a signal was handled. Raises OSError.
        """
