"""Engine profiles: TOML files that describe how the engines of a target are built and run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.toml_file import StrictModel, read_toml
from cclip_deploy.engines.build import SERVED, BuildOptions
from cclip_deploy.graph.precision.convert import InputsAndOutputs
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.tensorrt.binding import BindingName
from cclip_deploy.runtime.tensorrt.device import GpuInterface
from cclip_deploy.runtime.tensorrt.runner import MAX_STREAMS
from cclip_deploy.runtime.tensorrt.settings import Compatibility, EngineSettings


class Shapes(StrictModel):
    """Maximum and usual numbers of images and prompts; kernels are tuned for the usual ones."""

    max_batch: PositiveInt = 8
    max_prompts: PositiveInt = 16
    usual_batch: PositiveInt = 1
    usual_prompts: PositiveInt = 1
    one_alone: bool = False


class Builder(StrictModel):
    """Settings of the builder, see `EngineSettings`; `workspace_mib` limits the scratch memory of a layer."""

    workspace_mib: PositiveInt | None = None
    compute_capabilities: tuple[str, ...] = ()
    compatibility: Compatibility = "none"
    refit: bool = False
    strip_weights: bool = False
    tf32: bool = False
    effort: Annotated[int, Field(ge=0, le=5)] | None = None
    timing_cache: Path | None = None


class Run(StrictModel):
    """How engines are run, see `GpuOptions` of the runner; `lanes` is the number of execution streams."""

    gpu_interface: GpuInterface = "cuda-python"
    cuda_graphs: bool = False
    lanes: Annotated[int, Field(ge=1, le=MAX_STREAMS)] = 1


class EngineProfile(StrictModel):
    """Engines for one target: backend, precision, graphs, sizes, and how they are built and run."""

    name: str
    why: str
    backend: BindingName
    precision: Precision
    graphs: tuple[str, ...] = SERVED
    keep: tuple[str, ...] = ()
    io: InputsAndOutputs = "fp32"
    shapes: Shapes = Shapes()
    builder: Builder = Builder()
    run: Run = Run()

    def build_options(
        self, threads: int | None = None, calibration: CalibrationOptions | None = None, graphs: tuple[str, ...] = ()
    ) -> BuildOptions:
        """Return the options of `build_engines`; `graphs`, if given, replace the profile's."""
        builder = self.builder
        return BuildOptions(
            precision=self.precision,
            backend=self.backend,
            graphs=graphs or self.graphs,
            threads=threads,
            calibration=calibration,
            keep=self.keep,
            io=self.io,
            workspace_bytes=builder.workspace_mib and builder.workspace_mib * 2**20,
            settings=EngineSettings(
                compute_capabilities=builder.compute_capabilities,
                compatibility=builder.compatibility,
                refit=builder.refit,
                strip_weights=builder.strip_weights,
                tf32=builder.tf32,
                effort=builder.effort,
                timing_cache=builder.timing_cache,
            ),
            gpu_interface=self.run.gpu_interface,
            **self.shapes.model_dump(),
        )


def read_profile(path: Path) -> EngineProfile:
    """Read a profile; raise DataError if there is none, or UsageError that names an unknown, missing or invalid key."""
    absent = f"There is no engine profile {path}. Examples are in engines/profiles/."
    return read_toml(path, EngineProfile, absent)
