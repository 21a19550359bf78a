"""The running node: wiring, start and stop order, services, status.

* `NodeOptions`  settings of one node process
* `Node`         a node inside a program
* `run_node`     a node in the foreground, for the command line
* `log_to_stderr`  diagnostics as JSON lines
"""

from __future__ import annotations

from srengine.node.logs import log_to_stderr
from srengine.node.node import Node, run_node
from srengine.node.options import InitialMember, NodeOptions, load_options_file, parse_initial

__all__ = ["InitialMember", "Node", "NodeOptions", "load_options_file", "log_to_stderr", "parse_initial", "run_node"]
