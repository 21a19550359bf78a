"""Every exception that leaves srengine, one class for each exit code's meaning and named children where callers differ.

Three kinds of mistakes are never mixed (docs/architecture.md):

* ours: ``assert`` with both values, never one of these classes;
* the caller's: ``TypeError``, ``ValueError`` or `InvalidValue`, raised before anything changed;
* the world's or a peer's: the other classes here, raised ``from`` their cause.

Each class has ``code`` (stable, for programs), ``exit_code`` (of the command line) and ``retryable`` (may the same call
succeed later without anybody's help?). The facts of a failure are keyword arguments; they become attributes and travel
in ``details``, so that a message can change without breaking a program that reads them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class Error(Exception):
    """Base of all errors of srengine.

    ``details`` holds the facts as plain values (str, int, float, bool, None, lists and dicts of these); bytes are
    shown as hexadecimal.
    """

    code: ClassVar[str] = "ERROR"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = {
            name: value.hex() if isinstance(value, bytes) else value for name, value in facts.items()
        }

    def __getattr__(self, name: str) -> Any:
        # Only called when normal look-up fails: the facts.
        details = self.__dict__.get("details")
        if details is not None and name in details:
            return details[name]
        raise AttributeError(name)

    def as_dict(self) -> dict[str, Any]:
        """Return the error as the command line prints it with ``-o json``."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "details": self.details}


class UsageError(Error):
    """The command line or the options cannot be understood."""

    code = "USAGE"
    exit_code = 2


class Unreachable(Error):
    """Nobody answers at the address."""

    code = "UNREACHABLE"
    exit_code = 3
    retryable = True


class NoQuorum(Error):
    """A majority of the replicas cannot be reached; nothing can be promised."""

    code = "NO_QUORUM"
    exit_code = 4
    retryable = True


class NoLeader(NoQuorum):
    """No leader is known."""

    code = "NO_LEADER"


class UnknownMaster(NoLeader):
    """Nobody is known to lead: an election is going on, or no majority is there."""

    code = "UNKNOWN_MASTER"


class NotLeader(NoLeader):
    """Another node leads the tablet; ``leader`` is its client address ("" when nobody is known)."""

    code = "NOT_LEADER"


class NotReady(NoQuorum):
    """This replica cannot answer as current yet (starting, catching up, or out of contact)."""

    code = "NOT_READY"


class Conflict(Error):
    """A condition did not hold, or somebody else has what was asked for.

    For a conditional write ``current_version`` is the version that stands (None: no record).
    """

    code = "CONFLICT"
    exit_code = 5


class AlreadyOpen(Conflict):
    """Another owner holds the data directory or the tablet."""

    code = "ALREADY_OPEN"


class AddressInUse(Conflict):
    """Another process listens at the address."""

    code = "ADDRESS_IN_USE"


class ForeignData(Conflict):
    """The data belongs to another cluster, node or tablet."""

    code = "FOREIGN_DATA"


class StaleEpoch(Conflict):
    """The sender acts for an epoch that is over."""

    code = "STALE_EPOCH"


class EpochTaken(Conflict):
    """Another leader owns the epoch; ``newest`` is the newest one (KEYEXIST in the words of BDB HA)."""

    code = "EPOCH_TAKEN"


class RequestExpired(Conflict):
    """The request id is older than the kept window, or its session is unknown; it was not executed."""

    code = "REQUEST_EXPIRED"


class Diverged(Conflict):
    """Two replicas prove different histories."""

    code = "DIVERGED"


class TabletFenced(Conflict):
    """The tablet refuses reads and writes after an input/output error or a fault; see ``reason``."""

    code = "FENCED"


class NotAuthenticated(Error):
    """The caller did not prove who it is."""

    code = "NOT_AUTHENTICATED"
    exit_code = 6


class Denied(Error):
    """The caller may not do this."""

    code = "DENIED"
    exit_code = 6


class CorruptionError(Error):
    """Stored or sent bytes are damaged; nothing of them was used."""

    code = "CORRUPTION"
    exit_code = 7


class TruncatedTablet(CorruptionError):
    """The tablet's file ends before pages that it needs; the file was not touched."""

    code = "TRUNCATED_TABLET"


class SnapshotDamaged(CorruptionError):
    """A snapshot is damaged, incomplete or not what it claims; the target was not touched."""

    code = "SNAPSHOT_DAMAGED"


class DiskFull(Error):
    """The disk is full; the tablet is read-only until space returns."""

    code = "DISK_FULL"
    exit_code = 8
    retryable = True


class QuotaExceeded(Error):
    """A configured bound on size is reached."""

    code = "QUOTA_EXCEEDED"
    exit_code = 8


class TimedOut(Error):
    """The time allowed ran out; whether a write happened is unknown."""

    code = "TIMEOUT"
    exit_code = 9
    retryable = True


class NotFound(Error):
    """There is no such thing."""

    code = "NOT_FOUND"
    exit_code = 10


class MemberNotFound(NotFound):
    """There is no such member."""

    code = "MEMBER_NOT_FOUND"


class BelowPurgeMark(NotFound):
    """The change log does not reach back to the sequence asked for; ask for a full copy."""

    code = "BELOW_PURGE_MARK"


class InvalidValue(Error, ValueError):
    """A value breaks a stated rule; nothing was changed."""

    code = "INVALID_VALUE"
    exit_code = 11


class FrameError(InvalidValue):
    """Bytes from outside are no message of ours; nothing was changed."""

    code = "FRAME_ERROR"


class UnsupportedFeature(InvalidValue):
    """The other side requires a feature or format that this version does not have."""

    code = "UNSUPPORTED_FEATURE"


class SchemaMismatch(InvalidValue):
    """Two schemas do not fit."""

    code = "SCHEMA_MISMATCH"


class Removed(Error):
    """This node was removed from its cluster."""

    code = "REMOVED"
    exit_code = 12


class MasterState(Error):
    """The operation is refused on a leader."""

    code = "MASTER_STATE"
    exit_code = 13


class ViewExpired(Error):
    """The view is older than its maximum age; open a new one."""

    code = "VIEW_EXPIRED"
    retryable = True


class ForkedEnvironment(Error):
    """The store was opened before a fork; a child process must open its own."""

    code = "FORKED"


class UnsafePermissions(Error):
    """A file or directory that must be private can be read or changed by others."""

    code = "UNSAFE_PERMISSIONS"


class UnsupportedFileSystem(Error):
    """The directory is on a file system that LMDB cannot use safely."""

    code = "UNSUPPORTED_FILE_SYSTEM"


class Closed(Error):
    """The object was closed."""

    code = "CLOSED"


def _leaves(root: type[Error]) -> dict[str, type[Error]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_leaves(child))
    return found


def from_code(code: str, message: str, details: dict[str, Any] | None = None) -> Error:
    """Return the error that a peer named by ``code``; an unknown code becomes `Error` with ``remote_code``."""
    facts = dict(details or {})
    kind = _leaves(Error).get(code)
    if kind is None:
        return Error(message, remote_code=code, **facts)
    return kind(message, **facts)
