"""Files and directories as storage needs them: private, durable, locked, and on a disk that LMDB can use.

Everything that srengine keeps on disk passes through here, so that four rules hold everywhere:

* **Private.** Directories are made 0700 and files 0600. One that others can read or change is refused with
  `UnsafePermissions` (``insecure=True`` lets it pass), because the records and the keys of a node are in it.
* **Durable.** `write_durably` replaces a file as a whole: temporary file, fsync, rename, fsync of the directory. After
  it returns the new content survives a power loss; before, the old one does. There is no moment with half of both.
* **Beneath.** Files are opened relative to a descriptor of their directory, never followed through a symbolic link, and
  only by names without a separator. A name that came from outside can therefore not leave the directory.
* **Owned.** A data directory belongs to one process (`DirectoryLock`). The lock is held on the directory itself as well
  as on the file ``LOCK`` that names the owner, so deleting that file does not let a second owner in.

NB: LMDB's own files (``data.mdb``, ``lock.mdb``) must never be opened and closed by other code of a process that has
the environment open: closing any descriptor of a file drops the process's POSIX record locks on it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import sys
from typing import TYPE_CHECKING, Final, Self

from srengine import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
LOCK_NAME: Final = "LOCK"
TEMPORARY_PREFIX: Final = ".new-"
"""Files of an interrupted `write_durably`, and directories that were to be renamed; whoever opens the directory for
writing may remove them.
"""

_LOOSE: Final = 0o077
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_LOCK_BYTES_MAX: Final = 4096

REMOTE_FILE_SYSTEMS: Final = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFE534D42: "smb2",
    0xFF534D42: "cifs",
    0x564C: "ncp",
    0x65735546: "fuse or virtiofs",
    0x01021997: "9p",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
}
"""statfs magic numbers of file systems whose memory maps or locks are not those of one local kernel."""


def check_component(name: str) -> str:
    """Return ``name`` if it names an entry of a directory and nothing else.

    Raises `InvalidValue` for an empty name, ``.``, ``..``, anything with a separator, NUL or a character outside
    ``A-Z a-z 0-9 . _ -``.
    """
    if not isinstance(name, str) or name in {".", ".."} or _NAME.fullmatch(name) is None:
        raise errors.InvalidValue(f"{_shown(name)} cannot name a file of a data directory", what="file")
    return name


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) < 80 else text[:76] + "..."


# --- private directories and files -----------------------------------------------------------------------------------


def make_private_directory(path: Path, *, insecure: bool = False) -> bool:
    """Make the directory ``path`` (mode 0700) durably unless it is there; return whether it was made.

    The parent must exist. One that is there is checked as by `check_private`. Raises `NotFound` without a parent,
    `InvalidValue` when something else has the name.
    """
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        made = False
    except FileNotFoundError as error:
        raise errors.NotFound(f"{path.parent} does not exist", path=str(path.parent)) from error
    except OSError as error:
        raise from_os_error(error, f"cannot make the directory {path}") from error
    else:
        made = True
        # The umask can only have taken bits away that the owner needs.
        os.chmod(path, DIRECTORY_MODE)
        sync_directory(path.parent)
    check_private(path, directory=True, insecure=insecure)
    return made


def check_private(path: Path, *, directory: bool, insecure: bool = False) -> None:
    """Check that ``path`` is a directory (or a plain file) that nobody but its owner and root can read or change.

    The last component of a data directory's own path may be a symbolic link: where it points is the user's choice.
    Raises `NotFound`, `InvalidValue` (something else is there) or `UnsafePermissions`.
    """
    try:
        status = path.stat() if directory else path.lstat()
    except FileNotFoundError as error:
        raise errors.NotFound(f"{path} does not exist", path=str(path)) from error
    except OSError as error:
        raise from_os_error(error, f"cannot look at {path}") from error
    if directory and not stat.S_ISDIR(status.st_mode):
        raise errors.InvalidValue(f"{path} is not a directory", path=str(path))
    if not directory and not stat.S_ISREG(status.st_mode):
        raise errors.InvalidValue(f"{path} is not a plain file", path=str(path))
    if insecure:
        return
    mode = stat.S_IMODE(status.st_mode)
    if mode & _LOOSE:
        wanted = DIRECTORY_MODE if directory else FILE_MODE
        raise errors.UnsafePermissions(
            f"{path} can be reached by others (mode {mode:04o}); run: chmod {wanted:04o} {path}",
            path=str(path),
            mode=mode,
        )
    if status.st_uid not in {os.geteuid(), 0}:
        raise errors.UnsafePermissions(
            f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this process",
            path=str(path),
            owner=status.st_uid,
        )


# --- beneath a directory ---------------------------------------------------------------------------------------------


class Directory:
    """A descriptor of a directory; everything is opened relative to it and never through a symbolic link.

    ``path`` is kept for messages and for LMDB, which opens by path. Use as a context manager or call `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise errors.NotFound(f"{path} does not exist", path=str(path)) from error
        except OSError as error:
            raise from_os_error(error, f"cannot open the directory {path}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """Return the descriptor, which stays the property of this object."""
        return self._fd

    def open(self, name: str, flags: int, mode: int = FILE_MODE) -> int:
        """Open the entry ``name`` and return a descriptor that the caller closes.

        Raises `NotFound`, `InvalidValue` (a symbolic link or an impossible name) or what `from_os_error` says.
        """
        check_component(name)
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self._fd)
        except FileNotFoundError as error:
            raise errors.NotFound(f"{self.path / name} does not exist", path=str(self.path / name)) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise errors.InvalidValue(
                    f"{self.path / name} is a symbolic link", path=str(self.path / name)
                ) from error
            raise from_os_error(error, f"cannot open {self.path / name}") from error

    def exists(self, name: str) -> bool:
        """Return whether an entry (of any kind) has this name."""
        check_component(name)
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, f"cannot look at {self.path / name}") from error
        return True

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        try:
            return sorted(os.listdir(self._fd))
        except OSError as error:
            raise from_os_error(error, f"cannot list {self.path}") from error

    def is_directory(self, name: str) -> bool:
        """Return whether ``name`` is a directory and not a symbolic link to one."""
        check_component(name)
        try:
            status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, f"cannot look at {self.path / name}") from error
        return stat.S_ISDIR(status.st_mode)

    def read(self, name: str, *, bytes_max: int, insecure: bool = False) -> bytes:
        """Return the content of a private plain file of at most ``bytes_max`` bytes.

        Raises `NotFound`, `InvalidValue` (no plain file), `UnsafePermissions`, or `CorruptionError` when it is longer.
        """
        fd = self.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            check_private(self.path / name, directory=False, insecure=insecure)
            content = b""
            while len(content) <= bytes_max:
                part = os.read(fd, bytes_max + 1 - len(content))
                if not part:
                    return content
                content += part
        except OSError as error:
            raise from_os_error(error, f"cannot read {self.path / name}") from error
        finally:
            os.close(fd)
        raise errors.CorruptionError(
            f"{self.path / name} is longer than {bytes_max} bytes", file=str(self.path / name), bytes_max=bytes_max
        )

    def write_durably(self, name: str, content: bytes) -> None:
        """Replace the file ``name`` by ``content``: wholly and durably when this returns, else not at all.

        Raises `DiskFull` and what else `from_os_error` says; the old file then stands.
        """
        check_component(name)
        temporary = f"{TEMPORARY_PREFIX}{name[:200]}-{secrets.token_hex(8)}"
        renamed = False
        try:
            fd = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                FILE_MODE,
                dir_fd=self._fd,
            )
            try:
                os.fchmod(fd, FILE_MODE)
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            renamed = True
            os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, f"cannot write {self.path / name}") from error
        finally:
            if not renamed:
                self._forget(temporary)

    def _forget(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except OSError:
            return

    def remove(self, name: str) -> bool:
        """Remove the file ``name`` durably; return False when it was not there."""
        check_component(name)
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, f"cannot remove {self.path / name}") from error
        self.sync()
        return True

    def remove_tree(self, name: str) -> bool:
        """Remove the directory ``name`` with all below it, following no link; return False when it was not there.

        May be repeated after a crash in the middle.
        """
        check_component(name)
        try:
            _remove_tree(self._fd, name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, f"cannot remove {self.path / name}") from error
        self.sync()
        return True

    def sync(self) -> None:
        """Make renames, new names and removals in this directory durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, f"cannot sync {self.path}") from error


def move(source: Directory, name: str, target: Directory, new_name: str) -> None:
    """Rename an entry from one directory to another, durably in both when this returns; never over a directory."""
    check_component(name)
    check_component(new_name)
    try:
        if target.exists(new_name):
            raise errors.Conflict(f"{target.path / new_name} is already there", path=str(target.path / new_name))
        os.rename(name, new_name, src_dir_fd=source.fileno(), dst_dir_fd=target.fileno())
    except OSError as error:
        raise from_os_error(error, f"cannot rename {source.path / name} to {target.path / new_name}") from error
    # The new name first: after a power loss between the two both names may show, which is repeated; none may not.
    target.sync()
    source.sync()


def _remove_tree(parent_fd: int, name: str) -> None:
    status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent_fd)
        return
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        for entry in os.listdir(fd):
            _remove_tree(fd, entry)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent_fd)


def sync_directory(path: Path) -> None:
    """Make new and removed names in ``path`` durable."""
    with Directory(path) as directory:
        directory.sync()


def sync_file(path: Path) -> None:
    """Make the content of a closed file durable."""
    with Directory(path.parent) as directory:
        fd = directory.open(path.name, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            raise from_os_error(error, f"cannot sync {path}") from error
        finally:
            os.close(fd)


# --- the owner of a directory ----------------------------------------------------------------------------------------


class DirectoryLock:
    """The right of one process to a data directory, held until `release` or the end of the process.

    Two kernel locks are held: on the directory itself, which decides, and on the file ``LOCK`` in it, whose content
    names the owner for messages. Both die with the process, however it dies; a left-over file means nothing.

    With ``named`` False only the directory is locked and nothing is written: for readers.

    A forked child inherits the descriptors; `release_after_fork` closes the child's copies, so that a child that
    outlives its parent does not hold the directory.
    """

    def __init__(self, path: Path, *, named: bool = True) -> None:
        self._directory_fd = -1
        self._file_fd = -1
        with Directory(path) as directory:
            try:
                self._directory_fd = os.dup(directory.fileno())
            except OSError as error:
                raise from_os_error(error, f"cannot lock {path}") from error
            try:
                self._acquire(directory, named=named)
            except BaseException:
                self.release()
                raise

    def _acquire(self, directory: Directory, *, named: bool) -> None:
        if not _try_flock(self._directory_fd):
            raise _already_open(directory)
        if not named:
            return
        self._file_fd = directory.open(LOCK_NAME, os.O_RDWR | os.O_CREAT)
        if not _try_flock(self._file_fd):
            raise _already_open(directory)
        owner = json.dumps({"pid": os.getpid()}).encode() + b"\n"
        try:
            os.ftruncate(self._file_fd, 0)
            os.pwrite(self._file_fd, owner, 0)
        except OSError as error:
            # Only messages need the content; a full disk must not keep a store from opening for reading.
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise from_os_error(error, f"cannot write {directory.path / LOCK_NAME}") from error

    @property
    def held(self) -> bool:
        """Whether this object still holds the directory."""
        return self._directory_fd >= 0

    def release(self) -> None:
        """Give the directory up; a second call does nothing."""
        for fd in (self._file_fd, self._directory_fd):
            if fd >= 0:
                os.close(fd)
        self._file_fd = self._directory_fd = -1

    def release_after_fork(self) -> None:
        """Close the copies that a forked child got; the parent keeps the lock."""
        self.release()


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise from_os_error(error, "cannot lock the data directory") from error
    return True


def _already_open(directory: Directory) -> errors.AlreadyOpen:
    pid = read_owner(directory)
    whose = f"process {pid}" if pid is not None else "another process"
    if pid == os.getpid():
        whose = "this process"
    return errors.AlreadyOpen(f"{directory.path} is in use by {whose}", path=str(directory.path), pid=pid)


def read_owner(directory: Directory) -> int | None:
    """Return the process id that ``LOCK`` names, or None. It says who held the lock last, not whether it is held."""
    try:
        fd = directory.open(LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK)
    except errors.Error:
        return None
    try:
        content = os.read(fd, _LOCK_BYTES_MAX)
        found = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(fd)
    pid = found.get("pid") if isinstance(found, dict) else None
    return pid if isinstance(pid, int) else None


# --- the disk below --------------------------------------------------------------------------------------------------


def file_system_magic(path: Path) -> int | None:
    """Return the number by which the kernel names the file system of ``path`` (Linux), else None."""
    if not sys.platform.startswith("linux"):
        return None
    # struct statfs is about 120 bytes on every 64-bit Linux and begins with the magic number as a long.
    buffer = ctypes.create_string_buffer(512)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise from_os_error(OSError(code, os.strerror(code)), f"cannot ask for the file system of {path}")
    return int.from_bytes(buffer.raw[:8], sys.byteorder) & 0xFFFFFFFF


def check_local_file_system(path: Path, *, allow_remote_fs: bool = False) -> None:
    """Raise `UnsupportedFileSystem` if ``path`` is on a file system that LMDB must not be used on.

    LMDB needs one kernel's memory map and locks: on NFS, SMB, FUSE, 9p, virtiofs and their like it loses data even
    between processes of one machine.
    """
    if allow_remote_fs:
        return
    magic = file_system_magic(path)
    kind = REMOTE_FILE_SYSTEMS.get(magic) if magic is not None else None
    if kind is not None:
        raise errors.UnsupportedFileSystem(
            f"{path} is on a remote file system ({kind}), where stored data can be lost; use a local disk, or say "
            "allow_remote_fs if you know better",
            path=str(path),
            file_system=kind,
        )


def from_os_error(error: OSError, doing: str) -> errors.Error:
    """Return our error for a refused system call; ``doing`` begins the sentence."""
    text = f"{doing}: {error.strerror or error}"
    facts = {"errno": error.errno}
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return errors.DiskFull(text, **facts)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return errors.Denied(text, **facts)
    if error.errno == errno.ENOENT:
        return errors.NotFound(text, **facts)
    if error.errno in {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}:
        return errors.InvalidValue(text, **facts)
    return errors.Error(text, **facts)


def walk_files(path: Path) -> Iterator[Path]:
    """Yield every plain file below ``path``, sorted, following no link."""
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            yield from walk_files(entry)
        elif entry.is_file():
            yield entry
