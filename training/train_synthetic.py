"""Train a recipe on synthetic images, and print Dice on test images with their own and with all other prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.cli.entry import run_script
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.environment.packages import require_training_packages
from cclip_deploy.evaluation.evaluate import evaluate_dice
from cclip_deploy.evaluation.models import CheckpointModel
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.run import RunOptions, train

RECIPE = Path(__file__).parent / "configs" / "synthetic_tiny.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/synthetic"), help="folder for data and run")
    parser.add_argument("--films", type=int, default=400, help="training images; an eighth as many test images")
    parser.add_argument("--epochs", type=int, help="override the recipe's epochs")
    arguments = parser.parse_args()

    require_training_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    config = TrainConfig.from_toml(arguments.recipe)
    if arguments.epochs:
        config = config.model_copy(update={"epochs": arguments.epochs})
    data = arguments.output / "data"
    if not data.exists():
        counts = {"train": arguments.films, "test": max(2, arguments.films // 8)}
        write_dataset(data, counts, config.image_hw, config.seed, prompts_per_image=config.prompts_per_image)

    report = train(config, data, arguments.output / "training", options=RunOptions(resume=True), on_message=print)
    print(f"{report.steps} steps in {report.training_s:.0f} s, {report.waiting_share:.1%} of it waiting for data")

    tokenizer = PromptTokenizer.from_open_clip()
    network = CheckpointModel(load_checkpoint(report.checkpoint), config.form, tokenizer)
    scores = evaluate_dice(network, of_split(read_data_set(data).samples, "test"))
    print(f"Dice, per-image mean [95 % interval], {scores.true.patients} test images, {scores.true.rows} prompts")
    print(f"  true prompts      {scores.true.show()}")
    print(f"  shuffled prompts  {scores.shuffled.show()}")
    print(f"  difference        {scores.drop.show()}")


if __name__ == "__main__":
    run_script(main)
