"""Options that several commands take, described once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cclip_deploy.common.limits import MOST_THREADS

if TYPE_CHECKING:
    from cclip_deploy.runtime.registry import BackendConfig

Bundle = Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)]
DataLayout = Annotated[
    Literal["lvit", "languidemedseg", "medvlsm", "flat"] | None,
    typer.Option("--layout", help="Read the folder as this layout; found from the folder unless given."),
]
Subject = Annotated[
    str | None,
    typer.Option("--subject", help="Regular expression for the patient in an image's name, as 'sub-S\\d+'."),
]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Tables may name files outside the data set's folder: trust them first."),
]
TokenizerBundle = Annotated[
    Path | None, typer.Option("--bundle", help="Count tokens as this bundle does; as open_clip does unless given.")
]
PromptLength = Annotated[
    int | None,
    typer.Option("--prompt-length", help="Tokens before a prompt is cut; the bundle's, or 32.", min=3, max=77),
]
Repair = Annotated[
    bool,
    typer.Option("--repair/--no-repair", help="Repair typing errors in prompts, as training and evaluation do."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="CPU threads; as many as the runtime likes unless given.", min=1, max=MOST_THREADS),
]
Device = Annotated[
    Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"], typer.Option("--device", help="ONNX Runtime's provider.")
]
BackendName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
Backend = Annotated[
    BackendName,
    typer.Option("--backend", help="What runs: graphs in ONNX Runtime or OpenVINO, or the bundle's engines."),
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="ONNX Runtime on the CPU may stand in; the report says what ran.")
]
GpuInterface = Annotated[
    Literal["cuda-python", "pycuda"], typer.Option("--gpu-interface", help="Engines: package for device memory.")
]
CudaGraphs = Annotated[bool, typer.Option("--cuda-graphs", help="Engines: capture each like run, and replay it.")]
EngineCache = Annotated[
    Path | None, typer.Option("--engine-cache", help="Folder of your own for what ONNX Runtime's providers compile.")
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="The checkpoint, where PyTorch itself is to answer.")
]


def choice(
    backend: Backend,
    device: Device,
    threads: int | None,
    allow_fallback: bool,
    gpu_interface: GpuInterface,
    cuda_graphs: bool,
    engine_cache: Path | None = None,
) -> BackendConfig:
    """The options about what runs, as the library takes them."""
    from cclip_deploy.runtime.registry import BackendConfig
    from cclip_deploy.runtime.tensorrt.runner import GpuOptions

    gpu = GpuOptions(gpu_interface, cuda_graphs)
    return BackendConfig(backend, device, threads, gpu, engine_cache, allow_fallback)
