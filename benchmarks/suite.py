"""Benchmark bundles against the baselines with 1 and 8 images and 1, 16 and 128 prompts; write JSON for each."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import write_json

WORKLOADS = tuple(product((1, 8), (1, 16, 128)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", help="for example one of 224×224 and one of 416×416")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/suite"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--budget", type=float, default=600.0, help="time limit in seconds, applied after the first ten rounds"
    )
    parser.add_argument(
        "--workload", nargs=2, type=int, action="append", metavar=("IMAGES", "PROMPTS"), help="repeatable; default: all"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    arguments = parser.parse_args()

    options = BenchOptions(
        arguments.checkpoint, compile=not arguments.no_compile, threads=arguments.threads, rounds=arguments.rounds,
        budget_seconds=arguments.budget, peers=True, workloads=tuple(map(tuple, arguments.workload or WORKLOADS)),
    )  # fmt: skip
    for bundle_path in arguments.bundles:
        bundle = Bundle.open(bundle_path)
        result = bench_bundle(bundle, options, print)
        height, width = bundle.manifest.image_hw
        path = arguments.output / f"{bundle.manifest.model['name']}_{height}x{width}.json"
        write_json(path, result)
        for figure in result["figures"]:
            print(f"{figure['backend'] or 'both'}: {figure['what']}: {figure['value']:.4g} {figure['unit']}")
        print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
