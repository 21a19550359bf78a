"""Rebuild and open many crash images: ``python -m tests.crash --images 500``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.crash import images, workload


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--images", type=int, default=500, help="how many images (default 500)")
    parser.add_argument("--batches", type=int, default=40, help="batches of the workload (default 40)")
    parser.add_argument("--seed", type=int, default=1, help="choice of images and of what a disk loses (default 1)")
    parser.add_argument("--kind", choices=sorted(workload.KINDS), default="batches", help="what the process does")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="srengine-crash-") as scratch:
        recording = images.record_workload(Path(scratch), arguments.batches, arguments.kind)
        chosen = images.choose(recording, arguments.images, arguments.seed)
        findings = images.check_images(recording, chosen, Path(scratch), arguments.seed)
    for finding in findings:
        sys.stdout.write(f"event {finding.event}, {finding.mode}: {finding.why}\n")
    sys.stdout.write(
        f"{len(chosen)} images of {recording.count} events, seed {arguments.seed}: {len(findings)} wrong\n"
    )
    return 1 if findings or len(chosen) < arguments.images else 0


if __name__ == "__main__":
    sys.exit(main())
