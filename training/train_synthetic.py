"""Train a recipe on synthetic films, and print the Dice on held-out ones with true and with shuffled prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.data.layouts import of_split, read_data_set
from cclip_deploy.data.synthetic import write_dataset
from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.predictor import torch_predictor
from cclip_deploy.train.run import RunOptions, train
from cclip_deploy.train.scores import evaluate_dice

RECIPE = Path(__file__).parent / "configs" / "synthetic_tiny.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/synthetic"), help="folder for data and run")
    parser.add_argument("--films", type=int, default=400, help="training films; an eighth as many are for testing")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()

    from cclip_deploy.model.checkpoint import load_checkpoint

    config = TrainConfig.from_toml(arguments.recipe)
    if arguments.epochs:
        config = config.model_copy(update={"epochs": arguments.epochs})
    data = arguments.output / "data"
    if not data.exists():
        counts = {"train": arguments.films, "test": max(2, arguments.films // 8)}
        write_dataset(data, counts, config.image_hw, config.seed, prompts_per_film=config.prompts_per_image)

    report = train(config, data, arguments.output / "training", options=RunOptions(resume=True), tell=print)
    print(f"{report.steps} steps in {report.training_s:.0f} s, {report.waiting_share:.1%} of it waiting for data")

    predict = torch_predictor(load_checkpoint(report.checkpoint).model, PromptTokenizer.from_open_clip(), config)
    scores = evaluate_dice(predict, of_split(read_data_set(data).referrals, "test"))
    print(f"Dice, per-image mean [95 % interval], {scores.true.patients} test films, {scores.true.rows} prompts")
    print(f"  true prompts      {scores.true.show()}")
    print(f"  shuffled prompts  {scores.shuffled.show()}")
    print(f"  difference        {scores.drop.show()}")


if __name__ == "__main__":
    main()
