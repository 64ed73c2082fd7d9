"""Training recipe: all settings of a training run, validated when the file is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from cclip_deploy.common.limits import MAX_THREADS
from cclip_deploy.common.toml_file import StrictModel, read_toml
from cclip_deploy.datasets.augmentation import Augmentation
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.model.config import CONTEXT_LENGTH, InputForm, image_hw

Mode = Literal["off", "joint", "alternating", "reversal"]
MODES: tuple[Mode, ...] = get_args(Mode)
Stage = Literal["stem", "layer1", "layer2", "layer3", "layer4", "attnpool", "text_tower"]

_Fraction = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(gt=0)]
_Threads = Annotated[int, Field(gt=0, le=MAX_THREADS)]
_Whole = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SyntheticData(StrictModel):
    """Synthetic radiographs to generate if the data folder does not exist; the same as `cclip-deploy synth` makes."""

    images: Annotated[int, Field(ge=5)] = 500
    prompts_per_image: _Count = 8
    seed: _Whole = 0


class DataSource(StrictModel):
    """Location and layout of the data set. Relative paths are resolved against the working directory."""

    folder: Path | None = None
    layout: str | None = None
    """Detected from the folder if not given."""
    subject: str | None = None
    """Regular expression that finds the patient in an image's file name."""
    allow_outside: bool = False
    """Whether the tables of the data set may name files outside its folder."""
    columns: dict[Literal["image", "mask", "prompt", "split", "patient"], str] | None = None
    """Column of a role, where its name is not known or several are; "" if the table has none."""
    encoding: str | None = None
    """Encoding of text tables, such as cp1250. Detected if not given."""
    delimiter: str | None = None
    """Delimiter of text tables: comma, semicolon, tab, pipe, or a character. Detected if not given."""
    table: str | None = None
    """File name of the table, if the folder has several."""
    mask_values: tuple[str, ...] | None = None
    """Values of mask files that are inside, such as "1", "128-255", "#ff0000" or "nonzero"."""
    synthetic: SyntheticData | None = None

    def options(self) -> DataSetOptions:
        """Return how the folder is read; raise UsageError if a value is unknown."""
        columns = {str(role): name for role, name in (self.columns or {}).items()}
        return DataSetOptions(
            self.layout, self.subject, self.allow_outside, columns, self.encoding, self.delimiter, self.table,
            self.mask_values or (),
        )  # fmt: skip


class Game(StrictModel):
    """Weights and steps of the min-max game between the maskers and the rest of the network.

    The rest minimizes `causal_weight` x L_causal + `confounding_weight` x L_confounding. In "alternating" and
    "reversal" the maskers minimize `causal_weight` x L_causal - `confounding_weight` x L_confounding (CIRL, Lv et al.,
    CVPR 2022, which also gives the default weights). Mode "off" uses only the mask budget.
    """

    causal_weight: _Weight = 0.5
    confounding_weight: _Weight = 0.5
    masks_at_one_epochs: _Whole = 0
    """Number of initial epochs in which all masks are one for both branches; CIRL uses 5."""
    masker_steps: _Count = 1
    """Masker steps after each step of the rest ("alternating")."""
    masker_rate: _Positive = 1.0
    """Factor on the maskers' learning rate, in every mode."""
    mask_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Target for the mean of each mask. Without it, the masks may all converge to one."""
    mask_budget_weight: _Weight = 1.0
    own_step_statistics: bool = True
    """Update a batch norm's running statistics only in steps that train its part of the network ("alternating").

    False updates all of them in every step, so the same batch counts more than once. Versions without this setting
    did that.
    """
    causal_statistics_only: bool = False
    """Update the running statistics of the shared 1x1 block from causal features only, as inference uses only those."""


class Devices(StrictModel):
    """Devices, processes and numeric precision, passed to Lightning Fabric."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    count: _Count = 1
    """Processes per node, each with its own device."""
    nodes: _Count = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"


class TrainConfig(StrictModel):
    """Training recipe; training/configs/ has examples. The paper gives no hyperparameters, so no default is from it."""

    model: Literal["tiny", "rn101"] = "tiny"
    mode: Mode = "off"
    """off: causal head only; joint: both heads without an adversary; alternating, reversal: the min-max game."""
    image_size: int | str = 96
    prompt_length: Annotated[int, Field(ge=3, le=CONTEXT_LENGTH)] = 32
    clip_weights: str | None = None
    """CLIP weights for both towers: an open_clip tag for RN101 or a file. Random initialization if not given."""
    start_checkpoint: Path | None = None
    """Checkpoint to fine-tune, in this project's or the published layout."""
    frozen: tuple[Stage, ...] = ()
    """Parts of the towers that are not trained, including their batch-norm statistics."""
    epochs: _Count = 12
    images_per_batch: Annotated[int, Field(ge=1)] = 8
    """Images per forward pass and process; a step uses accumulate x processes times as many."""
    prompts_per_image: _Count = 1
    """Prompts that share one pass of their image through tower and neck."""
    accumulate: _Count = 1
    """Number of passes whose gradients are accumulated for one step."""
    learning_rate: _Positive = 1e-3
    tower_rate: _Positive = 1.0
    """Factor on the towers' learning rate; use 0.1 when they start from CLIP."""
    weight_decay: _Weight = 0.01
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: decay to zero; step: one tenth after 70 % of the steps."""
    warmup: _Fraction = 0.05
    """Fraction of the steps in which the learning rate rises linearly from zero."""
    dice_weight: _Fraction = 0.5
    max_gradient_norm: _Positive = 5.0
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average (EMA) of the weights; 0 disables it. The EMA is validated and saved."""
    validate_every: _Count = 1
    """Epochs between validations, if there is a val split."""
    patience: _Count | None = None
    """Stop after this many validations without a better Dice; never if not given."""
    augmentation: Augmentation = Augmentation()
    """Random changes to images, masks and prompts."""
    game: Game = Game()
    devices: Devices = Devices()
    data: DataSource = DataSource()
    seed: _Whole = 0
    threads: _Threads = 2
    loader_threads: _Threads = 1
    cache_gib: _Weight = 4.0
    """Memory for loaded images and masks in GiB; what does not fit is read again in each epoch."""
    save_minutes: _Positive = 10.0
    """Minutes between saved states within an epoch. A state is also saved after every epoch."""

    @field_validator("image_size")
    @classmethod
    def _check_image_size(cls, value: int | str) -> int | str:
        image_hw(value)
        return value

    @model_validator(mode="after")
    def _check_batch_norm(self) -> TrainConfig:
        """Refuse a batch of one 1x1 feature map, over which a batch norm has no variance."""
        if self.images_per_batch * self.devices.count * self.devices.nodes < 2 and min(self.image_hw) < 64:
            raise ValueError("images_per_batch 1 needs an image_size of at least 64, for the batch norms")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> TrainConfig:
        if self.clip_weights is not None and self.start_checkpoint is not None:
            raise ValueError("clip_weights and start_checkpoint both set the towers' initial weights; give only one")
        return self

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the network input in pixels."""
        return image_hw(self.image_size)

    @property
    def form(self) -> InputForm:
        """Image size and prompt length, which are saved with the trained network."""
        return InputForm(self.image_hw, self.prompt_length)

    @staticmethod
    def from_toml(
        path: Path,
        data: Path | None = None,
        clip_weights: str | None = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> TrainConfig:
        """Read a recipe; `data`, `clip_weights` and `changes` (nested, as in the file) override its own values.

        Raises:
            DataError: the recipe does not exist.
            UsageError: the recipe cannot be read, or a key is unknown, out of range or contradictory.
        """
        overrides = dict(changes) if clip_weights is None else {**changes, "clip_weights": clip_weights}
        remedy = f" The keys are {', '.join(TrainConfig.model_fields)}."
        config = read_toml(path, TrainConfig, f"There is no recipe {path}. Check the path.", remedy, overrides)
        if data is None:
            return config
        return config.model_copy(update={"data": config.data.model_copy(update={"folder": data, "synthetic": None})})
