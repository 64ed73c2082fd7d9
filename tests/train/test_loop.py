"""The training loop: what it computes, that it repeats itself, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cclip_deploy.data.augment import Augmentation
from cclip_deploy.data.layouts import of_split, read_flat
from cclip_deploy.data.synthetic import write_dataset
from cclip_deploy.data.template import mirror
from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.model.checkpoint import load_checkpoint
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train import loop
from cclip_deploy.train.grouped import grouped_logits
from cclip_deploy.train.loop import TrainConfig, TrainProgress, learning_rate_share, train
from cclip_deploy.train.scores import evaluate_dice

RECIPES = Path(__file__).parents[2] / "training" / "configs"
SMALL = TrainConfig(image_size=64, epochs=1, images_per_batch=2, prompts_per_image=2, threads=1)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "data"
    write_dataset(folder, {"train": 4, "test": 3}, (64, 64), seed=0, prompts_per_film=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_open_clip()


def test_a_short_training_writes_a_checkpoint_and_reports_every_step(data_folder: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    report = train(SMALL, data_folder, tmp_path / "tiny.safetensors", seen.append)
    assert (report.images, report.rows, report.steps, report.cut_prompts) == (4, 8, 2, 0)
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(1, 2, 1), (2, 2, 1)]
    assert all(math.isfinite(p.loss) for p in seen)
    assert load_checkpoint(report.checkpoint).config == TINY


def test_a_training_repeats_itself_bit_for_bit_and_leaves_the_callers_state_alone(
    data_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    once, again, other = (
        load_checkpoint(train(SMALL.model_copy(update={"seed": seed}), data_folder, tmp_path / "m").checkpoint).model
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, once.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(once.head.prompt.weight, other.head.prompt.weight)


def test_threads_are_the_recipes_during_training_and_the_callers_afterwards(data_folder: Path, tmp_path: Path) -> None:
    callers, during = torch.get_num_threads(), set()
    config = SMALL.model_copy(update={"threads": callers + 1})
    train(config, data_folder, tmp_path / "m", lambda progress: during.add(torch.get_num_threads()))
    assert (during, torch.get_num_threads()) == ({callers + 1}, callers)


def test_only_the_causal_branch_trains(data_folder: Path, tmp_path: Path) -> None:
    trained = load_checkpoint(train(SMALL, data_folder, tmp_path / "m").checkpoint).model.state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(SMALL.seed)
        start = CausalCLIPSeg(TINY).state_dict()
    still = {name.split(".")[0] for name, tensor in trained.items() if torch.equal(tensor, start[name])}
    moved = {name.split(".")[0] for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert moved == {"image_tower", "text_tower", "neck", "head"}
    assert "confounding_head" in still


def test_prompts_grouped_by_image_give_what_row_by_row_gives() -> None:
    torch.manual_seed(0)
    model = CausalCLIPSeg(TINY).double().eval()
    images, tokens = torch.randn(2, 3, 64, 96, dtype=torch.float64), torch.randint(1, 49000, (2, 3, 9))
    tokens[:, :, -1] = 49407
    with torch.inference_mode():
        grouped = grouped_logits(model, images, tokens)
        rows = model.causal_logits(images.repeat_interleave(3, dim=0), tokens.flatten(0, 1))
    assert grouped.shape == (2, 3, 64, 96)
    error = (grouped.flatten(0, 1).unsqueeze(1) - rows).norm() / rows.norm()
    assert error < 1e-12


def test_grouped_logits_have_the_gradient_of_the_plain_form() -> None:
    torch.manual_seed(0)
    model = CausalCLIPSeg(TINY).double().eval()
    images, tokens = torch.randn(2, 3, 32, 64, dtype=torch.float64), torch.randint(1, 49000, (2, 1, 9))
    tokens[:, :, -1] = 49407
    gradients = []
    for logits in (grouped_logits(model, images, tokens), model.causal_logits(images, tokens[:, 0])):
        model.zero_grad()
        torch.autograd.backward(logits.square().mean())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[1].norm()


def test_the_rate_rises_then_follows_its_schedule() -> None:
    cosine = [learning_rate_share(step, 100, TrainConfig(warmup=0.1)) for step in range(100)]
    assert cosine[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    step = [learning_rate_share(step, 100, TrainConfig(warmup=0, schedule="step")) for step in range(100)]
    assert step == [1.0] * 70 + [0.1] * 30


def test_the_towers_start_at_their_own_rate(monkeypatch: pytest.MonkeyPatch, data_folder: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every weight that has a gradient by the rate, whatever the gradient's size."""
    config = SMALL.model_copy(update={"tower_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0, "images_per_batch": 4})
    trained = load_checkpoint(train(config, data_folder, tmp_path / "m").checkpoint).model.state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        start = CausalCLIPSeg(TINY).state_dict()
    for name, share in (("image_tower.conv1.weight", 0.1), ("neck.project4.0.weight", 1.0)):
        moved = (trained[name] - start[name]).abs().median().item()
        assert moved == pytest.approx(share * config.learning_rate, rel=0.05)


def test_every_image_comes_once_an_epoch_with_its_own_rows(data_folder: Path, tokenizer: PromptTokenizer) -> None:
    referrals = of_split(read_flat(data_folder), "train")
    data = loop.load_training_set(referrals, tokenizer, SMALL)
    batches = list(loop._draw_batches(data, tokenizer, SMALL))
    images = torch.cat([batch[0] for batch in batches]).numpy()
    order = [int(np.abs(data.images - image).reshape(4, -1).sum(axis=1).argmin()) for image in images]
    assert sorted(order) == [0, 1, 2, 3]
    for place, image in enumerate(order):
        tokens, masks = (batches[place // 2][part][place % 2].numpy() for part in (1, 2))
        own = {(data.tokens[row].tobytes(), data.masks[row].tobytes()) for row in data.rows_of_image[image]}
        drawn = {(tokens[i].tobytes(), masks[i].astype(bool).tobytes()) for i in range(2)}
        assert drawn == own


@pytest.mark.parametrize("layout", ["qata", "mosmed", "languidemedseg", "medvlsm", "jsonl"])
def test_a_data_set_of_any_layout_trains(layout: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 4, "val": 1, "test": 1}, (64, 64), seed=0, layout=layout)
    report = train(SMALL.model_copy(update={"prompts_per_image": 1}), tmp_path / "data", tmp_path / "m")
    assert (report.images, report.rows, report.steps) == (4, 4, 2)


def test_augmented_batches_change_films_masks_and_words_together_and_repeat(
    data_folder: Path, tokenizer: PromptTokenizer
) -> None:
    data = loop.load_training_set(of_split(read_flat(data_folder), "train"), tokenizer, SMALL)
    flipping = SMALL.model_copy(update={"augmentation": Augmentation(flip_share=1.0)})
    plain, flipped, again = (
        list(loop._draw_batches(data, tokenizer, config)) for config in (SMALL, flipping, flipping)
    )
    mirrored = {tuple(tokenizer.encode(mirror(text) or "", 32)) for text in data.texts}
    for one, other, same in zip(plain, flipped, again, strict=True):
        assert torch.allclose(other[0], one[0].flip(-1), atol=1e-5)
        assert torch.equal(other[2], one[2].flip(-1))
        assert {tuple(row) for row in other[1].flatten(0, 1).tolist()} <= mirrored
        assert not torch.equal(other[1], one[1])
        assert all(map(torch.equal, other, same))


def test_an_augmented_training_repeats_itself_and_differs_from_the_plain_one(data_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[augmentation]\nflip_share = 0.5\nrotation_degrees = 5.0\nscale = 0.1\ngain = 0.1\ngamma = 0.1\n"
    )
    wide = TrainConfig.from_toml(recipe).augmentation
    assert wide.rotation_degrees == 5.0
    losses = [
        train(SMALL.model_copy(update={"augmentation": chosen}), data_folder, tmp_path / "m").last_loss
        for chosen in (wide, wide, Augmentation())
    ]
    assert losses[0] == losses[1] != losses[2]


def test_masks_are_brought_to_the_networks_size(data_folder: Path, tokenizer: PromptTokenizer) -> None:
    data = loop.load_training_set(of_split(read_flat(data_folder), "train"), tokenizer, SMALL)
    half = loop.load_training_set(
        of_split(read_flat(data_folder), "train"), tokenizer, SMALL.model_copy(update={"image_size": 32})
    )
    assert half.images.shape == (4, 3, 32, 32)
    share = data.masks.reshape(8, 32, 2, 32, 2).mean(axis=(2, 4))
    assert np.array_equal(half.masks, share > 0.5)


def test_cut_prompts_are_counted(data_folder: Path, tmp_path: Path) -> None:
    report = train(SMALL.model_copy(update={"prompt_length": 8}), data_folder, tmp_path / "m")
    assert report.cut_prompts == 8


def test_a_loss_that_is_no_number_stops_the_training_without_a_checkpoint(data_folder: Path, tmp_path: Path) -> None:
    wild = SMALL.model_copy(update={"learning_rate": 1e30, "epochs": 4, "warmup": 0.0})
    with pytest.raises(UsageError, match="Lower learning_rate"):
        train(wild, data_folder, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_are_refused(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 images, fewer than images_per_batch = 8"):
        train(TrainConfig(image_size=64), data_folder, tmp_path / "m")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_published_recipes_are_valid(recipe: Path) -> None:
    TrainConfig.from_toml(recipe)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1", "learning_rat: Extra inputs"),
        ("epochs = 0", "epochs: Input should be greater than 0"),
        ("image_size = 100", "not a positive multiple of 32"),
        ("mode = 'joint'", "mode: Input should be 'off'"),
        ("epochs 3", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_toml(tmp_path / "recipe.toml")


def test_the_predictor_answers_in_the_pictures_own_size(data_folder: Path, tokenizer: PromptTokenizer) -> None:
    model = CausalCLIPSeg(TINY)
    predict = loop.torch_predictor(model, tokenizer, SMALL)
    pixels = np.asarray(Image.open(next((data_folder / "images").iterdir())).resize((50, 40)), np.float32) / np.float32(
        255
    )
    probability = predict(pixels, "Lower left lung.")
    assert probability.shape == (40, 50)
    assert 0 <= probability.min() <= probability.max() <= 1
    assert not model.training


@pytest.mark.slow
def test_the_tiny_model_learns_to_follow_prompts(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A short run: far from the demo's Dice, but the loss falls and the prompt already matters."""
    write_dataset(tmp_path / "data", {"train": 100, "test": 16}, (64, 64), seed=0, prompts_per_film=8)
    config = TrainConfig(
        image_size=64, epochs=10, images_per_batch=4, prompts_per_image=8, learning_rate=4e-3, tower_rate=0.3, threads=2
    )
    report = train(config, tmp_path / "data", tmp_path / "tiny.safetensors")
    assert report.last_loss < 0.3 * report.first_loss
    model = load_checkpoint(report.checkpoint).model
    scores = evaluate_dice(
        loop.torch_predictor(model, tokenizer, config), of_split(read_flat(tmp_path / "data"), "test")
    )
    assert scores.drop.low > 0.1
