"""Trace a checkpoint's graphs to bare ONNX files, without a bundle: the shortest way through the library.

For a folder that is compared with PyTorch, hashed and ready to serve, use `cclip-deploy export`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.cli.entry import run_script
from cclip_deploy.environment.packages import require_export_packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("graphs"), help="folder for the .onnx files")
    parser.add_argument("--image-size", default="224", help="N or HxW, multiples of 32")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    require_export_packages()
    import torch

    from cclip_deploy.common.threads import check_threads
    from cclip_deploy.graph.cost import count_multiply_adds
    from cclip_deploy.graph.deploy import to_deploy_form
    from cclip_deploy.graph.entry import save_graph
    from cclip_deploy.graph.trace import plan_deploy_graphs, trace
    from cclip_deploy.model.checkpoint import load_checkpoint
    from cclip_deploy.model.config import image_hw

    check_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    model = load_checkpoint(arguments.checkpoint).model
    size = image_hw(arguments.image_size)
    form = to_deploy_form(model, size, arguments.prompt_length)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for plan in plan_deploy_graphs(form, model.config, size, arguments.prompt_length):
        graph = trace(plan)
        save_graph(graph, arguments.output / f"{plan.name}.onnx")
        cost = count_multiply_adds(graph, {"batch": 1, "prompts": 1})
        print(f"{plan.name}: {len(graph.graph.node)} nodes, {cost.total / 1e9:.3f} G multiply-adds")


if __name__ == "__main__":
    run_script(main)
