"""Key files: private, durable, never overwritten, never shown."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, security
from srengine.transport import KeyPair, new_key_pair, public_key_of


@pytest.fixture
def directory(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


def test_node_keys_are_made_once(directory):
    """The first start makes keys/node.key, directory 0700 and file 0600; later ones read the same."""
    keys = security.ensure_node_keys(directory)
    assert security.ensure_node_keys(directory) == security.load_node_keys(directory) == keys
    assert public_key_of(keys.secret) == keys.public
    assert stat.S_IMODE((directory / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "keys" / "node.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(("what", "mode"), [("keys", 0o755), ("keys/node.key", 0o644), ("keys/node.key", 0o640)])
def test_loose_modes_are_refused(directory, what, mode):
    """F52: keys that others can reach are UnsafePermissions; insecure lets them pass."""
    keys = security.ensure_node_keys(directory)
    (directory / what).chmod(mode)
    with pytest.raises(errors.UnsafePermissions, match="chmod"):
        security.load_node_keys(directory)
    assert security.load_node_keys(directory, insecure=True) == keys


def test_key_files_are_never_overwritten(directory):
    """Making a key where a file is raises Conflict and leaves the file."""
    path = directory / "client.key"
    keys = security.create_key_file(path)
    with pytest.raises(errors.Conflict):
        security.create_key_file(path)
    assert security.load_key_file(path) == keys


def test_missing_and_foreign_files(directory):
    """No file is NotFound; a link, a damaged file and halves that do not fit are InvalidValue."""
    with pytest.raises(errors.NotFound):
        security.load_key_file(directory / "none.key")
    with pytest.raises(errors.NotFound):
        security.load_node_keys(directory)
    real = directory / "real.key"
    keys = security.create_key_file(real)
    (directory / "link.key").symlink_to(real)
    with pytest.raises(errors.InvalidValue):
        security.load_key_file(directory / "link.key")
    other = new_key_pair()
    real.write_text(real.read_text().replace(keys.public.hex(), other.public.hex()))
    with pytest.raises(errors.InvalidValue, match="belong together"):
        security.load_key_file(real)


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_any_content_is_refused_with_our_error(tmp_path_factory, content):
    """A key file with anything in it is a typed error that shows none of it."""
    directory = tmp_path_factory.mktemp("keys")
    directory.chmod(0o700)
    path = directory / "x.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(errors.InvalidValue, match="no key file"):
        security.load_key_file(path)


@pytest.mark.fuzz
@given(st.text(max_size=80))
def test_public_keys_as_text(text):
    """64 hexadecimal digits are a key, anything else is InvalidValue."""
    try:
        key = security.parse_public_key(text)
    except errors.InvalidValue:
        return
    assert security.format_public_key(key) == text.strip().lower()


def test_secrets_are_not_shown():
    """F51: no rendering of a key pair or of an identity has the secret in it."""
    from srengine.transport import Identity

    keys = new_key_pair()
    for shown in (repr(keys), str(keys), repr(Identity(keys=keys))):
        assert keys.secret.hex() not in shown
        assert repr(keys.secret) not in shown
    with pytest.raises(errors.InvalidValue):
        KeyPair(b"short", b"short")
