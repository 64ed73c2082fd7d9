"""Options shared by several commands, and the dataclasses of the library that they are read into.

A dataclass is an option group: `expand_groups` turns a parameter of that type into one option for each field.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from cclip_deploy.bundle import precision
from cclip_deploy.cli.console import reports_errors, set_verbosity
from cclip_deploy.common.limits import MAX_THREADS

if TYPE_CHECKING:
    from cclip_deploy.datasets.options import DataSetOptions
    from cclip_deploy.prompts.tokenizer import PromptTokenizer
    from cclip_deploy.quantization.calibrate import CalibrationOptions
    from cclip_deploy.runtime.registry import BackendConfig

Command = TypeVar("Command", bound=Callable[..., Any])

Bundle = Annotated[Path, typer.Argument(help="Bundle folder, as written by export.", show_default=False)]
Repair = Annotated[bool, typer.Option(help="Correct typing errors in prompts, as training and evaluation do.")]
OUTPUT_PANEL = "Output"
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=OUTPUT_PANEL),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress, only results.", rich_help_panel=OUTPUT_PANEL)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print a line for each item.", rich_help_panel=OUTPUT_PANEL)
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads. If no default is shown, the runtime chooses.", min=1, max=MAX_THREADS)
]
DefaultThreads = Annotated[int, typer.Option(help="CPU threads.", min=1, max=MAX_THREADS)]
Precision = Annotated[precision.Precision, typer.Option(help="Precision of the bundle's graphs or engines to run.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint of the bundle, to run the network in PyTorch.")]
ImageSize = Annotated[
    str | None, typer.Option(help="Input size: N or HxW, multiples of 32. Default: the training size, else 224.")
]
Threshold = Annotated[float | None, typer.Option(help="Probability threshold of masks. Default: the network's own.")]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Let tables name files outside the data set's folder, if you trust them."),
]


@dataclass(frozen=True)
class Runtime:
    """Options that choose the backend, the device and the number of threads."""

    backend: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="onnxruntime (the default) or openvino to run graphs, the others to run engines."),
    ] = None
    device: Annotated[
        Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"], typer.Option(help="Execution provider of ONNX Runtime.")
    ] = "cpu"
    threads: Threads = None
    allow_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-fallback", help="Use ONNX Runtime on the CPU, with a note, if the backend is unavailable."
        ),
    ] = False
    gpu_interface: Annotated[
        Literal["cuda-python", "pycuda"], typer.Option(help="For engines: package that allocates device memory.")
    ] = "cuda-python"
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="For engines: capture each input shape as a CUDA graph and replay it.")
    ] = False
    engine_cache: Annotated[
        Path | None, typer.Option(help="Folder for engines that ONNX Runtime's providers compile.")
    ] = None

    def config(self) -> BackendConfig:
        """Return these options as the library's configuration of a backend."""
        from cclip_deploy.runtime.registry import BackendConfig
        from cclip_deploy.runtime.tensorrt.runner import GpuOptions

        gpu = GpuOptions(self.gpu_interface, self.cuda_graphs)
        backend = self.backend or "onnxruntime"
        return BackendConfig(backend, self.device, self.threads, gpu, self.engine_cache, self.allow_fallback)


@dataclass(frozen=True)
class DataSets:
    """Options for reading data-set folders."""

    layout: Annotated[
        Literal["lvit", "languidemedseg", "medvlsm", "flat"] | None,
        typer.Option(help="Layout of the data set. Default: detected."),
    ] = None
    subject: Annotated[
        str | None,
        typer.Option(help="Regular expression for the patient in an image's file name, such as 'sub-S\\d+'."),
    ] = None
    allow_outside: AllowOutside = False
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Column of the image, mask, prompt, split or patient, such as mask=label; may be repeated. "
            "Default: found by name.",
        ),
    ] = None
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of text tables, such as cp1250. Default: detected.")
    ] = None
    delimiter: Annotated[
        str | None, typer.Option(help="comma, semicolon, tab, pipe, or a character. Default: detected.")
    ] = None
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="File name of the table, if the folder has several.")
    ] = None
    mask_value: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VALUE",
            help="What is inside in mask files: 1, 128-255, '#ff0000' or nonzero; may be repeated. Default: all but 0, "
            "if that is one value.",
        ),
    ] = None

    def options(self) -> DataSetOptions:
        """Return these options as the library takes them; raise UsageError if one is invalid."""
        from cclip_deploy.datasets.options import DataSetOptions, parse_columns

        return DataSetOptions(
            self.layout, self.subject, self.allow_outside, parse_columns(self.column or ()), self.encoding,
            self.delimiter, self.table, tuple(self.mask_value or ()),
        )  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Options that choose the tokenizer and the prompt length."""

    bundle: Annotated[Path | None, typer.Option(help="Bundle whose tokenizer is used. Default: open_clip's.")] = None
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens at which prompts are cut. Default: the bundle's, else 32.", min=3, max=77)
    ] = None

    def open(self) -> tuple[PromptTokenizer, int]:
        """Load the tokenizer; return it and the prompt length."""
        from cclip_deploy.inference.describe_prompt import open_tokenizer

        return open_tokenizer(self.bundle, self.prompt_length)


@dataclass(frozen=True)
class Calibration:
    """Options of the calibration of quantized precisions."""

    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration images, or a data set, whose training split is used.")
    ] = None
    calibration_method: Annotated[
        Literal["percentile", "min-max", "entropy"], typer.Option(help="How ranges are computed from values.")
    ] = "percentile"
    calibration_pictures: Annotated[int, typer.Option(help="Maximum number of calibration images.", min=1)] = 64

    def options(
        self, evaluation_set: list[Path] | None, data_sets: DataSets, **changes: Any
    ) -> CalibrationOptions | None:
        """Return these options as the library takes them; None without calibration images."""
        from cclip_deploy.quantization.calibrate import CalibrationOptions

        if not self.calibration:
            return None
        return CalibrationOptions(
            tuple(self.calibration), self.calibration_method, limit=self.calibration_pictures,
            evaluation_set=tuple(evaluation_set or ()), data_sets=data_sets.options(), **changes,
        )  # fmt: skip


RUNTIME, DATA_SETS, TOKENIZER, CALIBRATION = Runtime(), DataSets(), Tokenizer(), Calibration()
PANELS = {Runtime: "Backend", DataSets: "Data set", Tokenizer: "Tokenizer", Calibration: "Calibration"}
"""Heading of each option group in the help."""


def expand_groups(command: Command) -> Command:
    """Replace each parameter whose type is an option group by one parameter for each field of the group.

    The command still receives one instance of the group. The fields of the parameter's default value are the defaults.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        types = get_type_hints(hint, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=_with(types[field.name], rich_help_panel=PANELS[hint]),
                default=getattr(parameter.default, field.name),
            )
            for field in fields(hint)
        ]

    @functools.wraps(command)
    def expanded(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded  # type: ignore[return-value]


def with_verbosity(command: Command) -> Command:
    """Add the options -q and -v to a command; they are also accepted before it.

    The types in the help are shortened, so that names of options are complete in a terminal of 80 columns.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=_with_short_type(hints[name]), kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=_with_short_type(annotation), default=False)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]

    @functools.wraps(command)
    @reports_errors
    def with_options(quiet: bool, verbose: bool, **values: Any) -> Any:
        if quiet or verbose:
            set_verbosity(quiet, verbose)
        return command(**values)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options  # type: ignore[return-value]


_SHORT_TYPES = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}


def _with_short_type(annotation: Any) -> Any:
    """Return an annotated type whose option has a short type in the help; choices are listed in full."""
    kind = get_args(annotation)[0]
    inner = (kind, *get_args(kind), *(part for argument in get_args(kind) for part in get_args(argument)))
    plain = next((part for part in inner if isinstance(part, type) and part in _SHORT_TYPES), None)
    return annotation if plain is None else _with(annotation, metavar=_SHORT_TYPES[plain])


def _with(annotation: Any, **settings: str) -> Any:
    """Return an annotated type whose option has other settings, except for those that it has already."""
    kind, *metadata = get_args(annotation)
    options = [copy.copy(item) for item in metadata]
    for option in options:
        for name, value in settings.items():
            if isinstance(option, OptionInfo) and getattr(option, name) is None:
                setattr(option, name, value)
    return Annotated[(kind, *options)]
