"""Install each artefact of ``make wheel`` into a fresh environment and use it: ``python tools/try_dist.py dist``.

The smoke script runs in an empty directory, away from the source tree, so that only what was installed is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

SMOKE = """
import importlib.metadata, importlib.resources, pathlib, sys
import srengine
from srengine._native import build_info

here = pathlib.Path(srengine.__file__)
assert pathlib.Path(sys.prefix) in here.parents, here
with srengine.open("data") as store:
    tablet = store.tablet("users")
    tablet.put(b"user:1", b"Ada")
    tablet.put_many([(b"user:%d" % n, b"x" * n) for n in range(2, 100)])
    before = tablet.position
with srengine.open("data") as store:
    tablet = store.tablet("users")
    assert tablet.get(b"user:1") == b"Ada", tablet.get(b"user:1")
    assert tablet.position == before, (tablet.position, before)
    assert len(list(tablet.scan(prefix=b"user:"))) == 99
assert (importlib.resources.files("srengine") / "py.typed").is_file()
licences = [str(path) for path in importlib.metadata.files("srengine") if "licenses" in path.parts]
for wanted in ("LICENSE", "LMDB-OLDAP-2.8.txt", "xxHash-BSD-2-Clause.txt"):
    assert any(path.endswith(wanted) for path in licences), (wanted, licences)
print("ok: srengine", importlib.metadata.version("srengine"), "on LMDB", build_info.LMDB_VERSION,
      "patched" if build_info.LMDB_PATCHED else "unpatched")
"""


def check_wheel(path: Path) -> None:
    """Refuse a wheel that holds more than the package."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert all(top == "srengine" or top.endswith(".dist-info") for top in tops), tops
    assert any(name.startswith("srengine/_native/tablet.") and name.endswith(".so") for name in names), names


def try_artefact(path: Path) -> None:
    """Install ``path`` into a fresh environment and run the smoke script and the command line there."""
    with tempfile.TemporaryDirectory(prefix="srengine-dist-") as place:
        root = Path(place)
        venv.create(root / "venv", with_pip=True)
        binaries = root / "venv" / "bin"
        work = root / "work"
        work.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        for command in (
            [str(binaries / "python"), "-m", "pip", "install", "--quiet", str(path.resolve())],
            [str(binaries / "python"), "-c", SMOKE],
            [str(binaries / "srengine"), "--version"],
        ):
            subprocess.run(command, check=True, cwd=work, env=environment)


def main() -> int:
    """Try everything in the named directory; return the exit code."""
    directory = Path(sys.argv[1])
    artefacts = sorted([*directory.glob("*.whl"), *directory.glob("*.tar.gz")])
    if len(artefacts) != 2:
        print(f"{directory} should hold one wheel and one sdist, it holds {[path.name for path in artefacts]}")
        return 1
    for path in artefacts:
        print(f"trying {path.name}", flush=True)
        if path.suffix == ".whl":
            check_wheel(path)
        try_artefact(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
