"""The training loop: referrals in, a checkpoint out, the same one for the same seed and thread count."""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cclip_deploy.data.augment import Augmentation
from cclip_deploy.data.images import read_picture
from cclip_deploy.data.layouts import Referral, of_split, read_data_set, read_mask
from cclip_deploy.data.preprocess import Preprocessing, to_input
from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.model.config import CONFIGS, CONTEXT_LENGTH, image_hw
from cclip_deploy.train.augmented import augment_batch
from cclip_deploy.train.grouped import grouped_logits
from cclip_deploy.train.losses import dice_bce
from cclip_deploy.train.scores import Predict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cclip_deploy.model.network import CausalCLIPSeg

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(gt=0)]


class TrainConfig(BaseModel):
    """A training recipe; training/configs/ holds examples. No value here is the paper's: it gives none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["tiny", "rn101"] = "tiny"
    mode: Literal["off"] = "off"
    """Which branches train. off: the causal head alone."""
    image_size: int | str = 96
    prompt_length: Annotated[int, Field(ge=3, le=CONTEXT_LENGTH)] = 32
    epochs: _Count = 12
    images_per_batch: Annotated[int, Field(ge=2)] = 8
    prompts_per_image: _Count = 1
    """Rows of the same image that share its one pass through tower and neck."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    tower_rate: Annotated[float, Field(gt=0)] = 1.0
    """The towers' share of the learning rate; 0.1 where they start from CLIP."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: down to zero; step: a tenth after 70 % of the steps."""
    warmup: _Share = 0.05
    """Share of the steps in which the rate rises from zero."""
    dice_weight: _Share = 0.5
    max_gradient_norm: Annotated[float, Field(gt=0)] = 5.0
    augmentation: Augmentation = Augmentation()
    """Random changes to films, with their masks and words."""
    seed: Annotated[int, Field(ge=0)] = 0
    threads: _Count = 2

    @field_validator("image_size")
    @classmethod
    def _check_image_size(cls, value: int | str) -> int | str:
        image_hw(value)
        return value

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return image_hw(self.image_size)

    @staticmethod
    def from_toml(path: Path) -> TrainConfig:
        """Read a recipe; UsageError names every key that is unknown or out of range."""
        try:
            return TrainConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"Recipe {path} cannot be read: {error}. Correct it.") from error
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UsageError(f"Recipe {path}: {problems}. Keys are {', '.join(TrainConfig.model_fields)}.") from error


@dataclass(frozen=True)
class TrainProgress:
    """What a caller may show after a step."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    elapsed_s: float


@dataclass(frozen=True)
class TrainReport:
    """What a training did."""

    checkpoint: Path
    images: int
    rows: int
    cut_prompts: int
    steps: int
    first_loss: float
    last_loss: float
    """Mean over the last tenth of the steps."""
    loading_s: float
    training_s: float


@dataclass(frozen=True)
class TrainingSet:
    """All of a split in memory, ready for the network."""

    images: NDArray[np.float32]  # (N, 3, H, W), normalised
    tokens: NDArray[np.int64]  # (R, L)
    masks: NDArray[np.bool_]  # (R, H, W)
    texts: tuple[str, ...]  # R
    rows_of_image: tuple[NDArray[np.int64], ...]  # N arrays of row numbers
    cut_prompts: int


OnProgress = Callable[[TrainProgress], None]


def train(
    config: TrainConfig, data_folder: Path, out_checkpoint: Path, on_progress: OnProgress = lambda progress: None
) -> TrainReport:
    """Train on the "train" split of a data set of any layout and save the network; a stopped run leaves no checkpoint.

    Raises:
        DataError: the data set is not what it should be.
        UsageError: the loss stopped being a number.
        EnvironmentProblem: the checkpoint could not be written.
    """
    import torch

    from cclip_deploy.model.checkpoint import save_checkpoint
    from cclip_deploy.model.network import CausalCLIPSeg

    started_s = time.perf_counter()
    tokenizer = PromptTokenizer.from_open_clip()
    data = load_training_set(of_split(read_data_set(data_folder).referrals, "train"), tokenizer, config)
    loaded_s = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = CausalCLIPSeg(CONFIGS[config.model])
            losses = _run_steps(model, data, tokenizer, config, on_progress)
    finally:
        torch.set_num_threads(threads)
    save_checkpoint(model, out_checkpoint)
    return TrainReport(
        checkpoint=out_checkpoint,
        images=len(data.images),
        rows=len(data.tokens),
        cut_prompts=data.cut_prompts,
        steps=len(losses),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-math.ceil(len(losses) / 10) :])),
        loading_s=loaded_s - started_s,
        training_s=time.perf_counter() - loaded_s,
    )


def load_training_set(referrals: Sequence[Referral], tokenizer: PromptTokenizer, config: TrainConfig) -> TrainingSet:
    """Read every picture, mask and prompt once; a prompt that is too long is cut, and counted."""
    rows_of_path: dict[Path, list[int]] = {}
    for row, referral in enumerate(referrals):
        rows_of_path.setdefault(referral.image, []).append(row)
    if len(rows_of_path) < config.images_per_batch:
        raise DataError(
            f"The train split has {len(rows_of_path)} images, fewer than images_per_batch = {config.images_per_batch}. "
            "Add images or lower it."
        )
    inputs = [to_input(read_picture(path).pixels, config.image_hw, Preprocessing()) for path in rows_of_path]
    return TrainingSet(
        images=np.concatenate(inputs),
        tokens=np.stack([tokenizer.encode_cut(referral.text, config.prompt_length) for referral in referrals]),
        masks=np.stack([_fit_mask(read_mask(referral.mask), config.image_hw) for referral in referrals]),
        texts=tuple(referral.text for referral in referrals),
        rows_of_image=tuple(np.array(rows, np.int64) for rows in rows_of_path.values()),
        cut_prompts=sum(len(tokenizer.ids(referral.text)) > config.prompt_length for referral in referrals),
    )


def torch_predictor(model: CausalCLIPSeg, tokenizer: PromptTokenizer, config: TrainConfig) -> Predict:
    """How `evaluate_dice` asks a network in PyTorch; it is put into evaluation mode."""
    import torch

    from cclip_deploy.data.preprocess import to_source

    model.eval()

    def predict(pixels: NDArray[np.float32], prompt: str) -> NDArray[np.float32]:
        image = torch.from_numpy(to_input(pixels, config.image_hw, Preprocessing()))
        tokens = torch.from_numpy(tokenizer.encode(prompt, config.prompt_length))[None]
        with torch.inference_mode():
            probability = model.causal_logits(image, tokens).sigmoid()[0, 0].numpy()
        return to_source(probability, (pixels.shape[0], pixels.shape[1]))

    return predict


def learning_rate_share(step: int, steps: int, config: TrainConfig) -> float:
    """The share of the full rate at a step, counted from 0: a linear rise, then the schedule."""
    warmup_steps = round(config.warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "step":
        return 0.1 if step >= 0.7 * steps else 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _run_steps(
    model: CausalCLIPSeg, data: TrainingSet, tokenizer: PromptTokenizer, config: TrainConfig, on_progress: OnProgress
) -> list[float]:
    """All steps; returns the loss of each."""
    import torch

    optimiser = _make_optimiser(model, config)
    steps_per_epoch = len(data.images) // config.images_per_batch
    steps = config.epochs * steps_per_epoch
    losses: list[float] = []
    started_s = time.perf_counter()
    model.train()
    for step, (images, tokens, masks) in enumerate(_draw_batches(data, tokenizer, config)):
        share = learning_rate_share(step, steps, config)
        for group in optimiser.param_groups:
            group["lr"] = share * group["full_rate"]
        loss = dice_bce(grouped_logits(model, images, tokens), masks, config.dice_weight)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UsageError(f"The loss became {losses[-1]} at step {step + 1} of {steps}. Lower learning_rate.")
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimiser.step()
        elapsed_s = time.perf_counter() - started_s
        rate = share * config.learning_rate
        on_progress(TrainProgress(step + 1, steps, step // steps_per_epoch + 1, losses[-1], rate, elapsed_s))
    return losses


def _make_optimiser(model: CausalCLIPSeg, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with the towers at their own rate; what mode "off" does not train gets no gradient and stays."""
    import torch

    towers = [*model.image_tower.parameters(), *model.text_tower.parameters()]
    rest = [*model.neck.parameters(), *model.head.parameters()]
    groups = [
        {"params": towers, "full_rate": config.learning_rate * config.tower_rate},
        {"params": rest, "full_rate": config.learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _draw_batches(
    data: TrainingSet, tokenizer: PromptTokenizer, config: TrainConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every epoch all images in a new order, an incomplete batch left out: (B, 3, H, W), (B, P, L), (B, P, H, W)."""
    import torch

    rng = np.random.default_rng(config.seed)
    # A generator of its own: what is drawn for a change must not change the order of the films.
    changes_rng = np.random.default_rng([config.seed, 1])
    size, prompts = config.images_per_batch, config.prompts_per_image
    for _ in range(config.epochs):
        order = rng.permutation(len(data.images))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            rows = np.stack([np.resize(rng.permutation(data.rows_of_image[i]), prompts) for i in chosen])  # (B, P)
            images, tokens, masks = data.images[chosen], data.tokens[rows], data.masks[rows]
            if config.augmentation != Augmentation():
                texts = [tuple(data.texts[row] for row in of_image) for of_image in rows]
                images, masks, tokens = augment_batch(
                    changes_rng, config.augmentation, images, masks, texts, tokenizer, config.prompt_length
                )
            yield torch.from_numpy(images), torch.from_numpy(tokens), torch.from_numpy(masks.astype(np.float32))


def _fit_mask(mask: NDArray[np.bool_], hw: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask in the network's size: a pixel is inside where more than half of it is."""
    from PIL import Image

    if mask.shape == hw:
        return mask
    share = Image.fromarray(mask.astype(np.float32)).resize((hw[1], hw[0]), Image.Resampling.BOX)
    return np.asarray(share) > 0.5
