"""Make synthetic referring data, train a recipe on it, and print the Dice with true and with shuffled prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cclip_deploy.data.layouts import of_split, read_flat
from cclip_deploy.data.synthetic import write_dataset
from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.train.loop import TrainConfig, TrainProgress, torch_predictor, train
from cclip_deploy.train.scores import evaluate_dice

RECIPE = Path(__file__).parent / "configs" / "synthetic_tiny.toml"


def show(progress: TrainProgress) -> None:
    if progress.step % 50 == 0 or progress.step == progress.steps:
        print(
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {progress.elapsed_s:.0f} s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("runs/synthetic"), help="folder for data and checkpoint"
    )
    parser.add_argument("--films", type=int, default=400, help="training films; an eighth as many are for testing")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()

    from cclip_deploy.model.checkpoint import load_checkpoint

    config = TrainConfig.from_toml(arguments.recipe)
    if arguments.epochs:
        config = config.model_copy(update={"epochs": arguments.epochs})
    data, started_s = arguments.output / "data", time.perf_counter()
    if not data.exists():
        counts = {"train": arguments.films, "test": max(2, arguments.films // 8)}
        write_dataset(data, counts, config.image_hw, config.seed, prompts_per_film=config.prompts_per_image)
    print(f"data: {data}, {time.perf_counter() - started_s:.0f} s")

    report = train(config, data, arguments.output / "tiny.safetensors", show)
    print(f"trained {report.steps} steps in {report.training_s:.0f} s: {report.checkpoint}")

    predict = torch_predictor(load_checkpoint(report.checkpoint).model, PromptTokenizer.from_open_clip(), config)
    scores = evaluate_dice(predict, of_split(read_flat(data), "test"))
    print(f"Dice, per-image mean [95 % interval], {scores.true.subjects} test films, {scores.true.rows} prompts")
    print(f"  true prompts      {scores.true}")
    print(f"  shuffled prompts  {scores.shuffled}")
    print(f"  difference        {scores.drop}")


if __name__ == "__main__":
    main()
