"""A store: one directory of tablets that belongs to one process.

::

    data/                       0700, locked by its owner for as long as it is open
      LOCK                      names the owner for messages
      store.json                embedded use: name -> tablet id (catalog.py); a node has identity.json, meta/ instead
      tablets/<32 hex>/         one LMDB environment each, 0700: data.mdb, lock.mdb, after a fault FENCED
      tmp/
        new-<id>/               a tablet in the making                               } swept when
        drop-<id>/, old-<id>/   a tablet on its way out                              } the store opens
        stage-<id>/             a copy being filled; kept, so that filling it resumes
        switch-<id>             "the stage is proved and takes over": finished when the store opens

Tablets are opened one by one when asked for, so a damaged one does not keep the others from opening, and nothing is
given to LMDB before `pages.check_before_open` has seen it.

Every change of the directory is a row of durable steps, each of which may be repeated, with a failpoint after each.
A crash between any two leaves a directory that the next open finishes (switch, drop) or undoes (create):

* create:  build in tmp/new-ID -> rename to tablets/ID
* switch:  write tmp/switch-ID -> tablets/ID to tmp/old-ID -> tmp/stage-ID to tablets/ID -> remove switch-ID, old-ID
* drop:    rename tablets/ID to tmp/drop-ID -> remove

A read-only store (`open_store` on a node's directory) takes the lock, too, but makes, changes and finishes nothing.

A store is thread-safe. It belongs to the process that opened it: a forked child gets `ForkedEnvironment` from every
call and holds no lock, so the parent is unharmed and its directory is free when the parent ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from srengine import errors, failpoints, types
from srengine.storage import catalog, fences, files, pages

if TYPE_CHECKING:
    from types import TracebackType

    from srengine.storage.tablet import Tablet

TABLETS_NAME: Final = "tablets"
TEMPORARY_NAME: Final = "tmp"
IDENTITY_NAME: Final = "identity.json"
VIEW_AGE_S_MAX: Final = 30.0
STAGE_PREFIX: Final = "stage-"
SWITCH_PREFIX: Final = "switch-"

_logger = logging.getLogger(__name__)


def open_store(
    path: str | os.PathLike[str],
    *,
    create: bool = True,
    map_bytes: int | None = None,
    view_age_s_max: float = VIEW_AGE_S_MAX,
    allow_remote_fs: bool = False,
    insecure: bool = False,
    read_only: bool = False,
) -> Store:
    """Open a directory of tablets for this process, making it if ``create``; this is ``srengine.open``.

    A node's data directory (it has ``identity.json``) is opened read-only: what a node holds is changed by its group
    alone. ``map_bytes`` is the initial memory map of each tablet in bytes (default: chosen by size), ``view_age_s_max``
    how long a view may live in seconds.

    Raises `AlreadyOpen`, `NotFound`, `UnsafePermissions`, `UnsupportedFileSystem`, `InvalidValue` (no directory).
    """
    where = Path(path)
    of_a_node = (where / IDENTITY_NAME).exists()
    return Store(
        where,
        create=create and not of_a_node,
        map_bytes=map_bytes,
        view_age_s_max=view_age_s_max,
        allow_remote_fs=allow_remote_fs,
        insecure=insecure,
        read_only=read_only or of_a_node,
    )


class Store:
    """A directory of tablets (see the module). Use as a context manager or call `close`.

    ``path``: the directory. ``read_only``: whether tablets refuse writes. ``closed``: whether `close` was called.
    Tablets that it returned stay its own: they are closed with it, and asking twice gives the same open tablet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        map_bytes: int | None = None,
        view_age_s_max: float = VIEW_AGE_S_MAX,
        allow_remote_fs: bool = False,
        insecure: bool = False,
        read_only: bool = False,
    ) -> None:
        if map_bytes is not None and map_bytes <= 0:
            raise errors.InvalidValue(f"map_bytes is {map_bytes}, which is not positive")
        if view_age_s_max <= 0:
            raise errors.InvalidValue(f"view_age_s_max is {view_age_s_max}, which is not positive")
        self.path = Path(path)
        self.read_only = read_only
        self.closed = False
        self._map_bytes = map_bytes
        self._view_age_s_max = view_age_s_max
        self._insecure = insecure
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._open: dict[str, Tablet] = {}
        self._stages: dict[str, Tablet] = {}
        self._names: dict[str, catalog.Entry] | None = None
        self._lock: files.DirectoryLock | None = None

        if create and not read_only:
            files.make_private_directory(self.path, insecure=insecure)
        else:
            files.check_private(self.path, directory=True, insecure=insecure)
        files.check_local_file_system(self.path, allow_remote_fs=allow_remote_fs)
        self._lock = files.DirectoryLock(self.path, named=not read_only)
        try:
            if not read_only:
                files.make_private_directory(self._tablets, insecure=insecure)
                files.make_private_directory(self._temporary, insecure=insecure)
                self._finish_and_sweep()
        except BaseException:
            self._lock.release()
            raise
        _stores.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {str(self.path)!r}{' closed' if self.closed else ''}>"

    def close(self) -> None:
        """Close every tablet and give the directory up; a second call does nothing. Views of the tablets end."""
        with self._mutex:
            if self.closed:
                return
            self.closed = True
            if os.getpid() != self._pid:
                return
            try:
                for tablet in [*self._open.values(), *self._stages.values()]:
                    tablet.close()
            finally:
                self._open.clear()
                self._stages.clear()
                if self._lock is not None:
                    self._lock.release()

    @property
    def _tablets(self) -> Path:
        return self.path / TABLETS_NAME

    @property
    def _temporary(self) -> Path:
        return self.path / TEMPORARY_NAME

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise errors.ForkedEnvironment(
                f"{self.path} was opened by process {self._pid} and this is its child; open it again here",
                path=str(self.path),
            )
        if self.closed:
            raise errors.Closed(f"the store {self.path} is closed", path=str(self.path))

    def _check_writable(self) -> None:
        self._check_usable()
        if self.read_only:
            raise errors.Denied(f"{self.path} is open for reading only", path=str(self.path))

    # --- embedded use: names -----------------------------------------------------------------------------------------

    def tablet(self, name: str, *, create: bool = True) -> Tablet:
        """Return the tablet of this name, open; make it if there is none and ``create``.

        Raises `NotFound`, `InvalidValue` (name), `CorruptionError` (``store.json``) and what `open_tablet` raises.
        """
        types.check_name(name, "tablet")
        with self._mutex:
            self._check_usable()
            entry = self._catalog().get(name)
            if entry is not None and entry.state == "ready":
                return self._open_tablet(entry.tablet_id, name)
            if self.read_only or not create:
                raise errors.NotFound(f"the store {self.path} has no tablet {name}", tablet=name)
            return self._create_named(name)

    def names(self) -> list[str]:
        """Return the names of the tablets, sorted; those of a node have none here."""
        with self._mutex:
            self._check_usable()
            return sorted(name for name, entry in self._catalog().items() if entry.state == "ready")

    def drop(self, name: str) -> None:
        """Remove the tablet of this name with all its data, durably. Raises `NotFound`."""
        types.check_name(name, "tablet")
        with self._mutex:
            self._check_writable()
            entry = self._catalog().get(name)
            if entry is None or entry.state != "ready":
                raise errors.NotFound(f"the store {self.path} has no tablet {name}", tablet=name)
            self._name(name, catalog.Entry(entry.tablet_id, "dropping"))
            failpoints.hit("store.drop.marked")
            if entry.tablet_id in self.tablet_ids():
                self.drop_tablet(entry.tablet_id)
            self._name(name, None)

    def _catalog(self) -> dict[str, catalog.Entry]:
        if self._names is None:
            with files.Directory(self.path) as directory:
                self._names = catalog.read_catalog(directory, insecure=self._insecure)
        return self._names

    def _name(self, name: str, entry: catalog.Entry | None) -> None:
        """Change one entry durably; in memory only after that."""
        changed = dict(self._catalog())
        if entry is None:
            changed.pop(name, None)
        else:
            changed[name] = entry
        with files.Directory(self.path) as directory:
            catalog.write_catalog(directory, changed)
        self._names = changed

    def _create_named(self, name: str) -> Tablet:
        self._check_writable()
        tablet_id = secrets.token_hex(16)
        self._name(name, catalog.Entry(tablet_id, "creating"))
        failpoints.hit("store.create.named")
        self._create(tablet_id, name)
        self._name(name, catalog.Entry(tablet_id, "ready"))
        failpoints.hit("store.create.ready")
        return self._open_tablet(tablet_id, name)

    # --- node use: ids -----------------------------------------------------------------------------------------------

    def tablet_ids(self) -> list[str]:
        """Return the ids of all tablets in the directory, sorted, damaged and fenced ones included."""
        self._check_usable()
        if not self._tablets.exists():
            return []
        with files.Directory(self._tablets) as directory:
            return [name for name in directory.names() if catalog.is_tablet_id(name) and directory.is_directory(name)]

    def create_tablet(self, tablet_id: str, *, lineage: str | None = None, seed: bytes | None = None) -> Tablet:
        """Make an empty tablet with an id that the cluster's catalog gave it, durably, and return it open.

        ``lineage`` (32 hexadecimal digits) and ``seed`` (8 bytes) are minted unless given. Raises `Conflict` if it is
        there already, `InvalidValue`, `DiskFull`.
        """
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            self._create(tablet_id, tablet_id, lineage=lineage, seed=seed)
            return self._open_tablet(tablet_id, tablet_id)

    def open_tablet(self, tablet_id: str) -> Tablet:
        """Return the tablet with this id, open.

        Raises `NotFound`, `TruncatedTablet`, `TabletFenced`, `CorruptionError`, `ForeignData`; other tablets are not
        affected.
        """
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_usable()
            return self._open_tablet(tablet_id, self._name_of(tablet_id))

    def recover_tablet(self, tablet_id: str) -> Tablet:
        """Lift the fence of a tablet if the file, read past the page cache, proves whole; return it open.

        Raises as `fences.prove`; the fence then stays. Without a fence this is `open_tablet`.
        """
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            old = self._open.pop(tablet_id, None)
            if old is not None:
                old.close()
            path = self._tablet_path(tablet_id)
            if fences.read_fence(path) is not None:
                fences.prove(path, lambda: self._verify_closed(tablet_id, path))
            return self._open_tablet(tablet_id, self._name_of(tablet_id))

    def drop_tablet(self, tablet_id: str) -> None:
        """Close and remove a tablet with all its data, durably. Raises `NotFound`."""
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            self._tablet_path(tablet_id)
            old = self._open.pop(tablet_id, None)
            if old is not None:
                old.close()
            leaving = f"drop-{tablet_id}"
            with files.Directory(self._tablets) as tablets, files.Directory(self._temporary) as temporary:
                temporary.remove_tree(leaving)
                files.move(tablets, tablet_id, temporary, leaving)
                failpoints.hit("store.drop.moved")
                temporary.remove_tree(leaving)
            failpoints.hit("store.drop.removed")

    # --- copies ------------------------------------------------------------------------------------------------------

    def stage_tablet(self, tablet_id: str, *, seed: bytes) -> Tablet:
        """Return an empty tablet beside the real one for a full copy to be filled; one begun before is resumed.

        A stage that is damaged, fenced or of another seed is thrown away and begun again: it is only a copy in the
        making. The tablet of the same id stays open and unchanged until `switch_tablet`.
        """
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            stage = self._stages.get(tablet_id)
            if stage is not None and not stage.closed:
                if stage.seed == seed:
                    return stage
                stage.close()
            self._stages.pop(tablet_id, None)
            stage = self._resume_stage(tablet_id, seed)
            if stage is None:
                stage = self._begin_stage(tablet_id, seed)
            self._stages[tablet_id] = stage
            return stage

    def find_stage(self, tablet_id: str) -> Tablet | None:
        """Return the unfinished copy of a tablet, open, or None; its fill mark says where the copy goes on."""
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            stage = self._stages.get(tablet_id)
            if stage is None or stage.closed:
                self._stages.pop(tablet_id, None)
                stage = self._resume_stage(tablet_id, None)
                if stage is not None:
                    self._stages[tablet_id] = stage
            return stage

    def drop_stage(self, tablet_id: str) -> None:
        """Throw a stage away; nothing happens when there is none."""
        catalog.check_tablet_id(tablet_id)
        with self._mutex:
            self._check_writable()
            stage = self._stages.pop(tablet_id, None)
            if stage is not None:
                stage.close()
            with files.Directory(self._temporary) as temporary:
                temporary.remove_tree(f"{STAGE_PREFIX}{tablet_id}")

    def switch_tablet(self, staged: Tablet) -> Tablet:
        """Let a proved stage take the place of its tablet, durably, and return it open; ``staged`` is closed.

        What the tablet held before is gone afterwards, and a crash at any moment leaves either the old one whole or
        the new one. The caller has proved the copy (`Tablet.finish_fill`): a stage with a fill mark is `Conflict`.
        """
        tablet_id = staged.id
        with self._mutex:
            self._check_writable()
            if self._stages.get(tablet_id) is not staged:
                raise errors.Conflict(f"{staged!r} is no stage of the store {self.path}", tablet=tablet_id)
            if staged.fill_mark is not None:
                raise errors.Conflict(f"the copy of tablet {tablet_id} is not complete", tablet=tablet_id)
            self._stages.pop(tablet_id).close()
            old = self._open.pop(tablet_id, None)
            if old is not None:
                old.close()
            with files.Directory(self._temporary) as temporary:
                temporary.remove_tree(f"old-{tablet_id}")
                temporary.write_durably(f"{SWITCH_PREFIX}{tablet_id}", b"the stage takes over\n")
            failpoints.hit("store.switch.intended")
            self._finish_switch(tablet_id)
            return self._open_tablet(tablet_id, self._name_of(tablet_id))

    def _resume_stage(self, tablet_id: str, seed: bytes | None) -> Tablet | None:
        name = f"{STAGE_PREFIX}{tablet_id}"
        path = self._temporary / name
        if not path.exists():
            return None
        try:
            stage = self._open_directory(tablet_id, tablet_id, path)
            if seed is None or stage.seed == seed:
                return stage
            stage.close()
            why = "of another seed"
        except (errors.CorruptionError, errors.ForeignData, errors.TabletFenced, errors.NotFound) as error:
            why = str(error)
        _logger.warning("the unfinished copy of tablet %s is begun again: %s", tablet_id, why)
        with files.Directory(self._temporary) as temporary:
            temporary.remove_tree(name)
        return None

    def _begin_stage(self, tablet_id: str, seed: bytes) -> Tablet:
        name = f"{STAGE_PREFIX}{tablet_id}"
        self._build(tablet_id, lineage=None, seed=seed)
        with files.Directory(self._temporary) as temporary:
            files.move(temporary, f"new-{tablet_id}", temporary, name)
        failpoints.hit("store.stage.made")
        return self._open_directory(tablet_id, tablet_id, self._temporary / name)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _create(self, tablet_id: str, name: str, *, lineage: str | None = None, seed: bytes | None = None) -> None:
        if (self._tablets / tablet_id).exists():
            raise errors.Conflict(f"the store {self.path} already has tablet {name}", tablet=tablet_id)
        self._build(tablet_id, lineage=lineage, seed=seed)
        failpoints.hit("store.create.built")
        with files.Directory(self._temporary) as temporary, files.Directory(self._tablets) as tablets:
            files.move(temporary, f"new-{tablet_id}", tablets, tablet_id)
        failpoints.hit("store.create.moved")

    def _build(self, tablet_id: str, *, lineage: str | None, seed: bytes | None) -> None:
        """Make a whole, closed, durable tablet in ``tmp/new-<id>``, over what an interrupted attempt left."""
        name = f"new-{tablet_id}"
        path = self._temporary / name
        with files.Directory(self._temporary) as temporary:
            temporary.remove_tree(name)
            files.make_private_directory(path)
            try:
                self._create_in_kernel(tablet_id, path, lineage=lineage, seed=seed).close()
                for entry in files.walk_files(path):
                    files.sync_file(entry)
                files.sync_directory(path)
            except errors.Error:
                temporary.remove_tree(name)
                raise

    def _finish_switch(self, tablet_id: str) -> None:
        """Do what is left of a switch whose intent is durable; every step may have been done already."""
        stage, old = f"{STAGE_PREFIX}{tablet_id}", f"old-{tablet_id}"
        with files.Directory(self._tablets) as tablets, files.Directory(self._temporary) as temporary:
            if temporary.is_directory(stage):
                if tablets.is_directory(tablet_id):
                    files.move(tablets, tablet_id, temporary, old)
                    failpoints.hit("store.switch.old-moved")
                files.move(temporary, stage, tablets, tablet_id)
                failpoints.hit("store.switch.stage-moved")
            temporary.remove(f"{SWITCH_PREFIX}{tablet_id}")
            failpoints.hit("store.switch.done")
            temporary.remove_tree(old)

    def _finish_and_sweep(self) -> None:
        """Finish what a crash interrupted: switches go on, everything else half made or half removed goes."""
        with files.Directory(self._temporary) as temporary:
            for name in temporary.names():
                tablet_id = name.removeprefix(SWITCH_PREFIX)
                if tablet_id != name and catalog.is_tablet_id(tablet_id):
                    self._finish_switch(tablet_id)
            for name in temporary.names():
                if not name.startswith(STAGE_PREFIX):
                    temporary.remove_tree(name)
        with files.Directory(self.path) as directory:
            for name in directory.names():
                if name.startswith(files.TEMPORARY_PREFIX):
                    directory.remove_tree(name)
        try:
            entries = dict(self._catalog())
        except errors.Error as error:
            # Said again by whoever asks for a name; the tablets themselves can still be opened by id.
            _logger.warning("%s", error)
            return
        for name, entry in entries.items():
            if entry.state == "creating":
                made = (self._tablets / entry.tablet_id).is_dir()
                self._name(name, catalog.Entry(entry.tablet_id, "ready") if made else None)
            elif entry.state == "dropping":
                if (self._tablets / entry.tablet_id).is_dir():
                    self.drop_tablet(entry.tablet_id)
                self._name(name, None)

    # --- opening -----------------------------------------------------------------------------------------------------

    def _tablet_path(self, tablet_id: str) -> Path:
        path = self._tablets / tablet_id
        if not path.is_dir() or path.is_symlink():
            raise errors.NotFound(f"the store {self.path} has no tablet {tablet_id}", tablet=tablet_id)
        return path

    def _name_of(self, tablet_id: str) -> str:
        try:
            entries = self._catalog()
        except errors.Error:
            return tablet_id
        return next((name for name, entry in entries.items() if entry.tablet_id == tablet_id), tablet_id)

    def _open_tablet(self, tablet_id: str, name: str) -> Tablet:
        tablet = self._open.get(tablet_id)
        if tablet is None or tablet.closed:
            tablet = self._open[tablet_id] = self._open_directory(tablet_id, name, self._tablet_path(tablet_id))
        return tablet

    def _open_directory(self, tablet_id: str, name: str, path: Path) -> Tablet:
        files.check_private(path, directory=True, insecure=self._insecure)
        fences.refuse_if_fenced(path, tablet_id)
        data = path / pages.DATA_NAME
        pages.check_before_open(data, extend=not self.read_only)
        files.check_private(data, directory=False, insecure=self._insecure)
        return self._open_in_kernel(tablet_id, name, path)

    def _verify_closed(self, tablet_id: str, path: Path) -> None:
        tablet = self._open_in_kernel(tablet_id, tablet_id, path)
        try:
            report = tablet.verify()
        finally:
            tablet.close()
        if report.damages:
            raise errors.CorruptionError(
                f"tablet {tablet_id} is damaged: {report.damages[0].detail}",
                tablet=tablet_id,
                damages=len(report.damages),
            )

    def _create_in_kernel(self, tablet_id: str, path: Path, *, lineage: str | None, seed: bytes | None) -> Tablet:
        from srengine.storage.tablet import Tablet

        return Tablet.create(
            path,
            tablet_id,
            lineage=lineage,
            seed=seed,
            map_bytes=self._map_bytes,
            view_age_s_max=self._view_age_s_max,
        )

    def _open_in_kernel(self, tablet_id: str, name: str, path: Path) -> Tablet:
        from srengine.storage.tablet import Tablet

        return Tablet.open(
            path,
            tablet_id,
            name=name,
            map_bytes=self._map_bytes,
            view_age_s_max=self._view_age_s_max,
            read_only=self.read_only,
        )

    def _release_after_fork(self) -> None:
        if self._lock is not None:
            self._lock.release_after_fork()


# --- fork ------------------------------------------------------------------------------------------------------------

_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._release_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
