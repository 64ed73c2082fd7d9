"""The training recipe: every setting of a training, checked once, where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from cclip_deploy.common.limits import MAX_THREADS
from cclip_deploy.common.toml_file import StrictModel, read_toml
from cclip_deploy.datasets.augmentation import Augmentation
from cclip_deploy.model.config import CONTEXT_LENGTH, InputForm, image_hw

Mode = Literal["off", "joint", "alternating", "reversal"]
MODES: tuple[Mode, ...] = get_args(Mode)
Stage = Literal["stem", "layer1", "layer2", "layer3", "layer4", "attnpool", "text_tower"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(gt=0)]
_Threads = Annotated[int, Field(gt=0, le=MAX_THREADS)]
_Whole = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SyntheticFilms(StrictModel):
    """Films to draw where the data folder is not there yet (`cclip-deploy synth` draws the same)."""

    images: Annotated[int, Field(ge=5)] = 500
    prompts_per_image: _Count = 8
    seed: _Whole = 0


class DataSource(StrictModel):
    """Where the data set is; a path is relative to the folder that the command runs in."""

    folder: Path | None = None
    layout: str | None = None
    """Found from the folder unless given."""
    subject: str | None = None
    """Regular expression for the patient in an image's name."""
    allow_outside: bool = False
    """Whether the data set's tables may name files outside its folder."""
    synthetic: SyntheticFilms | None = None


class Game(StrictModel):
    """The min-max game between maskers and the rest; mode "off" reads the mask budget alone.

    The rest minimizes `causal_weight` x L_causal + `confounding_weight` x L_confounding. In "alternating" and
    "reversal" the maskers minimize the same with the second sign turned (CIRL, Lv et al., CVPR 2022; its weights).
    """

    causal_weight: _Weight = 0.5
    confounding_weight: _Weight = 0.5
    masks_at_one_epochs: _Whole = 0
    """In the first so many epochs both branches see everything; CIRL has 5."""
    masker_steps: _Count = 1
    """Steps of the maskers after each step of the rest ("alternating")."""
    masker_rate: _Positive = 1.0
    """The maskers' share of the learning rate, in every mode."""
    mask_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The mean that each mask is drawn to: without it nothing keeps all masks from going to one."""
    mask_budget_weight: _Weight = 1.0
    own_step_statistics: bool = True
    """Running statistics of a batch norm follow the steps of its own player, the maskers or the rest ("alternating").

    Without it every step moves all of them, as before this setting existed: the same batch counts twice or more often.
    """
    causal_statistics_only: bool = False
    """The shared 1x1 block's running statistics follow the causal features alone, which inference sees."""


class Devices(StrictModel):
    """Where and how exactly it computes; handed to Lightning Fabric."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    count: _Count = 1
    """Processes on each node, each with a device of its own."""
    nodes: _Count = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"


class TrainConfig(StrictModel):
    """A training recipe; training/configs/ holds examples. No value here is the paper's: it gives none."""

    model: Literal["tiny", "rn101"] = "tiny"
    mode: Mode = "off"
    """off: the causal head alone; joint: both heads, no adversary; alternating, reversal: the min-max game."""
    image_size: int | str = 96
    prompt_length: Annotated[int, Field(ge=3, le=CONTEXT_LENGTH)] = 32
    clip_weights: str | None = None
    """Where the towers start: open_clip's name of weights for RN101, or a file; at random unless given."""
    start_checkpoint: Path | None = None
    """Where the whole network starts, to fine-tune it: a checkpoint of ours or of the published layout."""
    frozen: tuple[Stage, ...] = ()
    """Parts of the towers that stay as they start, batch-norm statistics too."""
    epochs: _Count = 12
    images_per_batch: Annotated[int, Field(ge=1)] = 8
    """Images of one pass of one process; a step has accumulate x processes times as many."""
    prompts_per_image: _Count = 1
    """Rows of the same image that share its one pass through tower and neck."""
    accumulate: _Count = 1
    """Passes whose gradients make one step."""
    learning_rate: _Positive = 1e-3
    tower_rate: _Positive = 1.0
    """The towers' share of the learning rate; 0.1 where they start from CLIP."""
    weight_decay: _Weight = 0.01
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: down to zero; step: a tenth after 70 % of the steps."""
    warmup: _Share = 0.05
    """Share of the steps in which the rate rises from zero."""
    dice_weight: _Share = 0.5
    max_gradient_norm: _Positive = 5.0
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average of the weights, which is then what is validated and kept; 0 is none."""
    validate_every: _Count = 1
    """Epochs between two validations, where there is a val split."""
    patience: _Count | None = None
    """Validations without a better Dice after which training stops; never unless given."""
    augmentation: Augmentation = Augmentation()
    """Random changes to films, with their masks and words."""
    game: Game = Game()
    devices: Devices = Devices()
    data: DataSource = DataSource()
    seed: _Whole = 0
    threads: _Threads = 2
    loader_threads: _Threads = 1
    cache_gib: _Weight = 4.0
    """Memory for pictures and masks that were read once; what does not fit is read again each epoch."""
    save_minutes: _Positive = 10.0
    """Between two states saved within an epoch; one is saved after each in any case."""

    @field_validator("image_size")
    @classmethod
    def _check_image_size(cls, value: int | str) -> int | str:
        image_hw(value)
        return value

    @model_validator(mode="after")
    def _check_batch_norm(self) -> TrainConfig:
        """A batch norm over one map of one pixel has no variance; smaller batches are legal from 64 pixels on."""
        if self.images_per_batch * self.devices.count * self.devices.nodes < 2 and min(self.image_hw) < 64:
            raise ValueError("images_per_batch 1 needs an image_size of at least 64, for the batch norms")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> TrainConfig:
        if self.clip_weights is not None and self.start_checkpoint is not None:
            raise ValueError("clip_weights and start_checkpoint both say where the towers start; give one")
        return self

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return image_hw(self.image_size)

    @property
    def form(self) -> InputForm:
        """What the trained network is to be fed, too."""
        return InputForm(self.image_hw, self.prompt_length)

    @staticmethod
    def from_toml(path: Path, data: Path | None = None, clip_weights: str | None = None) -> TrainConfig:
        """Read a recipe, with another data folder where given, and with CLIP's weights as a start where given.

        Raises:
            UsageError: the recipe does not exist or cannot be read, or a key is unknown, out of range or contradictory.
        """
        overrides = {} if clip_weights is None else {"clip_weights": clip_weights}
        remedy = f" Keys are {', '.join(TrainConfig.model_fields)}."
        config = read_toml(path, TrainConfig, f"There is no recipe {path}. Check the path.", remedy, overrides)
        if data is None:
            return config
        return config.model_copy(update={"data": config.data.model_copy(update={"folder": data, "synthetic": None})})
