"""The whole suite: each bundle beside its peers, 1 and 8 images, 1, 16 and 128 prompts; a JSON file a bundle."""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script

WORKLOADS = tuple(product((1, 8), (1, 16, 128)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", help="for example one of 224×224 and one of 416×416")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/suite"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds after which no round is added to the first ten"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()

    options = BenchOptions(
        arguments.checkpoint, compile=not arguments.no_compile, threads=arguments.threads, rounds=arguments.rounds,
        budget_seconds=arguments.budget, peers=True, workloads=WORKLOADS,
    )  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.bundles:
        bundle = Bundle.open(path)
        result = bench_bundle(bundle, options, print)
        height, width = bundle.manifest.image_hw
        kept = arguments.output / f"{bundle.manifest.model['name']}_{height}x{width}.json"
        kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for figure in result["figures"]:
            print(f"{figure['backend'] or 'both'}: {figure['what']}: {figure['value']:.4g} {figure['unit']}")
        print(f"kept in {kept}")


if __name__ == "__main__":
    run_script(main)
