"""Engine profiles: a file that says how the engines of a machine are built and run, read strictly."""

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
from cclip_deploy.runtime.tensorrt.runner import MOST_LANES, GpuOptions
from cclip_deploy.runtime.tensorrt.settings import Compatibility, EngineSettings


class Shapes(StrictModel):
    """How many pictures and prompts at once: at most, and usually, which is what kernels are tuned for."""

    max_batch: PositiveInt = 8
    max_prompts: PositiveInt = 16
    usual_batch: PositiveInt = 1
    usual_prompts: PositiveInt = 1
    one_alone: bool = False


class Builder(StrictModel):
    """See `EngineSettings`; `workspace_mib` is the most scratch memory that a layer may take."""

    workspace_mib: PositiveInt | None = None
    compute_capabilities: tuple[str, ...] = ()
    compatibility: Compatibility = "none"
    refit: bool = False
    strip_weights: bool = False
    tf32: bool = False
    effort: Annotated[int, Field(ge=0, le=5)] | None = None
    timing_cache: Path | None = None


class Run(StrictModel):
    """See `GpuOptions`."""

    gpu_interface: GpuInterface = "cuda-python"
    cuda_graphs: bool = False
    lanes: Annotated[int, Field(ge=1, le=MOST_LANES)] = 1


class EngineProfile(StrictModel):
    """One target: which engines, in what, for which sizes, and how they are to be run there."""

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
        """What `build_engines` takes; `graphs` stand in for the profile's own."""
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

    def gpu_options(self) -> GpuOptions:
        """What the runner takes."""
        return GpuOptions(self.run.gpu_interface, self.run.cuda_graphs, self.run.lanes)


def read_profile(path: Path) -> EngineProfile:
    """Read a profile; UsageError names the key that is unknown, missing or wrong."""
    absent = f"There is no engine profile {path}. Those that come along are in engines/profiles/."
    return read_toml(path, EngineProfile, absent)
