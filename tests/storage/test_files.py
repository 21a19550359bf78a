"""Private, durable, locked, local: what storage asks of files and directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.storage import catalog, files


@pytest.fixture
def directory(tmp_path):
    with files.Directory(tmp_path) as opened:
        yield opened


def test_directories_and_files_are_private(tmp_path):
    """F52: what storage makes is 0700 and 0600, whatever the umask."""
    before = os.umask(0)
    try:
        files.make_private_directory(tmp_path / "d")
        with files.Directory(tmp_path / "d") as directory:
            directory.write_durably("f", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o701, 0o720])
def test_a_loose_directory_is_refused(tmp_path, mode):
    """F52: a data directory that others can reach is refused with the mode and the command that mends it."""
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(mode)
    with pytest.raises(errors.UnsafePermissions, match="chmod 0700") as caught:
        files.make_private_directory(loose)
    assert caught.value.mode == mode
    assert not files.make_private_directory(loose, insecure=True)


def test_a_loose_file_is_refused(directory, tmp_path):
    """F52: a private file with mode 0644 is not read."""
    directory.write_durably("key", b"secret")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(errors.UnsafePermissions, match="chmod 0600"):
        directory.read("key", bytes_max=100)
    assert directory.read("key", bytes_max=100, insecure=True) == b"secret"


@pytest.mark.requires_root
def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    """F52: a data directory that belongs to another user is refused."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    os.chown(other, 12345, 12345)
    with pytest.raises(errors.UnsafePermissions, match="belongs to user 12345"):
        files.check_private(other, directory=True)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "a\\b", "x" * 4096, "\uff41", "a\n", " a", "a b", "é"]
)
def test_names_cannot_leave_the_directory(directory, name):
    """F40: no name with a separator, NUL, look-alike or of 4 KiB opens, makes, removes or renames anything."""
    for action in (
        lambda: directory.open(name, os.O_RDONLY),
        lambda: directory.read(name, bytes_max=10),
        lambda: directory.write_durably(name, b""),
        lambda: directory.remove(name),
        lambda: directory.remove_tree(name),
        lambda: files.move(directory, name, directory, "y"),
        lambda: files.move(directory, "y", directory, name),
    ):
        with pytest.raises(errors.InvalidValue):
            action()


@given(name=st.text())
def test_any_name_is_an_entry_or_refused(name):
    """F40: whatever the text, it is refused or names an entry of the directory and nothing else."""
    try:
        checked = files.check_component(name)
    except errors.InvalidValue:
        return
    assert checked == name
    assert Path(checked).name == checked
    assert checked not in {"", ".", ".."}
    assert "\0" not in checked


def test_symbolic_links_are_not_followed(directory, tmp_path):
    """F40: a link in the place of a file is refused, and removing a tree removes the link and not what it names."""
    victim = tmp_path.parent / f"{tmp_path.name}-victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"keep me")
    (tmp_path / "link").symlink_to(victim / "file")
    with pytest.raises(errors.InvalidValue, match="symbolic link"):
        directory.open("link", os.O_RDONLY)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "inner").symlink_to(victim)
    directory.remove_tree("tree")
    directory.remove_tree("link")
    assert (victim / "file").read_bytes() == b"keep me"


def test_a_write_replaces_whole_or_not_at_all(directory, tmp_path, monkeypatch):
    """F07: when a durable write cannot be finished the old content stands and nothing is left behind."""
    directory.write_durably("f", b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(errors.DiskFull):
        directory.write_durably("f", b"new")
    monkeypatch.undo()
    assert directory.read("f", bytes_max=10) == b"old"
    assert directory.names() == ["f"]


def test_ctrl_c_in_a_durable_write_leaves_nothing(directory, monkeypatch):
    """F53: KeyboardInterrupt in the middle of a durable write leaves the old file and no temporary one."""
    directory.write_durably("f", b"old")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        directory.write_durably("f", b"new")
    monkeypatch.undo()
    assert directory.names() == ["f"]


def test_a_file_longer_than_its_bound_is_not_read(directory):
    """F40: a small file that has grown beyond its bound is refused before it fills the memory."""
    directory.write_durably("f", bytes(1000))
    assert len(directory.read("f", bytes_max=1000)) == 1000
    with pytest.raises(errors.CorruptionError, match="999"):
        directory.read("f", bytes_max=999)


def test_a_pipe_in_the_place_of_a_file_does_not_block(directory, tmp_path):
    """F40: a FIFO or a directory in the place of a file is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(errors.InvalidValue):
            directory.read(name, bytes_max=10)


# --- locks -----------------------------------------------------------------------------------------------------------


def test_a_second_owner_is_refused_and_told_the_first(tmp_path):
    """T14: the second lock of a directory, in this process or another, is `AlreadyOpen` and names the owner's pid."""
    lock = files.DirectoryLock(tmp_path)
    with pytest.raises(errors.AlreadyOpen, match="this process") as caught:
        files.DirectoryLock(tmp_path)
    assert caught.value.pid == os.getpid()
    source = (
        "import sys; from pathlib import Path; from srengine import errors; from srengine.storage import files\n"
        "try: files.DirectoryLock(Path(sys.argv[1]))\n"
        "except errors.AlreadyOpen as error: print(error.details['pid'])\n"
    )
    other = subprocess.run([sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(other.stdout) == os.getpid()
    lock.release()
    files.DirectoryLock(tmp_path).release()


def test_deleting_the_lock_file_does_not_unlock(tmp_path):
    """F09: with LOCK deleted or replaced under its owner, a second owner is still refused."""
    lock = files.DirectoryLock(tmp_path)
    (tmp_path / files.LOCK_NAME).unlink()
    with pytest.raises(errors.AlreadyOpen):
        files.DirectoryLock(tmp_path)
    (tmp_path / files.LOCK_NAME).write_text("{}")
    with pytest.raises(errors.AlreadyOpen):
        files.DirectoryLock(tmp_path)
    lock.release()


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b'{"pid": "x"}', b"[" * 5000, b"\xff" * 10])
def test_any_lock_file_means_nothing(tmp_path, content):
    """F09: a left-over LOCK with any content does not keep the next owner out."""
    (tmp_path / files.LOCK_NAME).write_bytes(content)
    with files.Directory(tmp_path) as directory:
        assert files.read_owner(directory) is None
    lock = files.DirectoryLock(tmp_path)
    with files.Directory(tmp_path) as directory:
        assert files.read_owner(directory) == os.getpid()
    lock.release()


def test_the_lock_ends_with_its_process(tmp_path):
    """F09: a process that is killed while it holds the directory leaves it free."""
    source = (
        "import os, sys; from pathlib import Path; from srengine.storage import files\n"
        "files.DirectoryLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", source, str(tmp_path)]).returncode == -9
    files.DirectoryLock(tmp_path).release()


# --- remote file systems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", sorted(files.REMOTE_FILE_SYSTEMS))
def test_remote_file_systems_are_refused(tmp_path, monkeypatch, magic):
    """T14: a directory on NFS, SMB, FUSE, 9p, virtiofs and their like is refused unless it is allowed explicitly."""
    monkeypatch.setattr(files, "file_system_magic", lambda path: magic)
    with pytest.raises(errors.UnsupportedFileSystem) as caught:
        files.check_local_file_system(tmp_path)
    assert caught.value.file_system == files.REMOTE_FILE_SYSTEMS[magic]
    files.check_local_file_system(tmp_path, allow_remote_fs=True)


@pytest.mark.skipif(sys.platform != "linux", reason="statfs of Linux")
def test_the_file_system_is_asked_of_the_kernel(tmp_path):
    """T14: the magic number is the kernel's: /proc is 0x9fa0, and this directory is on a local disk."""
    assert files.file_system_magic(Path("/proc")) == 0x9FA0
    files.check_local_file_system(tmp_path)
    with pytest.raises(errors.NotFound):
        files.file_system_magic(tmp_path / "missing")


# --- the catalog of names ---------------------------------------------------------------------------------------------

ENTRIES = {"users": catalog.Entry("a" * 32, "ready"), "x.y-z": catalog.Entry("b" * 32, "creating")}


def test_the_catalog_reads_what_it_wrote(directory):
    """F40: names and ids survive; a missing file is an empty catalog."""
    assert catalog.read_catalog(directory) == {}
    catalog.write_catalog(directory, ENTRIES)
    assert catalog.read_catalog(directory) == ENTRIES


@pytest.mark.fuzz
@given(st.binary(max_size=400))
def test_any_bytes_are_a_catalog_or_damage(content):
    """F40: any bytes in store.json are refused by our error."""
    with pytest.raises((errors.CorruptionError, errors.UnsupportedFeature)):
        catalog.decode_catalog(content, "store.json")


@pytest.mark.fuzz
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_flipped_bit_passes(at, bit):
    """T16: a flipped bit in store.json is damage, or changes nothing that is read (white space)."""
    raw = bytearray(catalog.encode_catalog(ENTRIES))
    raw[at % len(raw)] ^= 1 << bit
    try:
        found = catalog.decode_catalog(bytes(raw), "store.json")
    except (errors.CorruptionError, errors.UnsupportedFeature):
        return
    assert found == ENTRIES


@pytest.mark.fuzz
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["id", "state", "ready", "x"]) | st.text(), inner)
        ),
    )
)
def test_a_catalog_with_a_right_check_and_wrong_content_is_damage(tablets):
    """F40: a correct checksum does not excuse impossible names, ids or states."""
    import json

    body = {"format": 1, "tablets": tablets}
    content = json.dumps({**body, "check": catalog._check(body)}).encode()
    try:
        found = catalog.decode_catalog(content, "store.json")
    except errors.CorruptionError:
        return
    assert all(catalog.is_tablet_id(entry.tablet_id) for entry in found.values())
    assert tablets == {} or found
