"""Options and identity: what a node accepts on its command line and in its directory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.node import NodeOptions, load_options_file, parse_initial
from srengine.node import identity as ids


def options(**given: object) -> NodeOptions:
    return NodeOptions(**{"name": "n1", "data": Path("d"), "listen": "tcp://127.0.0.1:7400", **given})


def test_ports_follow_the_client_port() -> None:
    """Peers use the next port and bulk the one after, unless said; port 0 stays 0."""
    checked = options().checked()
    assert (checked.peer_listen, checked.bulk_listen) == ("tcp://127.0.0.1:7401", "tcp://127.0.0.1:7402")
    assert options(listen="tcp://127.0.0.1:0").checked().bulk_listen == "tcp://127.0.0.1:0"
    assert options(peer_listen="tcp://127.0.0.1:9").checked().peer_listen == "tcp://127.0.0.1:9"


@pytest.mark.parametrize(
    "given_options",
    [
        {"name": "../x"},
        {"cluster": "a b"},
        {"listen": "127.0.0.1:7400"},
        {"listen": "tcp://127.0.0.1:99999"},
        {"listen": "tcp://127.0.0.1:65535"},
        {"initial": parse_initial("a=tcp://h:1,b=tcp://h:2")},
        {"initial": parse_initial("n1=tcp://h:1,n1=tcp://h:2")},
        {"initial": parse_initial("n1=tcp://h:1,n2=tcp://h:1")},
    ],
)
def test_options_that_cannot_be(given_options: dict[str, object]) -> None:
    """F40: bad names, addresses and member lists are refused in one sentence."""
    with pytest.raises(errors.InvalidValue):
        options(**given_options).checked()


@pytest.mark.parametrize("text", ["a", "a=", "a=tcp://h", "=tcp://h:1", "a=tcp://h:1#12", "a b=tcp://h:1"])
def test_initial_that_cannot_be(text: str) -> None:
    """A malformed member of --initial is named."""
    with pytest.raises(errors.InvalidValue):
        parse_initial(text)


@given(st.text(max_size=80))
def test_initial_takes_anything(text: str) -> None:
    """Any text is members or InvalidValue."""
    try:
        members = parse_initial(text)
    except errors.InvalidValue:
        return
    assert parse_initial(",".join(map(str, members))) == members


def test_options_file(tmp_path: Path) -> None:
    """An options file has the names of the fields; an unknown one suggests the nearest; a wrong type is named."""
    file = tmp_path / "node.toml"
    file.write_text('name = "n1"\ndata = "/d"\nlisten = "tcp://h:1"\ninitial = "n1=tcp://h:1"\nmap-bytes = 5\n')
    found = load_options_file(file)
    assert found["initial"] == parse_initial("n1=tcp://h:1")
    assert found["map_bytes"] == 5
    file.write_text("scrub-interval-s = 60\nscrub-bytes-s = 0\n")
    assert load_options_file(file) == {"scrub_interval_s": 60.0, "scrub_bytes_s": 0}
    file.write_text("scrub-bytes-s = 1.5\n")
    with pytest.raises(errors.InvalidValue):
        load_options_file(file)
    file.write_text("busy_poll_s = 0\n")
    assert load_options_file(file) == {"busy_poll_s": 0.0}
    for wrong in ({"scrub_bytes_s": -1}, {"scrub_interval_s": 0.0}, {"busy_poll_s": -0.1}, {"busy_poll_s": 0.02}):
        with pytest.raises(errors.InvalidValue):
            NodeOptions("n1", tmp_path, "tcp://127.0.0.1:0", **wrong).checked()
    file.write_text('lissten = "x"')
    with pytest.raises(errors.UsageError, match="did you mean listen"):
        load_options_file(file)
    for text in ("name = 5", "insecure = 1", "= x", "\x00"):
        file.write_text(text)
        with pytest.raises(errors.InvalidValue):
            load_options_file(file)
    with pytest.raises(errors.NotFound):
        load_options_file(tmp_path / "none.toml")


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    return directory


def test_an_identity_knows_its_own_file(data: Path) -> None:
    """F14: the file that was written is itself; copied, or put back by a copy, it is not."""
    ids.save_identity(data, ids.new_identity("n1", "prod"))
    loaded = ids.load_identity(data)
    assert loaded is not None
    assert not loaded.copied
    shutil.copytree(data, data.with_name("copy"))
    copy = ids.load_identity(data.with_name("copy"))
    assert copy is not None
    assert copy.copied
    assert copy.identity == loaded.identity
    ids.save_identity(data, ids.started(loaded))
    shutil.copy2(data.with_name("copy") / ids.IDENTITY_NAME, data / ids.IDENTITY_NAME)
    restored = ids.load_identity(data)
    assert restored is not None
    assert restored.copied


def test_a_start_raises_the_boot_number(data: Path) -> None:
    """Each start has a higher number; a copied directory trusts nothing from then on; peers may know a higher one
    yet.
    """
    ids.save_identity(data, replace(ids.new_identity("n1", "prod"), cluster_id="c", boot_number=4, stamped=4))
    loaded = ids.load_identity(data)
    assert loaded is not None
    next_run = ids.started(loaded)
    assert (next_run.boot_number, next_run.stamped, next_run.distrusted) == (5, 4, False)
    copied = ids.started(ids.Loaded(loaded.identity, copied=True))
    assert (copied.boot_number, copied.stamped, copied.distrusted) == (5, 5, True)
    raised = ids.raised(next_run, 9)
    assert (raised.boot_number, raised.stamped, raised.distrusted) == (10, 10, True)


def test_no_identity_is_none(data: Path) -> None:
    """An empty directory has none."""
    assert ids.load_identity(data) is None


@given(st.data())
def test_a_damaged_identity_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """F10: any changed bit of identity.json is CorruptionError (or a later format), never another identity."""
    directory = tmp_path_factory.mktemp("identity")
    ids.save_identity(directory, ids.new_identity("n1", "prod"))
    file = directory / ids.IDENTITY_NAME
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before = ids.load_identity(directory)
    assert before is not None
    file.write_bytes(content)
    try:
        after = ids.load_identity(directory)
    except (errors.CorruptionError, errors.UnsupportedFeature):
        return
    assert after is not None
    assert after.identity == before.identity
