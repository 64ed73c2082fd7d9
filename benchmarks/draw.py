"""Draw the README's picture from a result of `cclip-deploy bench --peers --json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cclip_deploy.evidence.picture import draw_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="the JSON that bench, compare.py or suite.py kept")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/benchmark.png"))
    arguments = parser.parse_args()

    draw_benchmark(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.output)
    print(f"drawn: {arguments.output}")


if __name__ == "__main__":
    main()
