"""A store: names, ids, copies and their switch, one owner, and a crash between any two steps."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from srengine import errors, failpoints, storage
from srengine.storage import catalog, pages
from tests.crash import children

ID = "0123456789abcdef" * 2
SEED = b"seed-seq"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data"


def fill_copy(stage, source):
    """Fill a stage with the rows of ``source`` as the snapshot room does."""
    with source.view() as view:
        rows = view.rows_by_key(None, bytes_max=1 << 20)
        assert rows.done
        stage.fill(rows.rows, b"filling")
        return stage.finish_fill(view.meta_rows(0), view.state)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_lead_to_the_same_tablets_again(path):
    """T01: a tablet is made when first named and found by its name after a reopen; asking twice gives the same one."""
    with storage.open_store(path) as store:
        users = store.tablet("users")
        users.put(b"k", b"v")
        assert store.tablet("users") is users
        store.tablet("orders").put(b"k", b"w")
        assert store.names() == ["orders", "users"]
        tablet_id = users.id
    with storage.open_store(path) as store:
        assert store.tablet("users").get(b"k") == b"v"
        assert store.tablet("users").id == tablet_id
        assert store.open_tablet(tablet_id).name == "users"
        assert sorted(store.tablet_ids()) == sorted([tablet_id, store.tablet("orders").id])


def test_a_tablet_that_is_not_there(path):
    """T14: without create a missing name or id is `NotFound`, and nothing is made."""
    with storage.open_store(path) as store:
        with pytest.raises(errors.NotFound):
            store.tablet("missing", create=False)
        with pytest.raises(errors.NotFound):
            store.open_tablet(ID)
        with pytest.raises(errors.NotFound):
            store.drop("missing")
        with pytest.raises(errors.NotFound):
            store.drop_tablet(ID)
        assert store.tablet_ids() == []
    with pytest.raises(errors.NotFound):
        storage.open_store(path.parent / "other", create=False)
    assert not (path.parent / "other").exists()


def test_a_dropped_tablet_is_gone(path):
    """T02: drop removes the name and every file; the name can be used again."""
    with storage.open_store(path) as store:
        old = store.tablet("users")
        old.put(b"k", b"v")
        store.drop("users")
        assert old.closed
        assert store.tablet_ids() == store.names() == []
        assert store.tablet("users").get(b"k") is None


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "a\\b", "", "x" * 129, "a\0b", "é", ".hidden", "-x", "a\n"])
def test_names_are_names(path, name):
    """F40: no other name reaches the file system."""
    with storage.open_store(path) as store:
        for action in (lambda: store.tablet(name), lambda: store.drop(name)):
            with pytest.raises(errors.InvalidValue):
                action()
        assert not (path / catalog.CATALOG_NAME).exists()


@pytest.mark.parametrize("tablet_id", ["../" + "a" * 29, "A" * 32, "a" * 31, "a" * 33, "", "g" * 32, "users"])
def test_ids_are_ids(path, tablet_id):
    """F40: an id is 32 lower-case hexadecimal digits, or nothing is touched."""
    with storage.open_store(path) as store:
        for action in (
            lambda: store.open_tablet(tablet_id),
            lambda: store.create_tablet(tablet_id),
            lambda: store.drop_tablet(tablet_id),
            lambda: store.stage_tablet(tablet_id, seed=SEED),
            lambda: store.drop_stage(tablet_id),
            lambda: store.recover_tablet(tablet_id),
        ):
            with pytest.raises(errors.InvalidValue):
                action()


# --- ids and copies --------------------------------------------------------------------------------------------------


def test_a_node_gives_ids_lineage_and_seed(path):
    """T14: a tablet made by id has the lineage and seed that were given, and cannot be made twice."""
    with storage.Store(path) as store:
        made = store.create_tablet(ID, lineage="f" * 32, seed=SEED)
        assert (made.id, made.name, made.lineage, made.seed) == (ID, ID, "f" * 32, SEED)
        with pytest.raises(errors.Conflict):
            store.create_tablet(ID)
        assert store.names() == []
    with storage.Store(path) as store:
        assert store.open_tablet(ID).lineage == "f" * 32


def test_a_proved_copy_takes_over(path):
    """T10: a stage is filled beside the tablet, which serves until the switch; then the copy is the tablet, also after
    a reopen.
    """
    with storage.Store(path) as store:
        source = store.create_tablet("5" * 32, seed=SEED)
        source.put_many([(b"%03d" % i, b"new") for i in range(100)])
        old = store.create_tablet(ID)
        old.put(b"old", b"value")
        stage = store.stage_tablet(ID, seed=SEED)
        assert store.stage_tablet(ID, seed=SEED) is stage
        fill_copy(stage, source)
        assert old.get(b"old") == b"value"
        new = store.switch_tablet(stage)
        assert old.closed
        assert stage.closed
        assert new.root == source.root
        assert store.open_tablet(ID) is new
        assert not any((path / "tmp").iterdir())
    with storage.Store(path) as store:
        assert store.open_tablet(ID).get(b"007") == b"new"
        assert store.open_tablet(ID).get(b"old") is None


def test_a_copy_that_is_not_whole_does_not_take_over(path):
    """P3: a stage with a fill mark, or something that is no stage, is refused, and the tablet stays."""
    with storage.Store(path) as store:
        tablet = store.create_tablet(ID, seed=SEED)
        tablet.put(b"k", b"v")
        stage = store.stage_tablet(ID, seed=SEED)
        with tablet.view() as view:
            stage.fill(view.rows_by_key(None, bytes_max=1 << 20).rows, b"half way")
        with pytest.raises(errors.Conflict):
            store.switch_tablet(stage)
        with pytest.raises(errors.Conflict):
            store.switch_tablet(tablet)
        assert tablet.get(b"k") == b"v"


def test_a_stage_is_resumed_after_a_restart(path):
    """T10: what was filled into a stage is there after a restart, with its mark; another seed begins it again."""
    with storage.Store(path) as store:
        source = store.create_tablet("5" * 32, seed=SEED)
        source.put(b"k", b"v")
        stage = store.stage_tablet(ID, seed=SEED)
        with source.view() as view:
            stage.fill(view.rows_by_key(None, bytes_max=1 << 20).rows, b"half way")
    with storage.Store(path) as store:
        stage = store.stage_tablet(ID, seed=SEED)
        assert stage.fill_mark == b"half way"
        again = store.stage_tablet(ID, seed=b"another!")
        assert again.fill_mark is None
        assert stage.closed
        store.drop_stage(ID)
        store.drop_stage(ID)
        assert not any((path / "tmp").iterdir())


def test_a_damaged_stage_is_begun_again(path):
    """F11: a stage is a copy in the making: damaged, it is thrown away."""
    with storage.Store(path) as store:
        store.stage_tablet(ID, seed=SEED)
    (path / "tmp" / f"stage-{ID}" / "data.mdb").write_bytes(b"")
    with storage.Store(path) as store:
        assert store.stage_tablet(ID, seed=SEED).fill_mark is None


# --- crashes between steps -------------------------------------------------------------------------------------------

CREATE = """
store = storage.Store(sys.argv[1])
tablet = store.tablet("users")
tablet.put(b"k", b"v")
tell("done")
"""
CREATE_POINTS = ["store.create.named", "store.create.built", "store.create.moved", "store.create.ready"]
DROP_POINTS = ["store.drop.marked", "store.drop.moved", "store.drop.removed"]
SWITCH_POINTS = ["store.switch.intended", "store.switch.old-moved", "store.switch.stage-moved", "store.switch.done"]


@pytest.mark.parametrize("point", CREATE_POINTS)
def test_a_kill_while_a_tablet_is_made(path, point):
    """T02, F01: killed between any two steps of making a tablet, the next open has it whole or not at all."""
    ended = children.run(CREATE, path, failpoints=f"{point}=kill")
    assert ended.code == -signal.SIGKILL
    with storage.Store(path) as store:
        assert store.names() in ([], ["users"])
        assert len(store.tablet_ids()) == len(store.names())
        assert not any((path / "tmp").iterdir())
        tablet = store.tablet("users")
        assert tablet.get(b"k") is None
        tablet.put(b"k", b"v")
    assert storage.verify_directory(path).clean


@pytest.mark.parametrize("point", DROP_POINTS)
def test_a_kill_while_a_tablet_is_dropped(path, point):
    """T02, F02: killed between any two steps of a drop, the next open finishes it."""
    with storage.Store(path) as store:
        store.tablet("users").put(b"k", b"v")
        store.tablet("kept").put(b"k", b"v")
    ended = children.run("storage.Store(sys.argv[1]).drop('users')", path, failpoints=f"{point}=kill")
    assert ended.code == -signal.SIGKILL
    with storage.Store(path) as store:
        assert store.names() == ["kept"]
        assert len(store.tablet_ids()) == 1
        assert not any((path / "tmp").iterdir())
        assert store.tablet("kept").get(b"k") == b"v"
    assert storage.verify_directory(path).clean


@pytest.mark.parametrize("had_old", [True, False])
@pytest.mark.parametrize("point", SWITCH_POINTS)
def test_a_kill_while_a_copy_takes_over(path, point, had_old):
    """T02, F02, P3: killed between any two steps of a switch, the next open has the proved copy: it was proved before
    the first step, so the switch goes on. Never neither, never both.
    """
    with storage.Store(path) as store:
        source = store.create_tablet("5" * 32, seed=SEED)
        source.put(b"new", b"value")
        if had_old:
            store.create_tablet(ID).put(b"old", b"value")
        fill_copy(store.stage_tablet(ID, seed=SEED), source)
    source = f"s = storage.Store(sys.argv[1]); s.switch_tablet(s.stage_tablet({ID!r}, seed={SEED!r}))"
    ended = children.run(source, path, failpoints=f"{point}=kill")
    if point == "store.switch.old-moved" and not had_old:
        assert ended.code == 0
    else:
        assert ended.code == -signal.SIGKILL, ended.errors
    # And once more: the open that finishes is killed, too.
    with failpoints.armed("store.switch.stage-moved=error"):
        try:
            storage.Store(path).close()
        except OSError:
            pass
    with storage.Store(path) as store:
        tablet = store.open_tablet(ID)
        assert (tablet.get(b"new"), tablet.get(b"old")) == (b"value", None)
        assert not any((path / "tmp").iterdir())
    assert storage.verify_directory(path).clean


@pytest.mark.parametrize("point", CREATE_POINTS)
def test_a_full_disk_while_a_tablet_is_made(path, point):
    """F07: an error between any two steps of making a tablet leaves a store in which it can be made again."""
    with storage.Store(path) as store, failpoints.armed(f"{point}=full"), pytest.raises(OSError, match="failpoint"):
        store.tablet("users")
    with storage.Store(path) as store:
        store.tablet("users").put(b"k", b"v")
        assert store.names() == ["users"]
        assert len(store.tablet_ids()) == 1


# --- one owner -------------------------------------------------------------------------------------------------------


def test_a_second_opener_is_refused(path):
    """T14, F09: the directory belongs to one process and one store; the refusal names the owner, the file is unharmed,
    and deleting LOCK does not let a second one in.
    """
    with storage.open_store(path) as store:
        store.tablet("users").put(b"k", b"v")
        with pytest.raises(errors.AlreadyOpen, match="this process"):
            storage.open_store(path)
        ended = children.run("tell(code_of(lambda: storage.open_store(sys.argv[1])))", path)
        assert ended.told == "ALREADY_OPEN"
        (path / "LOCK").unlink()
        ended = children.run("tell(code_of(lambda: storage.open_store(sys.argv[1])))", path)
        assert ended.told == "ALREADY_OPEN"
        with pytest.raises(errors.AlreadyOpen):
            storage.verify_directory(path)
        assert store.tablet("users").get(b"k") == b"v"
    storage.open_store(path).close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_unharmed(path):
    """T14, F18: after a fork the child gets `ForkedEnvironment` from store, tablet and view and can open other stores;
    the parent goes on; the directory is free when the parent closes though the child lives.
    """
    store = storage.open_store(path)
    tablet = store.tablet("users")
    tablet.put(b"k", b"v")
    view = tablet.view()
    told_r, told_w = os.pipe()
    stay_r, stay_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stay_w)
        told = []
        for action in (
            lambda: store.tablet("users"),
            lambda: store.tablet("other"),
            store.names,
            lambda: tablet.get(b"k"),
            lambda: tablet.put(b"k", b"child"),
            lambda: view.get(b"k"),
            tablet.view,
        ):
            try:
                action()
                told.append("no-error")
            except errors.Error as error:
                told.append(error.code)
        with storage.open_store(path.parent / "child") as own:
            own.tablet("mine").put(b"k", b"v")
        store.close()
        os.write(told_w, " ".join(told).encode())
        os.read(stay_r, 1)
        os._exit(0)
    told = os.read(told_r, 1000).decode()
    assert told == " ".join(["FORKED"] * 7)
    tablet.put(b"k2", b"parent")
    assert tablet.get(b"k") == view.get(b"k") == b"v"
    view.close()
    store.close()
    with storage.open_store(path) as again:
        assert again.tablet("users").get(b"k2") == b"parent"
    os.close(stay_w)
    assert os.waitpid(child, 0)[1] == 0


def test_a_closed_store_refuses(path):
    """T14: after close every call is `Closed`, tablets and views included; closing twice is nothing."""
    store = storage.open_store(path)
    tablet = store.tablet("users")
    view = tablet.view()
    store.close()
    store.close()
    for action in (
        lambda: store.tablet("users"),
        store.names,
        store.tablet_ids,
        lambda: tablet.get(b"k"),
        lambda: tablet.put(b"k", b"v"),
    ):
        with pytest.raises(errors.Closed):
            action()
    with pytest.raises(errors.Error):
        view.get(b"k")


def test_a_nodes_directory_is_read_only(path):
    """T14, F12: `srengine.open` on a node's directory (identity.json) reads and refuses every change; nothing in the
    directory changes.
    """
    with storage.Store(path) as store:
        store.create_tablet(ID).put(b"k", b"v")
    (path / "identity.json").write_text("{}")
    before = {entry: entry.stat().st_mtime_ns for entry in path.rglob("*") if entry.name != "lock.mdb"}
    with storage.open_store(path) as store:
        assert store.read_only
        tablet = store.open_tablet(ID)
        assert tablet.get(b"k") == b"v"
        for action in (
            lambda: tablet.put(b"k", b"w"),
            lambda: tablet.delete(b"k"),
            lambda: tablet.put_many([(b"k", b"w")]),
            lambda: tablet.apply([]),
            lambda: store.drop_tablet(ID),
            lambda: store.create_tablet("5" * 32),
            lambda: store.stage_tablet(ID, seed=SEED),
        ):
            with pytest.raises(errors.Denied):
                action()
        with pytest.raises(errors.NotFound):
            store.tablet("users")
    after = {entry: entry.stat().st_mtime_ns for entry in path.rglob("*") if entry.name != "lock.mdb"}
    assert after == before


# --- damaged and foreign files ---------------------------------------------------------------------------------------


def damaged_store(path, damage):
    """Make a store with two tablets and damage the file of the first; return their ids."""
    with storage.Store(path) as store:
        ids = []
        for name in ("damaged", "sound"):
            tablet = store.tablet(name)
            tablet.put_many([(b"%05d" % i, bytes(100)) for i in range(2000)])
            ids.append(tablet.id)
    data = path / "tablets" / ids[0] / "data.mdb"
    damage(data)
    return ids


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data.write_bytes(b""), errors.TruncatedTablet),
        (lambda data: os.truncate(data, data.stat().st_size // 2), errors.TruncatedTablet),
        (lambda data: os.truncate(data, 5000), errors.TruncatedTablet),
        (lambda data: data.write_bytes(b"something else" * 1000), errors.ForeignData),
        (lambda data: data.unlink(), errors.CorruptionError),
        (lambda data: data.write_bytes(b"\0" * 16 + bytes(4) + data.read_bytes()[20:]), errors.ForeignData),
        (lambda data: data.chmod(0o644), errors.UnsafePermissions),
    ],
)
def test_a_damaged_tablet_is_refused_and_others_open(path, damage, error):
    """T14, F11, F52: a truncated, empty, foreign, missing or loose file is a typed error, never SIGBUS; it stays as it
    was, and the other tablets of the store open.
    """
    ids = damaged_store(path, damage)
    data = path / "tablets" / ids[0] / "data.mdb"
    before = data.read_bytes() if data.exists() else None
    with storage.Store(path) as store:
        with pytest.raises(error):
            store.tablet("damaged")
        with pytest.raises(error):
            store.open_tablet(ids[0])
        assert store.tablet("sound").get(b"00001") == bytes(100)
        assert store.names() == ["damaged", "sound"]
        assert store.tablet_ids() == sorted(ids)
    assert (data.read_bytes() if data.exists() else None) == before


def test_another_tablets_file_is_foreign(path):
    """F12, T14: a tablet's directory copied over another, or from another store, is `ForeignData`."""
    with storage.Store(path) as store:
        one, other = store.tablet("one").id, store.tablet("other").id
    shutil.rmtree(path / "tablets" / other)
    shutil.copytree(path / "tablets" / one, path / "tablets" / other)
    with storage.Store(path) as store, pytest.raises(errors.ForeignData):
        store.tablet("other")


def test_a_ready_name_without_files_is_not_made_again(path):
    """T14: a tablet whose directory was lost is `NotFound`, never silently an empty one."""
    with storage.Store(path) as store:
        store.tablet("users").put(b"k", b"v")
        tablet_id = store.tablet("users").id
    shutil.rmtree(path / "tablets" / tablet_id)
    with storage.Store(path) as store, pytest.raises(errors.NotFound):
        store.tablet("users")


def test_a_damaged_catalog_stops_names_and_not_ids(path):
    """T14: with store.json damaged names are `CorruptionError`; the tablets themselves open by id."""
    with storage.Store(path) as store:
        store.tablet("users").put(b"k", b"v")
        tablet_id = store.tablet("users").id
    raw = bytearray((path / "store.json").read_bytes())
    raw[raw.index(b"users")] ^= 1
    (path / "store.json").write_bytes(raw)
    with storage.Store(path) as store:
        with pytest.raises(errors.CorruptionError):
            store.tablet("users")
        with pytest.raises(errors.CorruptionError):
            store.tablet("new")
        assert store.open_tablet(tablet_id).get(b"k") == b"v"


def test_a_link_in_the_place_of_a_tablet_is_refused(path, tmp_path):
    """F40: a tablet's directory that is a symbolic link is not followed."""
    with storage.Store(path) as store:
        store.create_tablet(ID)
    (path / "tablets" / ID).rename(tmp_path / "elsewhere")
    (path / "tablets" / ID).symlink_to(tmp_path / "elsewhere")
    with storage.Store(path) as store, pytest.raises(errors.NotFound):
        store.open_tablet(ID)


def test_loose_directories_are_refused(path):
    """F52: a store whose directory, or a tablet whose directory others can reach, is refused; `insecure` allows it."""
    with storage.Store(path) as store:
        store.create_tablet(ID)
    (path / "tablets" / ID).chmod(0o755)
    with storage.Store(path) as store, pytest.raises(errors.UnsafePermissions):
        store.open_tablet(ID)
    path.chmod(0o777)
    with pytest.raises(errors.UnsafePermissions):
        storage.Store(path)
    with storage.Store(path, insecure=True) as store:
        store.open_tablet(ID)


def test_a_remote_file_system_is_refused(path, monkeypatch):
    """T14: a store on NFS is refused before anything is made there."""
    path.mkdir(mode=0o700)
    monkeypatch.setattr("srengine.storage.files.file_system_magic", lambda path: 0x6969)
    with pytest.raises(errors.UnsupportedFileSystem, match="nfs"):
        storage.Store(path)
    assert not any(path.iterdir())
    storage.Store(path, allow_remote_fs=True).close()


@pytest.mark.parametrize("options", [{"map_bytes": 0}, {"map_bytes": -1}, {"view_age_s_max": 0}])
def test_options_out_of_range(path, options):
    """T04: an impossible option is refused before anything is made."""
    with pytest.raises(errors.InvalidValue):
        storage.Store(path, **options)
    assert not path.exists()


def test_a_file_in_the_place_of_the_directory(path):
    """T14: a path that is a file, or whose parent is missing, is one clear error."""
    path.write_text("I am a file")
    with pytest.raises(errors.InvalidValue, match="not a directory"):
        storage.Store(path)
    with pytest.raises(errors.NotFound):
        storage.Store(path.parent / "no" / "parent")


def test_a_short_healthy_file_opens(path):
    """T14: a tablet whose file lacks only freed pages at its end opens, and is whole."""
    with storage.Store(path, map_bytes=1 << 24) as store:
        tablet = store.tablet("users")
        tablet.put(b"keep", b"me")
        tablet.put(b"large", bytes(2_000_000))
        tablet.delete(b"large")
        for n in range(20):
            tablet.put(b"keep", b"%d" % n)
        data = tablet.path / "data.mdb"
        tablet_id = tablet.id
    with pages.PageFile(data) as file:
        meta = file.newest()
        walker = pages._Walker(file, meta, pages.PageReport())
        walker.check(meta.main)
        walker.check(meta.free)
        used = max(page for page in range(meta.last_page + 1) if walker.taken(page))
    assert used < meta.last_page
    os.truncate(data, (used + 1) * meta.page_bytes)
    assert storage.verify_directory(path).clean
    assert data.stat().st_size == (used + 1) * meta.page_bytes
    with storage.Store(path) as store:
        tablet = store.open_tablet(tablet_id)
        assert tablet.get(b"keep") == b"19"
        tablet.put(b"large", bytes(2_000_000))
        assert not tablet.verify().damages
