"""Run the examples of the documentation and check its links: ``python tools/check_docs.py``.

* In every ```` ```python ```` block, lines with ``>>>`` are doctests; a file's blocks share one namespace and one empty
  directory to work in. A block without prompts is only compiled, unless ``<!-- run -->`` stands on the line before it.
* Every relative link must lead to a file, and ``#anchor`` to a heading of it. Links to the outside are not fetched.
* Docstrings of srengine with ``>>>`` run as doctests.
* A document that a source file names must exist, from the root, from docs/ or beside the file.

Prints each finding; exit code 1 if there are any.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\((?P<target>[^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MENTION = re.compile(r"(?<![\w/.*-])[A-Za-z][\w/.-]*\.md\b")
HEADING = re.compile(r"^#+ +(?P<text>.+?) *$", re.MULTILINE)


def documents() -> list[Path]:
    """Return every document of the project."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tests/**/*.md")]
    return sorted(found)


def anchors(text: str) -> set[str]:
    """Return the anchors that a renderer makes of the headings."""
    found = set()
    for heading in HEADING.finditer(FENCED.sub("", text)):
        plain = re.sub(r"[^\w\- ]", "", heading["text"].replace("`", "").lower())
        found.add(plain.replace(" ", "-"))
    return found


def link_findings(path: Path, text: str) -> Iterator[str]:
    """Yield every link of ``path`` that leads nowhere."""
    for link in LINK.finditer(FENCED.sub("", text)):
        target = link["target"]
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if not other.exists():
            yield f"the link {target} leads to no file"
        elif anchor and other.suffix == ".md" and anchor not in anchors(other.read_text(encoding="utf-8")):
            yield f"the link {target} leads to no heading"


def example_findings(path: Path, text: str) -> Iterator[str]:
    """Run or compile the Python blocks of ``path``; yield what failed."""
    names: dict[str, object] = {"__name__": path.stem}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for block in BLOCK.finditer(text):
        code, line = block["code"], text[: block.start("code")].count("\n") + 1
        where = f"{path.relative_to(ROOT)}:{line}"
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, where, str(path), line - 1)
            output: list[str] = []
            if runner.run(test, out=output.append, clear_globs=False).failed:
                yield f"line {line}: " + "".join(output)
            names = test.globs
            continue
        try:
            compiled = compile(code, where, "exec")
            if "<!-- run -->" in block["before"]:
                exec(compiled, names)  # noqa: S102  (our own documentation)
        except Exception as error:  # noqa: BLE001  (anything that an example raises is the finding)
            yield f"line {line}: the example fails with {type(error).__name__}: {error}"


def docstring_findings() -> Iterator[str]:
    """Yield what the doctests in the package's docstrings say."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for path in sorted((ROOT / "srengine").rglob("*.py")):
        if ">>>" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield f"{name} cannot be imported: {error}"
            continue
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            output: list[str] = []
            if runner.run(test, out=output.append).failed:
                yield f"{test.name}: " + "".join(output)


def mention_findings() -> Iterator[str]:
    """Yield every document that a source file names and that is not there."""
    for folder in ("srengine", "ext", "tests", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".py", ".pyi", ".pyx", ".pxi", ".pxd", ".c"} or path.name == "test_house.py":
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for name in MENTION.findall(line):
                    if not any((place / name).is_file() for place in (ROOT, ROOT / "docs", path.parent)):
                        yield f"{path.relative_to(ROOT)}:{number}: there is no {name}"


def main() -> int:
    """Print the findings; return the exit code."""
    found = list(mention_findings())
    for path in documents():
        text = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            findings = [*link_findings(path, text), *example_findings(path, text)]
        found += [f"{path.relative_to(ROOT)}: {finding}" for finding in findings]
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        found += docstring_findings()
    for text in found:
        print(text)
    print(f"{len(documents())} documents, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
