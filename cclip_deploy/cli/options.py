"""Options that several commands take, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Bundle = Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)]
TokenizerBundle = Annotated[
    Path | None, typer.Option("--bundle", help="Count tokens as this bundle does; as open_clip does unless given.")
]
PromptLength = Annotated[
    int | None,
    typer.Option("--prompt-length", help="Tokens before a prompt is cut; the bundle's, or 32.", min=3, max=77),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads; as many as the runtime likes unless given.", min=1)
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where ONNX Runtime runs.")]
Backend = Annotated[Literal["onnxruntime", "openvino"], typer.Option("--backend", help="What runs the graphs.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="The checkpoint, where PyTorch itself is to answer.")
]
