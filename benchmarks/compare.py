"""Time a bundle against PyTorch and the plain export, and keep the result with this machine's fingerprint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="adds PyTorch and the plain export")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()

    options = BenchOptions(
        arguments.checkpoint, compile=not arguments.no_compile, threads=arguments.threads, rounds=arguments.rounds
    )
    result = bench_bundle(Bundle.open(arguments.bundle), options, print)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for ratio in result["ratios"]:
        none = ratio["low"] is None
        interval = "(too few rounds for an interval)" if none else f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
        print(f"{ratio['candidate']} is {ratio['ratio']:.2f} × as fast as {ratio['baseline']} {interval}")
    for row in result["not_measured"]:
        print(f"not measured: {row['name']}: {row['reason']}")
    print(f"kept in {arguments.output}")


if __name__ == "__main__":
    run_script(main)
