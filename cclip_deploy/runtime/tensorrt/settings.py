"""Build settings of engines beyond graph and shapes, and which of them each binding supports."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cclip_deploy.bundle.manifest import EngineTarget
from cclip_deploy.common.files import reading_problem, whole_file
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import binding_label, capability_numbers

if TYPE_CHECKING:
    from types import ModuleType

Compatibility = Literal["none", "ampere-plus", "same-compute-capability"]
LEAST_PORTABLE = (8, 0)


@dataclass(frozen=True)
class EngineSettings:
    """Settings that affect where an engine runs, how fast and how large it is, but not what it computes.

    Attributes:
        compute_capabilities: TensorRT-RTX: target GPUs, such as "8.9"; empty builds for Ampere and later.
        compatibility: TensorRT: GPUs other than this machine's on which the engine must run.
        refit: the weights can be exchanged.
        strip_weights: the engine holds no weights; the runner takes them from the graph in the bundle.
        capturable: the engine takes all memory from the caller, which TensorRT-RTX requires for CUDA graphs.
        tf32: FP32 products may round their factors to 10 bits, which is TensorRT's default.
        effort: the builder's optimization level, 0 to 5; None is the binding's default.
        timing_cache: TensorRT: file of measured kernel times, read if it exists, and written.
    """

    compute_capabilities: tuple[str, ...] = ()
    compatibility: Compatibility = "none"
    refit: bool = False
    strip_weights: bool = False
    capturable: bool = True
    tf32: bool = False
    effort: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.effort is not None and not 0 <= self.effort <= 5:
            raise UsageError(f"The builder effort must be 0 to 5, got {self.effort}.")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise UsageError(f"A compute capability is named twice: {', '.join(self.compute_capabilities)}.")


@dataclass(frozen=True)
class TimingCacheUse:
    """SHA-256 of the timing cache before a build (None if it was empty) and after it."""

    given_sha256: str | None
    left_sha256: str


def apply_settings(config: Any, settings: EngineSettings, binding: ModuleType) -> None:
    """Apply the settings to a builder's configuration; raise UsageError for one that the binding does not support."""
    _set_targets(config, settings.compute_capabilities, binding)
    _set_compatibility(config, settings.compatibility, binding)
    for wanted, flag in ((settings.refit, "REFIT"), (settings.strip_weights, "STRIP_PLAN")):
        if wanted:
            config.set_flag(_flag(binding, flag))
    if not settings.tf32:
        config.clear_flag(binding.BuilderFlag.TF32)
    if settings.capturable and hasattr(binding.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(binding.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.effort is not None:
        config.builder_optimization_level = settings.effort


def is_rtx(binding: ModuleType) -> bool:
    """Return whether a binding is TensorRT-RTX: it builds for chosen GPUs without one, and compiles on the target."""
    return hasattr(binding, "ComputeCapability")


def rtx_targets(binding: ModuleType) -> dict[str, Any]:
    """The compute capabilities that TensorRT-RTX builds for: {"8.9": ComputeCapability.SM89}."""
    members = binding.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def needs_gpu_to_build(settings: EngineSettings, binding: ModuleType) -> str:
    """Return the likely reason for a failed build as a sentence, or an empty string."""
    if is_rtx(binding) and (settings.refit or settings.strip_weights):
        return "TensorRT-RTX needs a GPU to build an engine that is refitted or stripped. "
    return ""


def engine_target(settings: EngineSettings, binding: ModuleType, gpu: tuple[str, str] | None) -> EngineTarget | None:
    """Return the GPUs on which an engine with these settings runs, or None if that is unknown.

    Args:
        settings: of the build.
        binding: that built it.
        gpu: name and compute capability of this machine's GPU, if it has one.
    """
    if is_rtx(binding):
        portable = [name for name in rtx_targets(binding) if capability_numbers(name) >= LEAST_PORTABLE]
        return EngineTarget(compute_capabilities=settings.compute_capabilities or tuple(portable))
    if settings.compatibility == "ampere-plus":
        return EngineTarget(compute_capabilities=("8.0",), and_later=True)
    if gpu is None:
        return None
    name, capability = gpu
    own = settings.compatibility == "none"
    return EngineTarget(compute_capabilities=(capability,), gpu=name if own else None)


class TimingCache:
    """Timing cache of a build: read before it, and written after it has succeeded."""

    def __init__(self, path: Path, config: Any, binding: ModuleType) -> None:
        """Read the file, if it exists, and attach it to the configuration.

        Raises:
            UsageError: the binding is TensorRT-RTX, which measures nothing at build.
            EnvironmentIssue: the cache belongs to another GPU or version.
            DataError: the file cannot be read.
        """
        if is_rtx(binding) or not hasattr(config, "create_timing_cache"):
            raise UsageError(
                f"{' '.join(binding_label(binding))} has no timing cache: it measures nothing at build. Leave it out."
            )
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise reading_problem(path, error) from error
        self.path = path
        self._config = config
        self._given_sha256 = hashlib.sha256(content).hexdigest() if content else None
        self._cache = config.create_timing_cache(content)
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            raise EnvironmentIssue(
                f"The timing cache {path} was not made with this GPU and {' '.join(binding_label(binding))}. "
                "Name another file, or delete it."
            )

    def write(self) -> TimingCacheUse:
        """Write the cache after the build, atomically."""
        content = bytes(self._config.get_timing_cache().serialize())
        with whole_file(self.path) as unfinished:
            unfinished.write_bytes(content)
        return TimingCacheUse(self._given_sha256, hashlib.sha256(content).hexdigest())


def check_buildable(capabilities: tuple[str, ...], binding: ModuleType) -> None:
    """Raise UsageError where the builder cannot build for one of these compute capabilities."""
    if not capabilities:
        return
    label = " ".join(binding_label(binding))
    if not is_rtx(binding):
        raise UsageError(f"{label} builds for the GPU of this machine only. Leave --compute-capability out.")
    known = rtx_targets(binding)
    unknown = [name for name in capabilities if name not in known]
    if unknown:
        raise UsageError(f"{label} does not build for compute capability {unknown[0]}; it supports {', '.join(known)}.")


def _set_targets(config: Any, capabilities: tuple[str, ...], binding: ModuleType) -> None:
    check_buildable(capabilities, binding)
    if not capabilities:
        return
    known = rtx_targets(binding)
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(known[name], index)


def _set_compatibility(config: Any, compatibility: Compatibility, binding: ModuleType) -> None:
    if compatibility == "none":
        return
    label, member = " ".join(binding_label(binding)), compatibility.replace("-", "_").upper()
    if is_rtx(binding):
        raise UsageError(f"{label} is portable by default. Name compute capabilities instead of a compatibility.")
    levels = binding.HardwareCompatibilityLevel
    if not hasattr(levels, member):
        raise UsageError(f"{label} has no hardware compatibility {compatibility}. Use ampere-plus, or none.")
    config.hardware_compatibility_level = getattr(levels, member)


def _flag(binding: ModuleType, name: str) -> Any:
    if not hasattr(binding.BuilderFlag, name):
        raise UsageError(
            f"{' '.join(binding_label(binding))} has no {name}. Leave it out, or use TensorRT 10 or later."
        )
    return getattr(binding.BuilderFlag, name)
