"""Count the multiply-adds of a checkpoint's network in PyTorch, in its plain export and in a bundle's graphs.

python benchmarks/multiply_adds.py BUNDLE PLAIN_BUNDLE --checkpoint CHECKPOINT -o multiply_adds.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import write_json
from cclip_deploy.environment.packages import require_packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="bundle in deploy form")
    parser.add_argument("plain", type=Path, help="bundle of the same checkpoint, exported with --plain")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    require_packages("Counting PyTorch's multiply-adds", ("torch", "open_clip"), "export")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cclip_deploy.model.checkpoint import load_checkpoint

    bundle, plain = Bundle.open(arguments.bundle), Bundle.open(arguments.plain)
    manifest = bundle.manifest
    network = load_checkpoint(arguments.checkpoint).model.eval()
    image, tokens = torch.zeros(1, 3, *manifest.image_hw), torch.zeros(1, manifest.prompt_length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image, tokens)
    result = {
        "network": {"name": manifest.model["name"], "image_hw": list(manifest.image_hw)},
        "prompt_length": manifest.prompt_length,
        "published": counter.get_total_flops() // 2,
        "plain": plain.graph("plain").multiply_adds,
        "graphs": {name: graph.multiply_adds for name, graph in manifest.graphs.items() if graph.precision == "fp32"},
    }
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
