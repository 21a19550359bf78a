"""bench: run the benchmark suite of a source checkout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

import srengine
from srengine import errors
from srengine.cli.application import Command
from srengine.cli.output import dump
from srengine.cli.settings import Settings, pass_settings


def benchmarks_directory() -> Path:
    """Return where the benchmarks are; `NotFound` in an installation without them."""
    directory = Path(srengine.__file__).resolve().parent.parent / "benchmarks"
    if not (directory / "__main__.py").exists():
        raise errors.NotFound(
            "the benchmarks are not part of an installed srengine: run this in a checkout of its source",
            path=str(directory),
        )
    return directory


@click.command(cls=Command)
@click.argument("name", required=False)
@click.option("--quick", "size", flag_value="quick", default=None, help="With a tenth of the records.")
@click.option("--tiny", "size", flag_value="tiny", help="With hardly any records: does it run at all?")
@click.pass_context
@pass_settings
def bench(settings: Settings, context: click.Context, *, name: str | None, size: str | None) -> None:
    """Run all benchmarks of a source checkout, or those whose names contain NAME, and print the table."""
    directory = benchmarks_directory()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise errors.NotFound(
            "pytest-benchmark is not installed: pip install 'srengine[bench]'", package="pytest-benchmark"
        )
    with tempfile.TemporaryDirectory(prefix="srengine-bench-") as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "benchmarks", f"--json={result}"]
        if size is not None:
            command.append(f"--{size}")
        if name:
            command += ["-k", name]
        out = settings.out
        # The table is the result only as text; otherwise it would spoil the document.
        code = subprocess.run(
            command, check=False, cwd=directory.parent, stdout=None if out.format == "text" else sys.stderr
        ).returncode
        if code == 5:
            raise errors.NotFound(f"no benchmark's name contains {name!r}", name=name)
        if code == 0 and out.format != "text":
            out.line(dump(json.loads(result.read_text(encoding="utf-8"))))
    context.exit(1 if code else 0)
