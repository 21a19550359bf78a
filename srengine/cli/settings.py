"""Global options: where the cluster is and how to talk to it.

Each may stand before or after the command. Precedence: option, environment (``SRENGINE_ENDPOINT``, …), the context,
default. A context is a named set of them in ``contexts.toml`` under ``$SRENGINE_CONFIG_HOME`` (default:
``~/.config/srengine``)::

    [prod]
    endpoint = "tcp://db1:7400,tcp://db2:7400"
    key-file = "/home/me/.config/srengine/prod.key"
"""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from srengine import errors
from srengine.cli.output import FORMATS, Format, Output

if TYPE_CHECKING:
    from srengine.client import Client

TIMEOUT_S_DEFAULT: Final = 10.0


@dataclass(slots=True)
class Settings:
    """What the global options said; None: not said."""

    endpoint: str | None = None
    timeout: float | None = None
    token: str | None = None
    key_file: str | None = None
    server_key: str | None = None
    context: str | None = None
    output: Format | None = None

    @property
    def out(self) -> Output:
        """Where the command writes."""
        return Output(self.output or "text")

    @property
    def timeout_s(self) -> float:
        """Seconds that one call may take."""
        return self.timeout or TIMEOUT_S_DEFAULT

    def connect(self) -> Client:
        """Return a client of the cluster that the options name; `UsageError` when they cannot be understood."""
        from srengine.client import connect

        values = self._completed()
        endpoint = values.endpoint or "tcp://127.0.0.1:7400"
        try:
            return connect(
                endpoint,
                token=values.token,
                key_file=values.key_file,
                server_key=values.server_key,
                timeout_s=values.timeout_s,
            )
        except errors.InvalidValue as error:
            raise errors.UsageError(error.message, **error.details) from error

    def _completed(self) -> Settings:
        """Return a copy in which the context fills what was not said."""
        if self.context is None:
            return self
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in _read_context(self.context).items():
            if values[name] is None:
                values[name] = value
        return Settings(**values)


_CONTEXT_KEYS: Final[dict[str, Any]] = {
    "endpoint": str,
    "timeout": (int, float),
    "token": str,
    "key_file": str,
    "server_key": str,
}


def contexts_file() -> Path:
    """Return where contexts are kept."""
    home = os.environ.get("SRENGINE_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config" / "srengine") / "contexts.toml"


def _read_context(name: str) -> dict[str, Any]:
    path = contexts_file()
    try:
        contexts = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise errors.UsageError(f"there is no context {name!r}: {path} does not exist", context=name) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"{path} is not TOML: {error}", file=str(path)) from error
    found = contexts.get(name)
    if not isinstance(found, dict):
        raise errors.UsageError(f"there is no context {name!r} in {path}{suggestion(name, contexts)}", context=name)
    values = {key.replace("-", "_"): value for key, value in found.items()}
    for key, value in values.items():
        if key not in _CONTEXT_KEYS:
            raise errors.UsageError(
                f"context {name!r} in {path} has an unknown key {key!r}{suggestion(key, _CONTEXT_KEYS)}", key=key
            )
        if not isinstance(value, _CONTEXT_KEYS[key]) or isinstance(value, bool):
            raise errors.UsageError(f"context {name!r} in {path}: {key} is a {type(value).__name__}", key=key)
    return values


def suggestion(wrong: str, known: Any) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def pass_settings(function: Any) -> Any:
    """Give a command its `Settings` as first argument."""
    return click.make_pass_decorator(Settings, ensure=True)(function)


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value is not None:
        name = parameter.name or ""
        settings = context.ensure_object(Settings)
        if name == "as_json":
            if value:
                settings.output = "json"
        else:
            setattr(settings, name, value)
    return value


def _option(*declarations: str, at_root: bool, **attributes: Any) -> click.Option:
    if at_root and attributes.get("type") is not None and "envvar" not in attributes:
        long = next(text for text in declarations if text.startswith("--"))
        attributes["envvar"] = "SRENGINE_" + long[2:].upper().replace("-", "_")
        attributes["show_envvar"] = True
    return click.Option(
        list(declarations), expose_value=False, callback=_remember, default=None, hidden=not at_root, **attributes
    )


def output_options() -> list[click.Option]:
    """Return ``-o`` and ``--json``, shown in the help of every command."""
    return [
        click.Option(
            ["-o", "--output", "output"],
            type=click.Choice(FORMATS),
            expose_value=False,
            callback=_remember,
            default=None,
            help="How results are written (default: text).",
        ),
        click.Option(
            ["--json", "as_json"],
            is_flag=True,
            expose_value=False,
            callback=_remember,
            default=None,
            help="The same as -o json.",
        ),
    ]


def global_options(*, at_root: bool) -> list[click.Option]:
    """Return the options that every command takes; only the root reads the environment for them."""
    positive = click.FloatRange(min=0, min_open=True)
    return [
        _option(
            "--endpoint",
            type=str,
            at_root=at_root,
            metavar="tcp://HOST:PORT[,…]",
            help="Nodes to ask (default: tcp://127.0.0.1:7400).",
        ),
        _option(
            "--timeout",
            type=positive,
            at_root=at_root,
            metavar="SECONDS",
            help="How long one request may take (default: 10).",
        ),
        _option(
            "--token", type=str, at_root=at_root, help="Token that names the user; refused until a cluster has users."
        ),
        _option("--key-file", type=str, at_root=at_root, metavar="FILE", help="CURVE key of the client."),
        _option("--server-key", type=str, at_root=at_root, metavar="KEY", help="CURVE key of the nodes, hexadecimal."),
        _option("--context", type=str, at_root=at_root, metavar="NAME", help="Named set of these options."),
    ]
