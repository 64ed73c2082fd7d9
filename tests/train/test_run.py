"""Tests of whole training runs: outputs, reproducibility, resuming and errors."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cclip_deploy.datasets.augmentation import Augmentation
from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import DataError, EnvironmentIssue, UsageError
from cclip_deploy.evaluation.evaluate import evaluate_dice
from cclip_deploy.evaluation.models import CheckpointModel
from cclip_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import DataSource, Devices, Game, SyntheticData, TrainConfig
from cclip_deploy.train.loop import BEST, LAST, STOPPED_BATCH, TrainProgress
from cclip_deploy.train.run import RunOptions, find_data, train
from cclip_deploy.train.state import STATE
from tests.made_data import CPU, SMALL
from tests.model.open_clip_twin import open_clip_twin

RECIPES = Path(__file__).parents[2] / "training" / "configs"
QUIET = RunOptions(tensorboard=False)
GO_ON = RunOptions(resume=True, tensorboard=False)
THOROUGH = SMALL.model_copy(
    update={
        "mode": "alternating", "epochs": 2, "images_per_batch": 1, "accumulate": 2, "average_decay": 0.5,
        "augmentation": Augmentation(gain=0.2, flip_share=0.5), "game": Game(mask_budget=0.5),
    }
)  # fmt: skip
"""A recipe in which every stateful part is used."""


class Killed(Exception):
    pass


def stop_at(step: int):  # type: ignore[no-untyped-def]
    """Return a progress callback that interrupts the training at a step."""

    def listen(progress: TrainProgress) -> None:
        if progress.step == step:
            raise Killed

    return listen


def test_a_run_writes_checkpoint_state_logs_and_record(data_folder: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    report = train(SMALL, data_folder, tmp_path / "run", seen.append)
    assert (report.images, report.rows, report.steps, report.cut_prompts, report.best_dice) == (4, 8, 2, 0, None)
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(1, 2, 1), (2, 2, 1)]
    assert all(math.isfinite(p.loss) for p in seen)
    assert report.checkpoint == tmp_path / "run" / LAST
    loaded = load_checkpoint(report.checkpoint)
    assert (loaded.config, loaded.form) == (TINY, SMALL.form)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LAST, STATE, "run.json", "logs"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["learning_rate"] == SMALL.learning_rate
    assert record["result"]["steps"] == 2
    assert record["epochs"][0]["causal_loss"] == pytest.approx((seen[0].loss + seen[1].loss) / 2)
    assert 0 <= report.waiting_share < 1


def test_logs_contain_losses_mask_means_dice_and_images(validated_folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = train(SMALL.model_copy(update={"mode": "joint"}), validated_folder, tmp_path / "run")
    logs = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    assert set(logs.Tags()["scalars"]) == {
        "loss/total", "loss/causal", "loss/confounding", "learning_rate", "loading/waiting_share", "dice/val",
        "mask_mean/level_3", "mask_mean/level_4", "mask_mean/level_5",
    }  # fmt: skip
    assert [event.value for event in logs.Scalars("dice/val")] == pytest.approx([report.best_dice])
    (shown,) = logs.Images(logs.Tags()["images"][0])
    assert (shown.width, shown.height) == (3 * 64, 2 * 64)


def test_a_run_is_reproducible_bit_for_bit_and_restores_the_callers_random_state(
    data_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    runs = [SMALL, SMALL, SMALL.model_copy(update={"seed": 1, "threads": threads + 1})]
    during: set[int] = set()
    once, again, other = (
        load_checkpoint(
            train(
                config, data_folder, tmp_path / str(number), lambda _: during.add(torch.get_num_threads()), QUIET
            ).checkpoint
        ).model
        for number, config in enumerate(runs)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (during, torch.get_num_threads()) == ({1, threads + 1}, threads)
    assert all(map(torch.equal, once.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(once.head.prompt.weight, other.head.prompt.weight)


@pytest.mark.parametrize(
    "save_minutes",
    [pytest.param(1e-9, id="saved each step"), pytest.param(10.0, id="saved each epoch", marks=pytest.mark.slow)],
)
def test_an_interrupted_run_resumes_bit_for_bit(validated_folder: Path, tmp_path: Path, save_minutes: float) -> None:
    config = THOROUGH.model_copy(update={"save_minutes": save_minutes})
    straight = train(config, validated_folder, tmp_path / "straight", options=QUIET)
    with pytest.raises(Killed):
        train(config, validated_folder, tmp_path / "stopped", stop_at(7), QUIET)
    resumed = train(config, validated_folder, tmp_path / "stopped", options=GO_ON)
    assert resumed.resumed_at_step == (6 if save_minutes < 1 else 4)
    assert (resumed.steps, resumed.last_loss, resumed.best_dice) == (8, straight.last_loss, straight.best_dice)
    for name in (LAST, BEST):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_resumes_from_its_last_state(data_folder: Path, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"images_per_batch": 1, "epochs": 2, "save_minutes": 1e-9})
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    code = """
import os, signal, sys
from pathlib import Path
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.run import train
config, data, folder = sys.argv[1:]
def kill(progress):
    if progress.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train(TrainConfig.model_validate_json(Path(config).read_text()), Path(data), Path(folder), kill)
"""
    arguments = [tmp_path / "recipe.json", data_folder, tmp_path / "killed"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "killed" / f".{STATE}.0123456789abcdef.unfinished").write_bytes(b"half")
    resumed = train(config, data_folder, tmp_path / "killed", options=GO_ON)
    assert (resumed.resumed_at_step, resumed.steps) == (5, 8)
    assert not list((tmp_path / "killed").glob(".*"))
    train(config, data_folder, tmp_path / "straight", options=QUIET)
    assert (tmp_path / "killed" / LAST).read_bytes() == (tmp_path / "straight" / LAST).read_bytes()


@pytest.mark.parametrize("room_bytes", [100_000, None], ids=["network", "state"])
def test_a_full_disk_keeps_the_previous_checkpoint_and_state(
    data_folder: Path, tmp_path: Path, room_bytes: int | None
) -> None:
    """A file size limit makes writing fail in the second epoch, as a full disk does."""
    import resource

    config, run = SMALL.model_copy(update={"epochs": 2}), tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved: dict[str, bytes] = {}

    def fill_disk(progress: TrainProgress) -> None:
        if progress.step == 4:
            saved.update({name: (run / name).read_bytes() for name in (LAST, STATE)})
            room = room_bytes or len(saved[LAST]) + 100_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    try:
        with pytest.raises(EnvironmentIssue, match=r"ould not .*writ|not be written"):
            train(config, data_folder, run, fill_disk, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / STATE).read_bytes() == saved[STATE]
    load_checkpoint(run / LAST)
    assert {path.name for path in run.iterdir()} == {LAST, STATE, "run.json"}
    assert train(config, data_folder, run, options=GO_ON).resumed_at_step == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(data_folder: Path, tmp_path: Path) -> None:
    wild = SMALL.model_copy(update={"learning_rate": 1e30, "epochs": 4, "warmup": 0.0})
    with pytest.raises(
        UsageError, match=r"loss became nan at step 2 .*stopped_batch\.safetensors.*Lower learning_rate"
    ):
        train(wild, data_folder, tmp_path / "run", options=QUIET)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STOPPED_BATCH]
    with safe_open(tmp_path / "run" / STOPPED_BATCH, framework="np") as file:
        source = json.loads(file.metadata()["source"])
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {"images": (2, 3, 64, 64), "masks": (2, 2, 64, 64), "tokens": (2, 2, 32), "rows": (2, 2)}
    assert source["step"] == 2
    assert Path(source["rows"][0]["image"]).is_file()
    assert source["rows"][0]["text"].endswith(".")


def test_early_stopping_keeps_the_best_checkpoint(validated_folder: Path, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"learning_rate": 1e-12, "epochs": 9, "patience": 2})
    report = train(config, validated_folder, tmp_path / "run", options=QUIET)
    assert (report.stopped_early, report.epochs, report.best_epoch) == (True, 3, 1)
    assert report.checkpoint == tmp_path / "run" / BEST
    assert report.best_dice == report.history[0]["dice"]


def test_patience_needs_a_val_split(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows of split 'val'"):
        train(SMALL.model_copy(update={"patience": 1}), data_folder, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_resuming_another_training_is_refused_with_the_differences(data_folder: Path, tmp_path: Path) -> None:
    train(SMALL, data_folder, tmp_path / "run", options=QUIET)
    with pytest.raises(UsageError, match="Continue with --resume"):
        train(SMALL, data_folder, tmp_path / "run", options=QUIET)
    game = SMALL.model_copy(update={"learning_rate": 0.5, "game": Game(masker_steps=3), "loader_threads": 2})
    with pytest.raises(UsageError, match=r"differs in learning_rate \(0.001 then, 0.5 now\); game.masker_steps \(1"):
        train(game, data_folder, tmp_path / "run", options=GO_ON)
    write_dataset(tmp_path / "data", {"train": 4, "test": 3}, (64, 64), seed=9, prompts_per_image=2)
    with pytest.raises(UsageError, match=r"data set.train.pictures \(.{12}… then, .{12}… now\)"):
        train(SMALL, tmp_path / "data", tmp_path / "run", options=GO_ON)


def test_a_damaged_state_is_refused(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STATE).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"state\.pt is a damaged training state"):
        train(SMALL, data_folder, tmp_path / "run", options=GO_ON)


def test_a_state_with_pickled_code_is_refused(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"format": "cclip-deploy training state 1", "identity": Path("x")}, tmp_path / "run" / STATE)
    with pytest.raises(DataError, match=r"state\.pt is a damaged training state"):
        train(SMALL, data_folder, tmp_path / "run", options=GO_ON)


def test_clip_weights_initialize_the_towers_and_frozen_stages_keep_them(data_folder: Path, tmp_path: Path) -> None:
    twin = open_clip_twin(TINY, seed=3)
    save_file(twin.state_dict(), tmp_path / "clip.safetensors")
    config = SMALL.model_copy(update={"clip_weights": str(tmp_path / "clip.safetensors"), "frozen": ("stem", "layer2")})
    report = train(config, data_folder, tmp_path / "run", options=QUIET)
    assert report.clip is not None
    clip, trained = twin.state_dict(), load_checkpoint(report.checkpoint).model.state_dict()
    for name, still in (("conv1.weight", True), ("bn2.running_var", True), ("layer2.0.bn1.running_mean", True)):
        assert torch.equal(trained[f"image_tower.{name}"], clip[f"visual.{name}"]) == still
    assert not torch.equal(trained["image_tower.layer4.0.conv1.weight"], clip["visual.layer4.0.conv1.weight"])
    start = json.loads((tmp_path / "run" / "run.json").read_text())["clip_start"]
    assert (tuple(start["found"]), tuple(start["missing"])) == (report.clip.found, report.clip.missing)
    assert all(name.startswith("image_tower.attnpool.connect.") for name in start["missing"])


def test_a_checkpoint_is_fine_tuned(data_folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    still = {"start_checkpoint": tiny_checkpoint, "learning_rate": 1e-12}
    report = train(SMALL.model_copy(update=still), data_folder, tmp_path / "run", options=QUIET)
    start, end = (load_checkpoint(path).model.head.mix.weight for path in (tiny_checkpoint, report.checkpoint))
    assert torch.allclose(start, end, atol=1e-9)
    smaller = dataclasses.replace(TINY, name="smaller", text_layers=1)
    save_checkpoint(CausalCLIPSeg(smaller), tmp_path / "smaller.safetensors")
    other = SMALL.model_copy(update={"start_checkpoint": tmp_path / "smaller.safetensors"})
    with pytest.raises(UsageError, match=r"config 'smaller', but the recipe trains 'tiny'"):
        train(other, data_folder, tmp_path / "other", options=QUIET)


@pytest.mark.parametrize("layout", ["languidemedseg", "medvlsm", "jsonl"])
def test_a_data_set_of_any_layout_trains(layout: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 4, "val": 1, "test": 1}, (64, 64), seed=0, layout=layout)
    report = train(SMALL, tmp_path / "data", tmp_path / "run", options=RunOptions(dry_run=True))
    assert (report.images, report.rows, report.steps) == (2, 2, 1)
    assert report.best_dice is not None
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(("recipe", "layout"), [("qata_cov19", "qata"), ("mosmed_plus", "mosmed")])
def test_recipes_of_published_data_sets_run_on_their_layouts(recipe: str, layout: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 4, "val": 2, "test": 1}, (64, 64), seed=0, layout=layout)
    published = TrainConfig.from_toml(RECIPES / f"{recipe}.toml")
    small = {"model": "tiny", "image_size": 64, "images_per_batch": 4, "clip_weights": None, "threads": 1}
    devices = published.devices.model_copy(update={"accelerator": "cpu"})
    config = published.model_copy(update={**small, "devices": devices})
    report = train(config, tmp_path / "data", tmp_path / "run", options=RunOptions(dry_run=True))
    assert (report.images, report.steps) == (4, 1)
    assert report.mask_means != (1, 1, 1), "the maskers' step sees their masks"


def test_synthetic_images_are_generated_if_the_folder_does_not_exist(tmp_path: Path) -> None:
    films = SyntheticData(images=10, prompts_per_image=2)
    config = SMALL.model_copy(update={"data": DataSource(folder=tmp_path / "films", synthetic=films)})
    assert find_data(config) == tmp_path / "films"
    assert {row.split for row in read_flat(tmp_path / "films")} == {"train", "val", "test"}
    assert find_data(config) == tmp_path / "films"
    with pytest.raises(UsageError, match="names no data set"):
        find_data(SMALL)


def test_half_precision_trains_and_float16_needs_a_gpu(data_folder: Path, tmp_path: Path) -> None:
    devices = CPU.model_copy(update={"precision": "bf16-mixed"})
    config = SMALL.model_copy(update={"mode": "reversal", "devices": devices})
    full = train(SMALL.model_copy(update={"mode": "reversal"}), data_folder, tmp_path / "full", options=QUIET)
    half = train(config, data_folder, tmp_path / "half", options=QUIET)
    assert half.first_loss != full.first_loss
    assert half.first_loss == pytest.approx(full.first_loss, rel=0.02)
    with pytest.raises(EnvironmentIssue, match="float16 needs a GPU"):
        train(
            SMALL.model_copy(update={"devices": CPU.model_copy(update={"precision": "16-mixed"})}),
            data_folder,
            tmp_path / "x",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_missing_gpu_is_an_environment_issue(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentIssue, match="finds no GPU"):
        train(SMALL.model_copy(update={"devices": Devices(accelerator="cuda")}), data_folder, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_tiny_model_learns_to_follow_prompts_and_never_waits_for_data(
    tmp_path: Path, tokenizer: PromptTokenizer
) -> None:
    """A short run does not reach the demo's Dice, but the loss decreases and the network follows its prompts."""
    write_dataset(tmp_path / "data", {"train": 60, "test": 16}, (64, 64), seed=0, prompts_per_image=8)
    config = TrainConfig(
        image_size=64, epochs=10, images_per_batch=4, prompts_per_image=8, learning_rate=4e-3, tower_rate=0.3,
        devices=CPU,
    )  # fmt: skip
    report = train(config, tmp_path / "data", tmp_path / "run")
    assert report.last_loss < 0.3 * report.first_loss
    assert report.waiting_share <= 0.05
    network = CheckpointModel(load_checkpoint(report.checkpoint), config.form, tokenizer)
    drop = evaluate_dice(network, of_split(read_flat(tmp_path / "data"), "test")).drop
    assert drop.low is not None
    assert drop.low > 0.1
