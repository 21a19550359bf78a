"""Build the compiled kernels: every ext/<name>.pyx becomes srengine._native.<name>.

Metadata stands in pyproject.toml; the C sources of LMDB and xxHash come by way of tools/vendor.py. Environment:

``SRENGINE_VENDOR_DIR``   take the two sdists from this directory instead of downloading them
``SRENGINE_SYSTEM_LIBS``  1: build on the system's lmdb.h, liblmdb and xxhash.h, unpatched (``srengine --version`` says)

LMDB is linked into the kernels `tablet` and `rows`, with hidden symbols: each opens environments of its own kind, and
neither ever meets py-lmdb's. xxHash is a header that every kernel inlines. Instruction sets are the platform's portable
ones, but for one function of the kernel `chunk` that asks the processor before it is called (ext/xxh3_wide.h).

Generated C stands under build/cython/. Cython does not notice a changed header of the module itself in this arrangement
(implementation in ext/, headers in srengine/_native/), so the C file is removed when any header is newer.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import vendor  # noqa: E402  (the root is not on the path of an isolated build)

VENDOR = ROOT / "build" / "vendor"
GENERATED = Path("build") / "cython"
C_FLAGS = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", "-pthread", "-UNDEBUG", "-fno-strict-aliasing"]
# A digest comes back in two registers; joined into one vector by way of the stack it waits for both stores.
C_FLAGS += ["-fno-tree-slp-vectorize"]
# LMDB keeps its asserts: a page that breaks them stops the process instead of the data.
LMDB_FLAGS = [*C_FLAGS, "-w"]
# Cython's generated code, not ours, triggers these.
KERNEL_FLAGS = [
    *C_FLAGS,
    *("-Wno-unused-function", "-Wno-sign-compare", "-Wno-maybe-uninitialized", "-Wno-alloc-size-larger-than"),
]
XXHASH_MACROS = [("XXH_INLINE_ALL", "1"), ("XXH_STATIC_LINKING_ONLY", "1")]
WIDE_FLAGS = [*C_FLAGS, "-mavx2"]
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "auto_pickle": False,
}
SYSTEM_INCLUDES = ["/usr/local/include", "/usr/include", "/opt/homebrew/include", "/opt/local/include"]


def wanted(name: str) -> bool:
    """Return whether an environment switch is on."""
    return os.environ.get(name, "") not in {"", "0"}


def relative(pattern: str) -> list[str]:
    """Return the matching files as sorted paths relative to the root, as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def extensions() -> list[Extension]:
    """Return one extension for each kernel that is there, its sources still in Cython."""
    headers = relative("ext/*.pxi") + relative("ext/*.h") + relative("srengine/_native/*.pxd")
    return [Extension(f"srengine._native.{Path(p).stem}", [p], depends=[*headers]) for p in relative("ext/*.pyx")]


class BuildKernels(build_ext):
    """Vendor, translate, compile; say in one sentence what is missing."""

    def run(self) -> None:
        """Build everything, or exit with one sentence."""
        try:
            vendor.check_platform()
            vendor.check_toolchain()
            self.prepare()
        except vendor.VendorError as error:
            raise SystemExit(f"srengine: {error}") from None
        super().run()
        self.write_build_info()

    def prepare(self) -> None:
        """Get the C sources and say which ones."""
        self.system_libs = wanted("SRENGINE_SYSTEM_LIBS")
        if self.system_libs:
            places = [*(self.include_dirs or []), *SYSTEM_INCLUDES]
            self.lmdb_header = vendor.system_header("lmdb.h", places, "liblmdb-dev")
            xxhash_header = vendor.system_header("xxhash.h", places, "libxxhash-dev")
            self.lmdb_dir, self.xxhash_dir = self.lmdb_header.parent, xxhash_header.parent
        else:
            where = os.environ.get("SRENGINE_VENDOR_DIR") or None
            self.lmdb_dir = vendor.vendor(vendor.LMDB, VENDOR, where)
            self.xxhash_dir = vendor.vendor(vendor.XXHASH, VENDOR, where)
            self.lmdb_header = self.lmdb_dir / "lmdb.h"
        self.lmdb_version = vendor.lmdb_version(self.lmdb_header.read_text(encoding="utf-8", errors="replace"))

    def build_extensions(self) -> None:
        """Translate and compile each kernel."""
        lmdb_objects = [] if self.system_libs else self.compile_lmdb()
        for extension in self.extensions:
            self.complete(extension, lmdb_objects)
            if extension.name == "srengine._native.chunk":
                self.widen(extension)
        super().build_extensions()

    def complete(self, extension: Extension, lmdb_objects: list[str]) -> None:
        """Turn a declared extension into one that can be compiled."""
        from Cython.Build import cythonize  # metadata commands work without Cython

        source = extension.sources[0]
        generated = GENERATED / Path(source).with_suffix(".c")
        newest = max((ROOT / p).stat().st_mtime for p in [*extension.depends, source, "setup.py"])
        if generated.exists() and generated.stat().st_mtime < newest:
            generated.unlink()
        (translated,) = cythonize(
            [Extension(extension.name, [source])],
            build_dir=str(GENERATED),
            include_path=["."],
            compiler_directives=DIRECTIVES,
            quiet=True,
        )
        extension.sources = translated.sources
        extension.include_dirs += [str(ROOT / "ext"), str(self.lmdb_dir), str(self.xxhash_dir)]
        extension.define_macros += XXHASH_MACROS
        extension.extra_compile_args += KERNEL_FLAGS
        extension.extra_link_args += ["-pthread"]
        extension.depends += [str(self.lmdb_header), str(self.xxhash_dir / "xxhash.h"), *lmdb_objects]
        if extension.name in {"srengine._native.tablet", "srengine._native.rows"}:
            extension.extra_objects += lmdb_objects
            if self.system_libs:
                extension.libraries += ["lmdb"]
            else:
                extension.define_macros += [("SR_LMDB_WALK", "1")]

    def widen(self, extension: Extension) -> None:
        """Add the code for wider vectors where the platform has any; called only if the processor has them too."""
        # NB: a universal build for macOS would hand the flag to the compiler of the other processor as well.
        if sysconfig.get_platform() != "linux-x86_64":
            return
        objects = self.compile_once("xxh3-wide", [ROOT / "ext" / "xxh3_wide.c"], [self.xxhash_dir], WIDE_FLAGS)
        extension.define_macros += [("SR_XXH3_WIDE", "1")]
        extension.extra_objects += objects
        extension.depends += objects

    def compile_lmdb(self) -> list[str]:
        """Compile the vendored LMDB: mdb.c as a part of ext/lmdb_walk.c."""
        sources = [ROOT / "ext" / "lmdb_walk.c", self.lmdb_dir / "midl.c"]
        return self.compile_once(self.lmdb_dir.name, sources, [self.lmdb_dir], LMDB_FLAGS, [self.lmdb_dir / "mdb.c"])

    def compile_once(
        self, name: str, sources: list[Path], includes: list[Path], flags: list[str], included: Sequence[Path] = ()
    ) -> list[str]:
        """Compile C sources to objects, or take those of an earlier build, so that a changed kernel does not wait.

        ``included``: files that the sources include, beside the headers next to them and in ``includes``.
        """
        # NB: the compiler's command line comes from the interpreter and the environment, so it is part of the place.
        text = repr((self.compiler.compiler_so, flags, [str(include) for include in includes]))
        place = Path("build") / "objects" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        objects = [place / source.with_suffix(".o").name for source in sources]
        headers = [path for folder in {*includes, *(s.parent for s in sources)} for path in folder.glob("*.h")]
        newest = max(path.stat().st_mtime for path in [*sources, *included, *headers, ROOT / "setup.py"])
        if not all(path.is_file() and path.stat().st_mtime >= newest for path in objects):
            place.mkdir(parents=True, exist_ok=True)
            for source, target in zip(sources, objects, strict=True):
                made = self.compiler.compile(
                    [os.path.relpath(source, ROOT)],
                    output_dir=str(place),
                    include_dirs=[str(include) for include in includes],
                    extra_postargs=flags,
                )
                Path(made[0]).replace(target)
        return [str(path) for path in objects]

    def write_build_info(self) -> None:
        """Write srengine/_native/build_info.py beside the kernels: facts for ``srengine --version`` and support."""
        # NB: while setuptools' own run() builds in place, this path leads to build/; hence only after it.
        target = Path(self.get_ext_fullpath("srengine._native.build_info")).with_name("build_info.py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            '"""Facts about this build; written by setup.py."""\n\n'
            f"LMDB_VERSION = {self.lmdb_version!r}\n"
            f"LMDB_PATCHED = {not self.system_libs!r}\n"
            f"SYSTEM_LIBS = {self.system_libs!r}\n",
            encoding="utf-8",
        )


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
