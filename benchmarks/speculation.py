"""Does speculation pay on the demo's traffic? Tokens/s with drafts against without, as it learns.

Runs the demo in stages on one data folder (bfloat16, EAGLE3 trees of 8 nodes, one thread for the
server and one for training): it measures the same held-out prompts with the first drafter and with
the last one of each stage, and just before each of them without drafts, on the same server.

    python benchmarks/speculation.py [--stages 200,1000] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.servers import report


def stage(home: Path, requests: int) -> dict[str, Any]:
    """The summary of a demo over ``requests`` more requests."""
    command = [sys.executable, "-m", "aurora_sgl.cli", "demo", "--exit", "--json"]
    done = subprocess.run(
        [*command, "--requests", str(requests)],
        env={**os.environ, "AURORA_HOME": str(home)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stages", default="200,1000", help="requests served so far, ascending")
    parser.add_argument("--home", type=Path, help="data folder to go on with")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    served = 0
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
        home = given.home or Path(folder)
        for total in map(int, given.stages.split(",")):
            summary = stage(home, total - served)
            speeds, lengths = summary["tokens_per_second"], summary["accept_length"]
            if not rows:
                plain = speeds["no_speculation"]
                rows.append(_row(0, lengths["first"], plain, speeds["first"]))
            rows.append(_row(total, lengths["last"], speeds["no_speculation_last"], speeds["last"]))
            served = total
    report("speculation against none, held-out prompts", rows, as_json=given.json)


def _row(requests: int, length: float, plain: float, drafts: float) -> dict[str, Any]:
    return {
        "requests served": requests,
        "accept length": length,
        "tokens/s without": plain,
        "tokens/s with drafts": drafts,
        "ratio": drafts / plain,
    }


if __name__ == "__main__":
    main()
