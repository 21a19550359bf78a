"""Build the reference loops of the benchmarks: ``python benchmarks/build.py``.

benchmarks/ext/reference.pyx becomes ``benchmarks._reference``, beside this file, with its own copy of the LMDB and the
xxHash that srengine compiles in (tools/vendor.py) and the same compiler flags. It is no part of the wheel.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("benchmarks/ext/reference.pyx")
# As in setup.py: a yardstick that was compiled otherwise would measure the compiler.
C_FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-pthread", "-UNDEBUG", "-fno-strict-aliasing", "-w"]


def build(*, force: bool = False) -> None:
    """Compile what is out of date; nothing when all is there. One process at a time, the next one finds it done."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "benchmarks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(force=force)


def _build(*, force: bool) -> None:
    sys.path.insert(0, str(ROOT))
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    from tools import vendor

    place = ROOT / "build" / "vendor"
    vendor_dir = os.environ.get("SRENGINE_VENDOR_DIR") or None
    system_libs = os.environ.get("SRENGINE_SYSTEM_LIBS", "") not in {"", "0"}
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        (extension,) = cythonize(
            [Extension("benchmarks._reference", [str(SOURCE)])], build_dir="build/cython", quiet=True, force=force
        )
        if system_libs:
            extension.libraries += ["lmdb"]
        else:
            lmdb = vendor.vendor(vendor.LMDB, place, vendor_dir)
            xxhash = vendor.vendor(vendor.XXHASH, place, vendor_dir)
            # NB: only relative sources end up below build/; absolute ones would scatter objects over the disk.
            extension.sources += [os.path.relpath(lmdb / name, ROOT) for name in ("mdb.c", "midl.c")]
            extension.include_dirs += [str(lmdb), str(xxhash)]
        extension.define_macros += [("XXH_INLINE_ALL", "1"), ("XXH_STATIC_LINKING_ONLY", "1")]
        extension.extra_compile_args += C_FLAGS
        extension.extra_link_args += ["-pthread"]
        distribution = Distribution({"name": "srengine-benchmarks", "ext_modules": [extension]})
        command = build_ext(distribution)
        command.inplace = True
        command.force = force
        command.build_temp = "build/benchmarks"
        command.ensure_finalized()
        command.run()
    finally:
        os.chdir(before)


if __name__ == "__main__":
    build(force="--force" in sys.argv[1:])
