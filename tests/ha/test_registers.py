"""Registers: the last write stands, a condition on the version decides, bounds hold; the same on every node."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.ha import registers
from srengine.ha.registers import RegisterPut, RegistersApplier, put_register, read_register, register_count
from srengine.ha.tables import Overlay
from srengine.storage import MetadataStore


@pytest.fixture
def rows(tmp_path: Path):
    tmp_path.chmod(0o700)
    with MetadataStore(tmp_path / "meta") as store:
        yield Overlay(store)


def put(rows: Overlay, index: int, name: str, value: bytes, if_version: int | None = None) -> None:
    command = put_register(name, value, if_version=if_version)
    RegistersApplier().apply(rows, index, command.kind, command.body)


def test_the_last_write_stands(rows: Overlay) -> None:
    """A register has the value and the index of its last write; another name has its own."""
    assert read_register(rows, "a") is None
    put(rows, 3, "a", b"one")
    put(rows, 5, "a", b"two")
    put(rows, 6, "b", b"")
    assert read_register(rows, "a") == registers.Register(b"two", 5)
    assert read_register(rows, "b") == registers.Register(b"", 6)
    assert register_count(rows) == 2


def test_a_condition_decides(rows: Overlay) -> None:
    """With a version that is not the register's nothing changes, and Conflict names the one that stands."""
    put(rows, 3, "a", b"one", if_version=0)
    for wrong in (0, 2, 4):
        with pytest.raises(errors.Conflict) as caught:
            put(rows, 4, "a", b"no", if_version=wrong)
        assert caught.value.current_version == 3
    put(rows, 5, "a", b"two", if_version=3)
    assert read_register(rows, "a") == registers.Register(b"two", 5)
    with pytest.raises(errors.Conflict):
        put(rows, 6, "none", b"", if_version=5)


def test_bounds(rows: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value over 64 KiB, a name that is none and too many registers are refused, by the applier too."""
    put(rows, 1, "a", bytes(registers.VALUE_BYTES_MAX))
    with pytest.raises(errors.InvalidValue):
        put_register("a", bytes(registers.VALUE_BYTES_MAX + 1))
    for bad in (RegisterPut("a", bytes(registers.VALUE_BYTES_MAX + 1)), RegisterPut("a/b", b""), RegisterPut("", b"")):
        with pytest.raises(errors.InvalidValue):
            RegistersApplier().apply(rows, 2, registers.REGISTER_PUT, msgspec.msgpack.encode(bad))
    monkeypatch.setattr(registers, "REGISTERS_MAX", 2)
    put(rows, 2, "b", b"")
    with pytest.raises(errors.QuotaExceeded):
        put(rows, 3, "c", b"")
    put(rows, 4, "b", b"still possible")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=3), st.none() | st.integers(0, 8)), max_size=20))
def test_as_a_dictionary_with_versions(puts) -> None:
    """Any sequence of writes leaves what a dictionary of (value, version) would have."""
    rows, model = Overlay(_Nothing()), {}
    for index, (name, value, if_version) in enumerate(puts, 1):
        if if_version is None or if_version == model.get(name, (b"", 0))[1]:
            put(rows, index, name, value, if_version)
            model[name] = (value, index)
        else:
            with pytest.raises(errors.Conflict):
                put(rows, index, name, value, if_version)
    for name in "abc":
        found = read_register(rows, name)
        assert (None if found is None else (found.value, found.version)) == model.get(name)
    assert register_count(rows) == len(model)


class _Nothing:
    def get(self, table: str, key: bytes) -> None:
        return None

    def scan(self, table: str, start: bytes | None = None, stop: bytes | None = None):
        return iter(())
