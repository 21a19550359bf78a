"""node: make a node's directory, and run a node in the foreground."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, Final

import click

from srengine import errors
from srengine.cli.application import Group
from srengine.cli.output import dump
from srengine.cli.settings import Settings, pass_settings

_PR_SET_PDEATHSIG: Final = 1


@click.group(cls=Group)
def node() -> None:
    """Nodes: the processes that hold the data."""
