"""What was compiled is what was meant to be."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path

import pytest

from srengine._native import build_info
from tools import vendor

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "ext").glob("*.pyx"))


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_hides_what_it_contains(name):
    """No symbol of LMDB or xxHash leaves a kernel, so another copy in the process can never be confused with ours."""
    library = ctypes.CDLL(importlib.import_module(f"srengine._native.{name}").__file__)
    assert hasattr(library, f"PyInit_{name}")
    for symbol in ("mdb_env_open", "mdb_txn_commit", "XXH3_64bits", "XXH64"):
        assert not hasattr(library, symbol), symbol


@pytest.mark.skipif(build_info.SYSTEM_LIBS, reason="built on system libraries")
def test_lmdb_is_linked_into_two_kernels():
    """The text of LMDB's version stands in the kernels that open environments: the others reach LMDB through them."""
    holders = [
        name
        for name in KERNELS
        if b"LMDB 0.9." in Path(importlib.import_module(f"srengine._native.{name}").__file__ or "").read_bytes()
    ]
    assert holders == ["rows", "tablet"]


def test_build_info_says_what_was_compiled():
    """The facts beside the kernels name the vendored version, and that it was hardened."""
    if build_info.SYSTEM_LIBS:
        assert not build_info.LMDB_PATCHED
        return
    vendored = ROOT / "build" / "vendor" / f"{vendor.LMDB.top}-{vendor.LMDB.key}" / "lmdb.h"
    if not vendored.is_file():
        pytest.skip("built elsewhere")
    assert vendor.lmdb_version(vendored.read_text()) == build_info.LMDB_VERSION
    assert build_info.LMDB_PATCHED
