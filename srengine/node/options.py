"""Settings of one node process: what ``node start`` takes as flags, environment or file.

Precedence is the command line's business (flag, then ``SRENGINE_…``, then the file, then the default);
`load_options_file` reads the file, whose keys are the names of the fields below; an unknown one is an error that
suggests the nearest.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from srengine import errors, limits, types
from srengine.node.loop import BUSY_S_MAX

OPTIONS_FILE_BYTES_MAX: Final = 1024 * 1024
MEMBERS_MAX: Final = 64
ROLES: Final = ("follower", "observer")
DEMOTIONS: Final = ("in-place", "exit")
_TCP: Final = re.compile(r"^tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:/\[\]#]+):(?P<port>[0-9]{1,5})$")
_KEY: Final = re.compile(r"^[0-9A-Fa-f]{64}$")


@dataclass(frozen=True, slots=True)
class InitialMember:
    """One entry of ``--initial``: name, client address, and the public key where there is one."""

    name: str
    address: str
    public_key: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.address}" + (f"#{self.public_key}" if self.public_key else "")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How to run a node.

    ``listen``: client address ``tcp://host:port``; peers use port + 1 and bulk port + 2 unless given. ``initial``: all
    first members in one order that all of them name; the first one leads the tablets. ``cluster`` is needed to
    bootstrap and checked afterwards. ``join``: client address of any member of a running cluster, with its key as
    ``#HEXKEY`` off loopback; ``ticket``: what ``member add`` gave for this name. ``role``: follower, or observer
    (applies everything, never votes).

    The rest is coordination (docs/running.md). ``ha``: the backend. Seconds: ``heartbeat_s`` < ``lease_s`` <=
    ``election_s_min`` < ``election_s_max``. ``fence_tries`` attempts, ``fence_delay_s`` apart, doubling when
    ``fence_exponential``. ``demotion``: what a leader that loses leadership does: ``in-place`` or ``exit``.
    ``unstable_grace_s``: how long a joiner must have been caught up before it votes. ``transition_s_max``: how long a
    change of role may take before the process exits. ``journal_kept``: entries kept behind what is applied. Alarms
    (watch.py): ``disk_free_min`` bytes, ``waiting_max`` proposals and reads, ``rtt_s_max`` seconds to another member.
    ``scrub_bytes_s``: how much the scrub reads a second, 0: it reads nothing unasked; ``scrub_interval_s``: how often
    each tablet is read whole. ``busy_poll_s``: how long the event loop waits busily before it sleeps, 0: never; None:
    `loop.default_busy_s`.
    """

    name: str
    data: Path
    listen: str
    peer_listen: str = ""
    bulk_listen: str = ""
    cluster: str = ""
    initial: tuple[InitialMember, ...] = ()
    insecure: bool = False
    allow_remote_fs: bool = False
    map_bytes: int | None = None
    join: str = ""
    ticket: str = ""
    role: str = "follower"
    ha: str = "raft"
    etcd: str = ""
    heartbeat_s: float = 0.1
    lease_s: float = 0.5
    election_s_min: float = 1.0
    election_s_max: float = 2.0
    fence_tries: int = 3
    fence_delay_s: float = 2.0
    fence_exponential: bool = False
    demotion: str = "in-place"
    unstable_grace_s: float = 0.0
    transition_s_max: float = 30.0
    journal_kept: int = 10_000
    disk_free_min: int = 256 * 1024 * 1024
    waiting_max: int = 10_000
    rtt_s_max: float = 1.0
    scrub_bytes_s: int = limits.SCRUB_BYTES_S
    scrub_interval_s: float = limits.SCRUB_INTERVAL_S
    busy_poll_s: float | None = None

    def checked(self) -> NodeOptions:
        """Return the options with every default filled in; `InvalidValue` or `UsageError` for what cannot be meant."""
        types.check_name(self.name, "node")
        if self.cluster:
            types.check_name(self.cluster, "cluster")
        host, port = split_address(self.listen)
        names = [member.name for member in self.initial]
        if len(names) > MEMBERS_MAX:
            raise errors.InvalidValue(f"--initial names {len(names)} members; at most {MEMBERS_MAX} are possible")
        if len(set(names)) != len(names) or len({member.address for member in self.initial}) != len(names):
            raise errors.InvalidValue("--initial names a member or an address twice")
        if self.initial and self.name not in names:
            raise errors.InvalidValue(f"--initial does not name {self.name} itself (it names {', '.join(names)})")
        if self.join and self.initial:
            raise errors.UsageError("--initial founds a cluster, --join enters one: give one of them")
        if self.join:
            split_address(self.join.partition("#")[0])
        self._check_coordination()
        if self.scrub_bytes_s < 0 or not self.scrub_interval_s > 0:
            raise errors.InvalidValue(
                f"a scrub of {self.scrub_bytes_s} bytes a second each {self.scrub_interval_s} s is not possible"
            )
        if self.busy_poll_s is not None and not 0 <= self.busy_poll_s <= BUSY_S_MAX:
            raise errors.InvalidValue(f"busy_poll_s is {self.busy_poll_s:g}; it is 0 to {BUSY_S_MAX:g}")
        return replace(
            self,
            data=Path(self.data),
            peer_listen=self.peer_listen or _after(host, port, 1),
            bulk_listen=self.bulk_listen or _after(host, port, 2),
        )

    def _check_coordination(self) -> None:
        for name, values in (("role", ROLES), ("demotion", DEMOTIONS)):
            if getattr(self, name) not in values:
                raise errors.InvalidValue(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}")
        if self.ha == "etcd" and not self.etcd:
            raise errors.UsageError("--ha etcd needs the cluster's etcd: --etcd http://HOST:PORT[,…]")
        if not 0 < self.heartbeat_s < self.lease_s <= self.election_s_min < self.election_s_max:
            raise errors.InvalidValue(
                f"0 < heartbeat_s {self.heartbeat_s:g} < lease_s {self.lease_s:g} <= election_s_min "
                f"{self.election_s_min:g} < election_s_max {self.election_s_max:g} must hold"
            )
        for name, least in (
            ("fence_tries", 1),
            ("fence_delay_s", 0),
            ("unstable_grace_s", 0),
            ("transition_s_max", 0.1),
            ("journal_kept", 1),
            ("disk_free_min", 0),
            ("waiting_max", 1),
            ("rtt_s_max", 0),
        ):
            if getattr(self, name) < least:
                raise errors.InvalidValue(f"{name} is {getattr(self, name):g}; it is at least {least:g}")


def _after(host: str, port: int, offset: int) -> str:
    return f"tcp://{host}:{0 if port == 0 else _checked_port(port + offset)}"


def _checked_port(port: int) -> int:
    if not 0 <= port <= 65_535:
        raise errors.InvalidValue(f"{port} is no port", port=port)
    return port


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``tcp://host:port``; `InvalidValue` otherwise.

    >>> split_address("tcp://127.0.0.1:7400")
    ('127.0.0.1', 7400)
    """
    match = _TCP.fullmatch(address) if isinstance(address, str) else None
    if match is None:
        raise errors.InvalidValue(
            f"{str(address)[:100]!r} is not an address: tcp://HOST:PORT", address=str(address)[:100]
        )
    return match["host"], _checked_port(int(match["port"]))


def parse_initial(text: str) -> tuple[InitialMember, ...]:
    """Read ``n1=tcp://host:port[#KEY],n2=…``; `InvalidValue` that names the entry.

    >>> [str(member) for member in parse_initial("a=tcp://h:1, b=tcp://h:4")]
    ['a=tcp://h:1', 'b=tcp://h:4']
    """
    members = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, rest = part.partition("=")
        if not equals:
            raise errors.InvalidValue(f"{part[:100]!r} in --initial is not NAME=tcp://HOST:PORT", entry=part[:100])
        address, _, key = rest.strip().partition("#")
        types.check_name(name.strip(), "node")
        split_address(address)
        if key and _KEY.fullmatch(key) is None:
            raise errors.InvalidValue(f"the key of {name.strip()} in --initial is not 64 hexadecimal digits", name=name)
        members.append(InitialMember(name.strip(), address, key.lower()))
    return tuple(members)


def load_options_file(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file, by field name of `NodeOptions`, ``initial`` parsed.

    Raises `NotFound`, `InvalidValue` (not TOML, wrong type) and `UsageError` (an unknown key, with the nearest).
    """
    try:
        with path.open("rb") as file:
            text = file.read(OPTIONS_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise errors.NotFound(f"the options file {path} cannot be read: {error.strerror}", path=str(path)) from error
    if len(text) > OPTIONS_FILE_BYTES_MAX:
        raise errors.InvalidValue(f"the options file {path} is larger than {OPTIONS_FILE_BYTES_MAX} bytes")
    try:
        found = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidValue(f"the options file {path} is not TOML: {error}", path=str(path)) from error
    return checked_settings(found)


def checked_settings(found: dict[str, Any]) -> dict[str, Any]:
    """Return settings with their types checked; unknown keys are a `UsageError` that suggests the nearest."""
    kinds: dict[str, type[Any]] = {
        field.name: type(field.default) if isinstance(field.default, bool | int | float) else str
        for field in fields(NodeOptions)
    }
    kinds |= {"map_bytes": int, "busy_poll_s": float}
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise errors.UsageError(f"there is no option {key}{hint}", option=key)
        if type(value) is int and kinds[name] is float:
            value = float(value)  # noqa: PLW2901 - 2 is a number of seconds too
        if type(value) is not kinds[name]:
            raise errors.InvalidValue(f"option {key} must be of type {kinds[name].__name__}", option=key)
        settings[name] = parse_initial(value) if name == "initial" else Path(value) if name == "data" else value
    return settings
