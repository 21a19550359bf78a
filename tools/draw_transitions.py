"""Write the table of role transitions into docs/ha.md, between its two marks, as it stands in the code."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "ha.md"
BEGIN = "<!-- transitions: drawn from the code by tools/draw_transitions.py -->\n"
END = "<!-- end of transitions -->\n"


def main() -> int:
    """Replace what stands between the marks; return the exit code."""
    from srengine.ha.role_machine import drawn

    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{PAGE} has not both marks")
        return 1
    PAGE.write_text(f"{before}{BEGIN}\n{drawn()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
