"""The command line: ``srengine [GLOBAL] COMMAND …``. Results go to stdout, diagnostics to stderr, errors to exit codes.

    application   the root command, where commands are found, what becomes of an exception
    settings      global options, environment, contexts, the connection
    output        text, json and jsonl
    data, catalog, transfer, status, node, verify, bench      one file a group of commands
    demo, dev, supervisor                                     real node processes on this machine

Nothing but `main` is for other rooms.
"""

from srengine.cli.application import main

__all__ = ["main"]
