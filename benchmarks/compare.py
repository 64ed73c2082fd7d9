"""Time a bundle against PyTorch and the plain export, and write the result as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of the bundle, for PyTorch and the plain export")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    arguments = parser.parse_args()

    options = BenchOptions(
        arguments.checkpoint, compile=not arguments.no_compile, threads=arguments.threads, rounds=arguments.rounds
    )
    result = bench_bundle(Bundle.open(arguments.bundle), options, print)
    write_json(arguments.output, result)
    for ratio in result["ratios"]:
        none = ratio["low"] is None
        interval = "(too few rounds for an interval)" if none else f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
        print(f"{ratio['candidate']} is {ratio['ratio']:.2f} × as fast as {ratio['baseline']} {interval}")
    for row in result["not_measured"]:
        print(f"not measured: {row['name']}: {row['reason']}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_script(main)
