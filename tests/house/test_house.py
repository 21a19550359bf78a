"""What the house promises besides code: licences, one door, rules over the syntax trees."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tools import check_docs, check_kernels, vendor

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"demo", "test", "check", "bench", "crash", "fuzz", "sim", "soak", "docs", "wheel", "clean"}


@pytest.mark.requires_tool("make")
def test_make_alone_lists_the_targets():
    """`make` without a target does nothing but name what there is."""
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == TARGETS


@pytest.mark.parametrize(
    ("source", "shipped"), [(vendor.LMDB, "LMDB-OLDAP-2.8.txt"), (vendor.XXHASH, "xxHash-BSD-2-Clause.txt")]
)
def test_shipped_licence_is_that_of_the_compiled_source(source, shipped):
    """The wheel ships the licence text of exactly the sources that are compiled in."""
    vendored = ROOT / "build" / "vendor" / f"{source.top}-{source.key}" / "LICENSE"
    if not vendored.is_file():
        pytest.skip("built on system libraries, or installed elsewhere")
    assert (ROOT / "LICENSES" / shipped).read_bytes() == vendored.read_bytes()


def test_every_dependency_has_a_floor_and_a_reason():
    """Each requirement names a lowest version, and a decision says why it is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = "".join(path.read_text() for path in (ROOT / "docs" / "decisions").glob("*.md"))
    for requirement in project["dependencies"]:
        name, floor = re.fullmatch(r"([a-z]+)>=([0-9.]+)", requirement).groups()
        assert re.search(rf"`{name}`[^.]*?\(floor {re.escape(floor)}[:)]", reasons.replace("\n", " ")), requirement


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "srengine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_kernel_belongs_to_its_room(tmp_path):
    """A room that imports another room's kernel is named with file and line."""
    root = tree(
        tmp_path,
        {
            "storage/tablet.py": "from srengine._native import tablet\n",
            "snapshot/writer.py": "\nfrom srengine._native.tablet import Environment\n",
            "sync/a.py": "import srengine._native.unheard_of\n",
        },
    )
    assert list(check_kernels.findings(root)) == [
        "srengine/snapshot/writer.py:2: the kernel tablet belongs to storage, not to snapshot",
        "srengine/sync/a.py:1: the kernel unheard_of has no row in tools/check_kernels.py",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import asyncio",
        "from time import monotonic",
        "import random",
        "from srengine.transport import Endpoint",
        "from ..storage import store",
        "from srengine import clock",
    ],
)
def test_machine_is_pure(tmp_path, line):
    """A machine that could do input or output, see a clock or roll dice is named; wherever the import stands."""
    root = tree(tmp_path, {"sync/pull_machine.py": f"def step():\n    {line}\n"})
    assert len(list(check_kernels.findings(root))) == 1


def test_machine_may_name_its_dice(tmp_path):
    """A machine may annotate with random.Random, and use pure modules."""
    text = (
        "from typing import TYPE_CHECKING\nfrom srengine import types\nfrom . import messages\n"
        "if TYPE_CHECKING:\n    from random import Random\n"
    )
    assert list(check_kernels.findings(tree(tmp_path, {"sync/machine.py": text}))) == []


def test_broken_link_and_broken_example_are_found(tmp_path, monkeypatch):
    """A link to nowhere, to no heading, and an example that says something else are findings."""
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    path = tmp_path / "a.md"
    text = "# One `thing`\n[good](a.md#one-thing) [b](b.md) [c](#two)\n\n```python\n>>> 1 + 1\n3\n```\n"
    path.write_text(text)
    assert list(check_docs.link_findings(path, text)) == [
        "the link b.md leads to no file",
        "the link #two leads to no heading",
    ]
    (finding,) = check_docs.example_findings(path, text)
    assert "Expected:\n    3\nGot:\n    2" in finding
