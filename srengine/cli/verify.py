"""verify: is a data directory whole? Offline, read-only."""

from __future__ import annotations

import click

from srengine.cli.application import Command
from srengine.cli.output import one_line
from srengine.cli.settings import Settings, pass_settings

EXIT_CORRUPTION = 7


@click.command(cls=Command)
@click.argument("directory")
@click.pass_context
@pass_settings
def verify(settings: Settings, context: click.Context, *, directory: str) -> None:
    """Check every checksum, page, root and epoch in DIRECTORY; exit code 7 when something is damaged.

    The directory must not be in use. Nothing is changed.
    """
    from srengine.consensus.log import LOG_NAME
    from srengine.consensus.log_check import check_log
    from srengine.ha.verify import METADATA_NAME, check_epoch_rows
    from srengine.storage import verify_directory

    report = verify_directory(directory, {LOG_NAME: check_log, METADATA_NAME: check_epoch_rows})
    values = report.as_dict()
    out = settings.out
    if out.format == "text":
        for damage in values["damages"]:
            out.line(
                "damage\t"
                + "\t".join(f"{name}={one_line(value)}" for name, value in damage.items() if value is not None)
            )
        facts = "\t".join(f"{name}={one_line(value)}" for name, value in values.items() if name != "damages")
        out.line(f"{'clean' if report.clean else 'damaged'}\t{facts}")
    else:
        out.one(values, "")
    if not report.clean:
        context.exit(EXIT_CORRUPTION)
