"""Plot a result of `cclip-deploy bench --peers --json`, as shown in the README."""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.benchmark.plot import draw_benchmark
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON written by bench, compare.py or suite.py")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/benchmark.png"))
    arguments = parser.parse_args()

    draw_benchmark(read_json(arguments.result), arguments.output)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_script(main)
