"""Fetch, check, unpack and patch the C sources that srengine compiles in: LMDB and xxHash.

The sources come out of the sdists of the PyPI packages `lmdb` and `xxhash`, pinned by version and SHA-256, because
every machine that can install a Python package can get them, through the settings of pip that its owner made, and
nothing else has to be reachable (docs/decisions/0002-vendored-sources.md)::

    pip download ----> sdist.tar.gz --hash--> named members --patch-ng--> build/vendor/lmdb-3.0.0-<key>/
    SRENGINE_VENDOR_DIR -^                                                 build/vendor/xxhash-4.1.0-<key>/

Rules:

* The hash is compared before one byte of an archive is interpreted, also for archives from disk.
* Nothing is extracted by the archive's own names: each wanted member is read by its full name, must be a regular file
  of bounded size, and is written to a name of ours.
* The hardening patches are those that the sdist lists for its 0.9 engine, in its order; each must apply, or the build
  fails.
* A vendored directory appears by a rename, so an interrupted build leaves none; its name contains the hash of
  everything that made it, so a stale one is never used.

Everything here raises `VendorError` with one sentence that says what is missing and how to get it.

This module uses the standard library alone (patch-ng is imported where it is needed), since setup.py imports it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEMBER_BYTES_MAX = 4 * 1024 * 1024
"""The largest wanted member, mdb.c, has 0.4 MiB; more is not what we pinned."""

PYTHON_MIN = (3, 11)
PYTHON_MAX = (3, 14)


class VendorError(Exception):
    """The build cannot go on; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Source:
    """One pinned sdist and what is taken out of it.

    ``members`` maps names inside the archive, below its top directory, to names in the vendored directory.
    ``patches`` says where the archive keeps patches (a directory below the top) and which engine's list to follow.
    ``edits`` are our own changes after that: (file, regular expression, replacement, how often it must match).
    """

    name: str
    version: str
    sha256: str
    members: dict[str, str]
    patches: str | None = None
    patch_engine: str | None = None
    patch_strip: int = 3
    edits: tuple[tuple[str, str, str, int], ...] = ()

    @property
    def archive(self) -> str:
        """Return the file name of the sdist."""
        return f"{self.name}-{self.version}.tar.gz"

    @property
    def top(self) -> str:
        """Return the archive's top directory."""
        return f"{self.name}-{self.version}"

    @property
    def key(self) -> str:
        """Return twelve hexadecimal digits that change with everything that decides the vendored directory."""
        text = repr(
            (
                self.sha256,
                sorted(self.members.items()),
                self.patches,
                self.patch_engine,
                self.patch_strip,
                self.edits,
                1,
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]


LMDB = Source(
    name="lmdb",
    version="3.0.0",
    sha256="06dda0723545e14d56ac7dcd6f582d9922c2ed5e16f1c3f8d0e670a96ec2ee65",
    members={
        "lib/mdb.c": "mdb.c",
        "lib/midl.c": "midl.c",
        "lib/lmdb.h": "lmdb.h",
        "lib/midl.h": "midl.h",
        "LICENSE": "LICENSE",
    },
    patches="lib/py-lmdb",
    patch_engine="v09",
    edits=(
        # What a search asserts of the pages that it meets is true of healthy files only: with one flipped bit it would
        # abort the process. The page is damaged, and the caller is told so.
        (
            "mdb.c",
            (
                r"mdb_cassert\(mc, (IS_LEAF\(.+\)|IS_BRANCH\(.+\)|!mc->mc_dbi \|\| NUMKEYS\(mp\) > 1"
                r"|i > 0|i < NUMKEYS\(mp\))\);"
            ),
            r"if (!(\1)) return MDB_CORRUPTED;",
            9,
        ),
    ),
)

XXHASH = Source(
    name="xxhash",
    version="4.1.0",
    sha256="c9b288e4c1f5dae54417bc8a05e6f6daf505783d916b4783f4dd2f2e7d5db486",
    members={
        "deps/xxhash/xxhash.h": "xxhash.h",
        "deps/xxhash/xxh3.h": "xxh3.h",
        "deps/xxhash/xxhash.c": "xxhash.c",
        "deps/xxhash/LICENSE": "LICENSE",
    },
)


# --- is this a machine that we can build on? --------------------------------------------------------------------------


def check_platform(
    *,
    system: str = sys.platform,
    machine: str | None = None,
    libc: str | None = None,
    implementation: str | None = None,
    version: tuple[int, int] | None = None,
    pointer_bits: int | None = None,
) -> None:
    """Refuse a platform that nobody tests, in a sentence. The arguments default to this machine."""
    machine = platform.machine() if machine is None else machine
    implementation = sys.implementation.name if implementation is None else implementation
    version = (sys.version_info[0], sys.version_info[1]) if version is None else version
    pointer_bits = sys.maxsize.bit_length() + 1 if pointer_bits is None else pointer_bits
    supported = (
        "srengine builds on Linux x86-64 and aarch64 with glibc (and, best effort, on macOS) with CPython 3.11 to 3.14"
    )
    if implementation != "cpython" or not PYTHON_MIN <= version <= PYTHON_MAX:
        raise VendorError(f"{supported}; this is {implementation} {version[0]}.{version[1]}.")
    if pointer_bits != 64:
        raise VendorError(f"{supported}; this Python has {pointer_bits}-bit pointers.")
    if system == "darwin":
        return
    if system != "linux" or machine not in {"x86_64", "aarch64"}:
        raise VendorError(f"{supported}; this is {system} on {machine}.")
    libc = _libc_name() if libc is None else libc
    if libc != "glibc":
        raise VendorError(f"{supported}; this system's C library is {libc or 'unknown'}.")


def _libc_name() -> str:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return "not glibc"
    return (text or "not glibc").split()[0]


def check_toolchain(include_dirs: list[str] | None = None, compiler: str | None = None) -> None:
    """Refuse to begin without a C compiler or without Python's headers, and say how to get them."""
    command = compiler or os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    program = str(command).split()[0]
    if shutil.which(program) is None:
        raise VendorError(
            f"No C compiler: {program!r} is not on the PATH; install one (Debian, Ubuntu: apt install gcc libc6-dev; "
            "Fedora: dnf install gcc; macOS: xcode-select --install) or name it in CC."
        )
    places = include_dirs or [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if not any((Path(place) / "Python.h").is_file() for place in places):
        raise VendorError(
            f"No Python.h in {' or '.join(dict.fromkeys(places))}; install the headers of this Python (Debian, Ubuntu: "
            f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev; Fedora: dnf install python3-devel)."
        )


# --- the archives -----------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_archive(source: Source, path: Path) -> Path:
    """Return ``path`` if the file is exactly the pinned archive."""
    found = file_sha256(path)
    if found != source.sha256:
        raise VendorError(
            f"{path} is not the {source.archive} that srengine pins (sha256 {found}, expected {source.sha256}); "
            "delete it and get that file from PyPI."
        )
    return path


def find_archive(source: Source, directory: Path) -> Path:
    """Return the pinned archive from a directory on disk (``SRENGINE_VENDOR_DIR``)."""
    path = directory / source.archive
    if not path.is_file():
        raise VendorError(
            f"SRENGINE_VENDOR_DIR={directory} has no {source.archive}; get it on another machine with: "
            f"LMDB_PURE=1 pip download --no-deps --no-binary {source.name} {source.name}=={source.version}"
        )
    return check_archive(source, path)


def download_archive(source: Source, directory: Path) -> Path:
    """Download the pinned sdist with pip, with whatever settings pip has here, and return its path.

    pip prepares the metadata of what it downloads, which runs the sdist's own setup.py: ``LMDB_PURE`` keeps that one
    from calling a ``patch`` program. It runs in this build environment, which has the setuptools that it needs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / source.archive
    if path.is_file() and file_sha256(path) == source.sha256:
        return path
    requirements = directory / f"{source.name}.txt"
    requirements.write_text(f"{source.name}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", source.name]
    command += ["--no-build-isolation", "--require-hashes", "--dest", str(directory), "-r", str(requirements)]
    done = subprocess.run(
        command, check=False, env={**os.environ, "LMDB_PURE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0 or not path.is_file():
        lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines[-1:] or ["it said nothing"]
        raise VendorError(
            f"pip could not download {source.archive} ({errors[0].strip()}); check pip's index and the network, "
            "or put the file into a directory and name that in SRENGINE_VENDOR_DIR."
        )
    return check_archive(source, path)


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the bytes of one regular member, bounded."""
    try:
        member = archive.getmember(name)
    except KeyError:
        raise VendorError(f"The sdist has no {name}: it is not the one that srengine was made for.") from None
    if not member.isreg() or member.size > MEMBER_BYTES_MAX:
        raise VendorError(f"In the sdist {name} is not a regular file of at most {MEMBER_BYTES_MAX} bytes.")
    file = archive.extractfile(member)
    assert file is not None, name
    with file:
        return file.read()


# --- patches ----------------------------------------------------------------------------------------------------------


def listed_patches(setup_text: str, engine: str) -> list[str]:
    """Return the patch names that the sdist's setup.py lists for ``engine``, in order, without running that file."""
    for node in ast.walk(ast.parse(setup_text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"):
            continue
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        name, names = words.get("name"), words.get("patch_names")
        if isinstance(name, ast.Constant) and name.value == engine and names is not None:
            found = ast.literal_eval(names)
            if found and all(re.fullmatch(r"[a-z0-9-]+", item) for item in found):
                return list(found)
    raise VendorError(f"The sdist's setup.py lists no patches for its engine {engine}: it is not the pinned one.")


def apply_patch(text: bytes, name: str, root: Path, strip: int) -> None:
    """Apply one unified diff below ``root``; every hunk must fit."""
    try:
        patch_ng = importlib.import_module("patch_ng")
    except ImportError:
        raise VendorError("The build needs the package patch-ng to harden LMDB: pip install patch-ng.") from None
    logging.getLogger("patch_ng").setLevel(logging.ERROR)
    patches = patch_ng.fromstring(text)
    # NB: patch-ng takes the a/ and b/ of a git diff off by itself, one level less is left for us.
    if not patches or patches.errors or not patches.apply(strip - 1, root=str(root)):
        raise VendorError(f"The patch {name} does not apply to the pinned LMDB, so the build stops here.")


# --- the vendored directories -----------------------------------------------------------------------------------------


def edit(path: Path, pattern: str, replacement: str, count: int) -> None:
    """Replace every match in a file; raises `VendorError` unless there are exactly ``count``."""
    changed, found = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
    if found != count:
        raise VendorError(f"{path.name} is not the pinned one: a change of ours fits {found} times, not {count}.")
    path.write_text(changed, encoding="utf-8")


def unpack(source: Source, archive_path: Path, target: Path) -> Path:
    """Unpack the wanted members into ``target``, patched, and return ``target``. It appears whole or not at all."""
    if (target / "VENDORED").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{source.name}-", dir=target.parent))
    try:
        names: list[str] = []
        with tarfile.open(archive_path, "r:gz") as archive:
            for member, name in source.members.items():
                (stage / name).write_bytes(read_member(archive, f"{source.top}/{member}"))
            if source.patches is not None:
                assert source.patch_engine is not None, source
                setup_text = read_member(archive, f"{source.top}/setup.py").decode()
                names = listed_patches(setup_text, source.patch_engine)
                for name in names:
                    text = read_member(archive, f"{source.top}/{source.patches}/{name}.patch")
                    apply_patch(text, name, stage, source.patch_strip)
        for name, pattern, replacement, count in source.edits:
            edit(stage / name, pattern, replacement, count)
        made_of = [f"{source.top} {source.sha256}", *names]
        (stage / "VENDORED").write_text("\n".join(made_of) + "\n", encoding="utf-8")
        if target.exists():  # only an unfinished one of an older scheme can be there
            shutil.rmtree(target)
        stage.rename(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return target


def vendor(source: Source, build_dir: Path, vendor_dir: str | None) -> Path:
    """Return the directory with the ready C sources of ``source``, made now or before."""
    target = build_dir / f"{source.top}-{source.key}"
    if (target / "VENDORED").is_file():
        return target
    if vendor_dir:
        archive = find_archive(source, Path(vendor_dir))
    else:
        archive = download_archive(source, build_dir / "sdists")
    return unpack(source, archive, target)


def lmdb_version(header: str) -> str:
    """Return the version that an lmdb.h declares, such as ``0.9.36``."""
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        found = re.search(rf"^#define\s+MDB_VERSION_{part}\s+(\d+)", header, re.MULTILINE)
        if found is None:
            raise VendorError("This lmdb.h declares no version; it is damaged or not LMDB's.")
        numbers.append(found.group(1))
    if numbers[:2] != ["0", "9"]:
        raise VendorError(f"srengine needs LMDB of the 0.9 line, this header is of {'.'.join(numbers)}.")
    return ".".join(numbers)


def system_header(name: str, include_dirs: list[str], package: str) -> Path:
    """Return the path of a system header (``SRENGINE_SYSTEM_LIBS=1``)."""
    for place in include_dirs:
        if (Path(place) / name).is_file():
            return Path(place) / name
    raise VendorError(
        f"SRENGINE_SYSTEM_LIBS=1 but there is no {name} in {', '.join(include_dirs)}; install it (Debian, Ubuntu: "
        f"apt install {package}), or unset that variable to build on the pinned sources."
    )
