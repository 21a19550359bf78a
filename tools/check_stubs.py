"""Compare each kernel's stub with the compiled module: ``python tools/check_stubs.py``.

mypy's stubtest imports the module and reports every name, signature and attribute that its stub gets wrong or leaves
out. Only kernels that are compiled are looked at; a kernel without a stub is a finding.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tools" / "stubtest_allowed.txt"


def main() -> int:
    """Run stubtest on every kernel; return the exit code."""
    kernels = sorted(path.stem for path in (ROOT / "ext").glob("*.pyx"))
    missing = [name for name in kernels if not (ROOT / "srengine" / "_native" / f"{name}.pyi").is_file()]
    for name in missing:
        print(f"ext/{name}.pyx: there is no stub srengine/_native/{name}.pyi")
    modules = [f"srengine._native.{name}" for name in kernels if name not in missing] + ["srengine._native.build_info"]
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "--mypy-config-file", "pyproject.toml"]
    # Every cdef class is one; no stub of ours is for subclassing several of them.
    command += ["--ignore-disjoint-bases"]
    command += ["--allowlist", str(ALLOWED), "--ignore-unused-allowlist", *modules]
    done = subprocess.run(command, check=False, cwd=ROOT)
    return 1 if missing else done.returncode


if __name__ == "__main__":
    sys.exit(main())
