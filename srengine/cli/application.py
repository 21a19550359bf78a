"""The root command, and what becomes of an exception.

Commands are imported when they are first needed, so that ``srengine get`` does not load what only a node needs. Every
way out of a command passes `main`, which turns it into one exit code, one sentence on stderr or one JSON object on
stdout.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from srengine import errors
from srengine.cli.output import FORMATS, Output, abandon_stdout
from srengine.cli.settings import Settings, global_options, output_options, suggestion

EXIT_INTERRUPTED: Final = 130
EXIT_USAGE: Final = 2

_HOME: Final = {
    "bench": "bench:bench",
    "db": "catalog:db",
    "delete": "data:delete",
    "demo": "demo:demo",
    "dev": "dev:dev",
    "export": "transfer:export_table",
    "get": "data:get",
    "import": "transfer:import_table",
    "member": "member:member",
    "node": "node:node",
    "put": "data:put",
    "scan": "data:scan",
    "status": "status:status",
    "sync": "status:sync",
    "table": "catalog:table",
    "verify": "verify:verify",
}
"""Command -> module and name below ``srengine.cli``."""


class Command(click.Command):
    """A command that takes the global options and ``-o`` behind its name too."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        taken = {text for parameter in self.params for text in parameter.opts}
        for option in [*output_options(), *global_options(at_root=False)]:
            if not taken.intersection(option.opts):
                self.params.append(option)


class Group(click.Group):
    """A group of commands; an unknown one is answered with the nearest."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first word names."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = suggestion(args[0], self.list_commands(ctx))
            raise click.UsageError(f"no such command {args[0]!r}{near}", ctx)
        return super().resolve_command(ctx, args)


class _Root(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's shape
        return sorted(_HOME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        home = _HOME.get(cmd_name)
        if home is None:
            return None
        module, _, name = home.partition(":")
        command: click.Command = getattr(importlib.import_module(f"srengine.cli.{module}"), name)
        return command


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's shape
    if value and not context.resilient_parsing:
        click.echo(version_text())
        context.exit(0)


def version_text() -> str:
    """Return the version with the libraries that this build stands on."""
    import srengine

    try:
        from srengine._native import build_info
    except ImportError:
        return f"srengine {srengine.__version__} (kernels are not built)"
    kind = "the system's library, unpatched" if build_info.SYSTEM_LIBS else "compiled in"
    patched = ", with the hardening patches" if build_info.LMDB_PATCHED else ", without the hardening patches"
    return (
        f"srengine {srengine.__version__} (LMDB {build_info.LMDB_VERSION} {kind}"
        f"{'' if build_info.SYSTEM_LIBS else patched}; Python {sys.version.split()[0]})"
    )


root = _Root(
    name="srengine",
    help="A replicated tablet store: nodes, tables, data, and what they are doing.",
    epilog=(
        "Exit codes: 0 ok, 1 error, 2 usage, 3 unreachable, 4 no leader or no quorum, 5 conflict or fenced, 6 denied, "
        "7 corruption found, 8 disk full or quota, 9 timeout, 10 not found, 11 invalid value, 12 removed, "
        "13 master state, 130 interrupted."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    params=[
        *global_options(at_root=True),
        *output_options(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show the version and the libraries compiled in.",
        ),
    ],
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings = Settings()
    try:
        code = _run(given, settings)
    except BrokenPipeError:
        abandon_stdout()
        code = 1
    sys.exit(code)


def _run(arguments: list[str], settings: Settings) -> int:
    error: errors.Error
    try:
        code = root.main(arguments, prog_name="srengine", standalone_mode=False, obj=settings)
        settings.out.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(
            settings, arguments, {"code": "INTERRUPTED", "message": "interrupted", "details": {}}, EXIT_INTERRUPTED
        )
    except click.UsageError as usage:
        return _fail_usage(settings, arguments, usage)
    except click.ClickException as failure:
        error = errors.Error(failure.format_message())
    except BrokenPipeError:
        raise
    except OSError as failure:
        error = from_os_error(failure)
    except errors.Error as failure:
        error = failure
    return _fail(settings, arguments, error.as_dict(), error.exit_code)


def from_os_error(failure: OSError) -> errors.Error:
    """Return the typed error of what the system refused."""
    what = failure.strerror or str(failure)
    where = f"{failure.filename}: " if failure.filename else ""
    facts = {"path": str(failure.filename)} if failure.filename else {}
    if isinstance(failure, FileNotFoundError):
        return errors.NotFound(f"{where}{what}", **facts)
    if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
        return errors.DiskFull(f"{where}{what}", **facts)
    return errors.Error(f"{where}{what}", **facts)


def _fail_usage(settings: Settings, arguments: list[str], usage: click.UsageError) -> int:
    message = usage.format_message()
    if usage.ctx is not None and _output(settings, arguments).format == "text":
        click.echo(usage.ctx.get_usage(), err=True)
    return _fail(settings, arguments, {"code": "USAGE", "message": message, "details": {}}, EXIT_USAGE)


def _fail(settings: Settings, arguments: list[str], error: dict[str, Any], code: int) -> int:
    out = _output(settings, arguments)
    out.failure(error, f"{error['message']} ({error['code']})")
    out.flush()
    return code


def _output(settings: Settings, arguments: list[str]) -> Output:
    """Return the output of a command that perhaps failed before its ``-o`` was understood."""
    if settings.output is None:
        before = arguments[: arguments.index("--")] if "--" in arguments else arguments
        for word, following in zip(before, [*before[1:], ""], strict=True):
            if word == "--json":
                settings.output = "json"
            for option in ("-o", "--output"):
                value = following if word == option else word.removeprefix(option).removeprefix("=")
                if (word == option or word.startswith((f"{option}=", "-o"))) and value in FORMATS:
                    settings.output = value  # type: ignore[assignment]
    return settings.out
