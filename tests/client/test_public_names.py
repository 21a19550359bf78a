"""srengine's public names: all there, loaded when needed, explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import srengine
from srengine import errors

PROMISED = {
    "open", "Store", "Tablet", "View", "Position", "Record", "connect", "Client", "AsyncClient", "Table", "Node",
    "NodeOptions", "Error",
}  # fmt: skip


def test_promised_names():
    """Everything that was promised is public, and every error class."""
    assert set(srengine.__all__) >= PROMISED
    kinds = [errors.Error]
    for kind in kinds:
        kinds += [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    assert {kind.__name__ for kind in kinds} <= set(srengine.__all__)


@pytest.mark.parametrize("name", srengine.__all__)
def test_every_name_is_explained(name):
    """Each public name has a docstring of its own, and so has each public method of a class."""
    thing = getattr(srengine, name)
    assert thing.__doc__
    assert len(thing.__doc__.split()) > 3
    if isinstance(thing, type):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and callable(value):
                assert value.__doc__, f"{name}.{attribute}"


def test_unknown_name():
    """A name that is not there is an AttributeError that names it."""
    with pytest.raises(AttributeError, match="nonsense"):
        _ = srengine.nonsense


def test_names_are_loaded_when_needed():
    """Importing srengine loads neither storage nor transport; dir shows the public names all the same."""
    program = (
        "import sys, srengine\n"
        "loaded = {name for name in sys.modules if name.startswith('srengine')}\n"
        "assert loaded == {'srengine'}, loaded\n"
        "assert {'open', 'Client', 'Node', '__version__'} <= set(dir(srengine))\n"
        "srengine.Error\n"
        "assert 'zmq' not in sys.modules and 'lmdb' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[2], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_open(tmp_path):
    """srengine.open opens a store, and its tablets can write snapshots without another import."""
    with srengine.open(tmp_path / "data") as store:
        tablet = store.tablet("users")
        tablet.put(b"k", b"v")
        position = tablet.write_snapshot(tmp_path / "snapshot")
        assert position == tablet.position
        assert isinstance(position, srengine.Position)
