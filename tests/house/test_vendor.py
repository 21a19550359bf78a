"""The vendoring of LMDB and xxHash refuses everything that is not exactly what was pinned."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from tools import vendor

pytest.importorskip("patch_ng")

SOURCE_TEXT = b"one\ntwo\nthree\n"
PATCH_TEXT = b"""diff --git a/upstream/dir/mdb.c b/upstream/dir/mdb.c
--- a/upstream/dir/mdb.c
+++ b/upstream/dir/mdb.c
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
"""
SETUP_TEXT = b"""
raise SystemExit("never run")
ENGINES = [dict(name="other", patch_names=["nothing"]), dict(name="v09", patch_names=["second-line"])]
"""


def make_sdist(path: Path, files: dict[str, bytes], *, links: dict[str, str] | None = None) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"lmdb-3.0.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"lmdb-3.0.0/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_source(sha256: str) -> vendor.Source:
    return dataclasses.replace(vendor.LMDB, sha256=sha256, members={"lib/mdb.c": "mdb.c"}, edits=())


GOOD = {"lib/mdb.c": SOURCE_TEXT, "setup.py": SETUP_TEXT, "lib/py-lmdb/second-line.patch": PATCH_TEXT}


def test_listed_patches_are_applied(tmp_path):
    """The vendored directory holds the wanted files, patched, and says of what it was made."""
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", GOOD))
    made = vendor.vendor(source, tmp_path / "build", str(tmp_path))
    assert (made / "mdb.c").read_bytes() == b"one\nTWO\nthree\n"
    assert sorted(path.name for path in made.iterdir()) == ["VENDORED", "mdb.c"]
    assert "second-line" in (made / "VENDORED").read_text()


def test_our_own_edits_are_made(tmp_path):
    """An edit is made as often as was said; one that fits more or less often stops the build."""
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", GOOD))
    good = dataclasses.replace(source, edits=(("mdb.c", r"t(hree)", r"T\1", 1),))
    assert (vendor.vendor(good, tmp_path / "build", str(tmp_path)) / "mdb.c").read_bytes() == b"one\nTWO\nThree\n"
    assert good.key != source.key
    bad = dataclasses.replace(source, edits=(("mdb.c", "absent", "", 1),))
    with pytest.raises(vendor.VendorError, match="fits 0 times"):
        vendor.vendor(bad, tmp_path / "build", str(tmp_path))
    assert not (tmp_path / "build" / f"lmdb-3.0.0-{bad.key}").exists()


def test_vendored_directory_is_reused(tmp_path):
    """A second build does not look at the archive again."""
    path = tmp_path / "lmdb-3.0.0.tar.gz"
    source = small_source(make_sdist(path, GOOD))
    made = vendor.vendor(source, tmp_path / "build", str(tmp_path))
    path.unlink()
    assert vendor.vendor(source, tmp_path / "build", str(tmp_path)) == made


def test_archive_with_another_hash_is_refused(tmp_path):
    """A changed archive on disk is named and nothing of it is unpacked."""
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", GOOD))
    with (tmp_path / "lmdb-3.0.0.tar.gz").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(vendor.VendorError, match=r"is not the lmdb-3\.0\.0\.tar\.gz that srengine pins"):
        vendor.vendor(source, tmp_path / "build", str(tmp_path))
    assert not (tmp_path / "build").exists()


def test_absent_archive_is_named(tmp_path):
    """SRENGINE_VENDOR_DIR without the file says which file and how to get it."""
    with pytest.raises(vendor.VendorError, match=r"has no xxhash-4\.1\.0\.tar\.gz; get it .* pip download"):
        vendor.vendor(vendor.XXHASH, tmp_path / "build", str(tmp_path))


def test_patch_that_does_not_fit_stops_the_build(tmp_path):
    """A patch with a hunk that does not fit leaves no vendored directory behind."""
    files = {**GOOD, "lib/mdb.c": b"something\nelse\nentirely\n"}
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", files))
    with pytest.raises(vendor.VendorError, match="second-line does not apply"):
        vendor.vendor(source, tmp_path / "build", str(tmp_path))
    assert list((tmp_path / "build").iterdir()) == []


def test_listed_patch_that_is_absent_stops_the_build(tmp_path):
    """A patch that the sdist lists but does not have is an error, not less hardening."""
    files = {name: data for name, data in GOOD.items() if not name.endswith(".patch")}
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", files))
    with pytest.raises(vendor.VendorError, match=r"has no lmdb-3\.0\.0/lib/py-lmdb/second-line\.patch"):
        vendor.vendor(source, tmp_path / "build", str(tmp_path))


def test_engine_without_patches_stops_the_build():
    """A set-up file that lists nothing for our engine is not the pinned one."""
    with pytest.raises(vendor.VendorError, match="lists no patches"):
        vendor.listed_patches("ENGINES = [dict(name='v10', patch_names=['a'])]", "v09")


def test_patch_names_cannot_lead_elsewhere():
    """A listed name with a separator is refused."""
    with pytest.raises(vendor.VendorError, match="lists no patches"):
        vendor.listed_patches("dict(name='v09', patch_names=['../../x'])", "v09")


def test_link_in_the_archive_is_refused(tmp_path):
    """A wanted member that is a link is not followed."""
    files = {name: data for name, data in GOOD.items() if name != "lib/mdb.c"}
    sha256 = make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", files, links={"lib/mdb.c": "/etc/hostname"})
    with pytest.raises(vendor.VendorError, match="not a regular file"):
        vendor.vendor(small_source(sha256), tmp_path / "build", str(tmp_path))


def test_member_beyond_the_bound_is_refused(tmp_path):
    """A member larger than the bound is not read."""
    files = {**GOOD, "lib/mdb.c": b"x" * (vendor.MEMBER_BYTES_MAX + 1)}
    source = small_source(make_sdist(tmp_path / "lmdb-3.0.0.tar.gz", files))
    with pytest.raises(vendor.VendorError, match="not a regular file of at most"):
        vendor.vendor(source, tmp_path / "build", str(tmp_path))


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"system": "win32", "machine": "AMD64"}, "win32 on AMD64"),
        ({"system": "linux", "machine": "i686"}, "linux on i686"),
        ({"system": "linux", "machine": "x86_64", "libc": "musl"}, "musl"),
        ({"implementation": "pypy"}, "pypy"),
        ({"version": (3, 10)}, "cpython 3.10"),
        ({"version": (3, 15)}, "cpython 3.15"),
        ({"pointer_bits": 32}, "32-bit"),
    ],
)
def test_unsupported_platform_is_refused(facts, named):
    """A platform that nobody tests is refused in one sentence that says which ones are supported."""
    known = {
        "system": "linux",
        "machine": "x86_64",
        "libc": "glibc",
        "implementation": "cpython",
        "version": (3, 12),
        "pointer_bits": 64,
    }
    vendor.check_platform(**known)
    with pytest.raises(vendor.VendorError, match="builds on Linux x86-64 and aarch64") as caught:
        vendor.check_platform(**{**known, **facts})
    assert named in str(caught.value)


def test_missing_compiler_is_named():
    """Without a C compiler the build says so, and how to get one."""
    with pytest.raises(vendor.VendorError, match="No C compiler: 'no-such-cc'"):
        vendor.check_toolchain(compiler="no-such-cc -O2")


def test_missing_headers_are_named(tmp_path):
    """Without Python.h the build says where it looked, and how to get it."""
    with pytest.raises(vendor.VendorError, match=r"No Python\.h in .*apt install python3"):
        vendor.check_toolchain(include_dirs=[str(tmp_path)], compiler="sh")


def test_only_the_supported_line_of_lmdb_is_taken():
    """Headers of LMDB 1.0, whose files nobody of the 0.9 line can read, are refused."""
    header = "#define MDB_VERSION_MAJOR\t{}\n#define MDB_VERSION_MINOR\t{}\n#define MDB_VERSION_PATCH\t7\n"
    assert vendor.lmdb_version(header.format(0, 9)) == "0.9.7"
    with pytest.raises(vendor.VendorError, match=r"this header is of 1\.0\.7"):
        vendor.lmdb_version(header.format(1, 0))


def test_missing_system_header_is_named(tmp_path):
    """SRENGINE_SYSTEM_LIBS=1 without the header says which package has it."""
    with pytest.raises(vendor.VendorError, match=r"no lmdb\.h in .*apt install liblmdb-dev"):
        vendor.system_header("lmdb.h", [str(tmp_path)], "liblmdb-dev")
