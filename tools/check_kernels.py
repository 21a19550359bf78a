"""Check over the syntax trees what import-linter cannot see: ``python tools/check_kernels.py``.

Two contracts (docs/architecture.md):

* *Kernels.* A compiled kernel is used by the room that owns it and by nobody else; the table below is the contract.
* *Machines.* A module named ``machine.py`` or ``*_machine.py`` is deterministic: it imports nothing that does input or
  output, knows the time, or rolls dice, and from srengine only other pure modules.

Prints each finding as ``path:line: sentence``; exit code 1 if there are any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = "srengine._native"

KERNEL_USERS = {
    "tablet": {"storage"},
    "chunk": {"snapshot"},
    "merkle": {"storage", "sync"},
    "scan": {"codec"},
    "frame": {"codec"},
    "rows": {"storage"},
    "wal": {"storage"},
    "entries": {"consensus"},
    "poll": {"node"},
    "build_info": {"cli"},
}
"""Kernel -> rooms that may import it."""

IMPURE = {
    *("asyncio", "concurrent", "ctypes", "fcntl", "http", "io", "lmdb", "mmap", "multiprocessing", "os", "pathlib"),
    *("secrets", "select", "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading"),
    *("time", "urllib", "uuid", "zmq"),
}
"""Packages that no machine imports. `random` is one of them but for the annotation ``random.Random``, see below."""

IMPURE_ROOMS = {"storage", "transport", "client", "observe", "node", "cli", "clock"}


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute dotted name, only for types) of everything that the module imports."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", id(node) in for_types


def kernel_findings(room: str, name: str) -> Iterator[str]:
    """Yield what is wrong with the room's import of a kernel."""
    if not name.startswith(f"{NATIVE}."):
        return
    kernel = name.removeprefix(f"{NATIVE}.").split(".")[0]
    users = KERNEL_USERS.get(kernel)
    if users is None:
        yield f"the kernel {kernel} has no row in tools/check_kernels.py"
    elif room not in users:
        yield f"the kernel {kernel} belongs to {' and '.join(sorted(users))}, not to {room}"


def machine_findings(name: str, *, only_for_types: bool) -> Iterator[str]:
    """Yield what is wrong with a machine's import."""
    parts = name.split(".")
    if parts[0] in IMPURE:
        yield f"a machine imports {name}: effects leave it in what drain() returns"
    elif parts[0] == "random" and not only_for_types:
        yield "a machine imports random: its driver hands it a random.Random (import it under TYPE_CHECKING)"
    elif parts[0] == "srengine" and len(parts) > 1 and parts[1] in IMPURE_ROOMS:
        yield f"a machine imports {name}, which does input or output"


def findings(root: Path = ROOT) -> Iterator[str]:
    """Yield every finding below ``root``/srengine."""
    for path in sorted((root / "srengine").rglob("*.py")):
        shown = path.relative_to(root)
        room = shown.parts[1].removesuffix(".py")
        package = ".".join(shown.parent.parts)
        machine = path.name == "machine.py" or path.name.endswith("_machine.py")
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, name, only_for_types in imported(tree, package):
            for text in kernel_findings(room, name):
                yield f"{shown}:{line}: {text}"
            if machine:
                for text in machine_findings(name, only_for_types=only_for_types):
                    yield f"{shown}:{line}: {text}"


def main() -> int:
    """Print the findings; return the exit code."""
    found = list(findings())
    for text in found:
        print(text)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
