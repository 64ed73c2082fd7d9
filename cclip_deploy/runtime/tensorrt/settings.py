"""What an engine is built with beside its graph and shapes, and which binding has which of it: asked here alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cclip_deploy.bundle.manifest import EngineTarget
from cclip_deploy.common.files import reading_problem, whole_file
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import binding_label

if TYPE_CHECKING:
    from types import ModuleType

Compatibility = Literal["none", "ampere-plus", "same-compute-capability"]
LEAST_PORTABLE = (8, 0)


@dataclass(frozen=True)
class EngineSettings:
    """Choices that do not change what an engine computes, only where, how fast and how large.

    Attributes:
        compute_capabilities: TensorRT-RTX: the GPUs to build for, such as "8.9"; none is portable from Ampere on.
        compatibility: TensorRT: other GPUs that the engine is to run on beside that of this machine.
        refit: the weights can be exchanged.
        strip_weights: the engine holds no weights; the runner takes them from the graph beside it.
        capturable: the engine takes all its memory from the caller, which TensorRT-RTX asks of one that goes into a
            CUDA graph.
        tf32: FP32 products may round their factors to 10 bits, as TensorRT does unless it is told not to.
        effort: the builder's optimization level, 0 to 5; None is the binding's own.
        timing_cache: TensorRT: a file of measured kernel times, read if it is there, and written.
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
            raise UsageError(f"A builder effort of {self.effort} does not exist. Give 0 to 5.")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise UsageError(f"A compute capability is named twice: {', '.join(self.compute_capabilities)}.")


@dataclass(frozen=True)
class TimingCacheUse:
    """SHA-256 of the timing cache that a build began with, None for an empty one, and of what it left."""

    given_sha256: str | None
    left_sha256: str


def apply_settings(config: Any, settings: EngineSettings, binding: ModuleType) -> None:
    """Put the settings in a builder's configuration; UsageError for what this binding does not have."""
    _aim(config, settings.compute_capabilities, binding)
    _widen(config, settings.compatibility, binding)
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
    """Whether a binding builds for chosen GPUs without having one, and compiles the rest on the target."""
    return hasattr(binding, "ComputeCapability")


def rtx_targets(binding: ModuleType) -> dict[str, Any]:
    """The compute capabilities that TensorRT-RTX builds for: {"8.9": ComputeCapability.SM89}."""
    members = binding.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def needs_gpu_to_build(settings: EngineSettings, binding: ModuleType) -> str:
    """The likely reason of a build that failed, as a sentence; empty where there is none."""
    if is_rtx(binding) and (settings.refit or settings.strip_weights):
        return "TensorRT-RTX needs a GPU to build an engine that is refitted or stripped. "
    return ""


def engine_target(settings: EngineSettings, binding: ModuleType, gpu: tuple[str, str] | None) -> EngineTarget | None:
    """The GPUs that an engine built so runs on; None where nobody can say.

    Args:
        settings: what it was built with.
        binding: what built it.
        gpu: name and compute capability of this machine's GPU, if there is one that could be asked.
    """
    if is_rtx(binding):
        portable = [name for name in rtx_targets(binding) if _numbers(name) >= LEAST_PORTABLE]
        return EngineTarget(compute_capabilities=settings.compute_capabilities or tuple(portable))
    if settings.compatibility == "ampere-plus":
        return EngineTarget(compute_capabilities=("8.0",), and_later=True)
    if gpu is None:
        return None
    name, capability = gpu
    own = settings.compatibility == "none"
    return EngineTarget(compute_capabilities=(capability,), gpu=name if own else None)


class TimingCache:
    """A build's timing cache: read before, attached, and written when the build has succeeded."""

    def __init__(self, path: Path, config: Any, binding: ModuleType) -> None:
        """Read the file, if there is one, and attach it.

        Raises:
            UsageError: TensorRT-RTX, which measures nothing at build.
            EnvironmentIssue: the cache belongs to another GPU or version.
            DataError: it cannot be read.
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
        """Put what the build has measured in the file, whole or not at all."""
        content = bytes(self._config.get_timing_cache().serialize())
        with whole_file(self.path) as unfinished:
            unfinished.write_bytes(content)
        return TimingCacheUse(self._given_sha256, hashlib.sha256(content).hexdigest())


def _aim(config: Any, capabilities: tuple[str, ...], binding: ModuleType) -> None:
    if not capabilities:
        return
    label = " ".join(binding_label(binding))
    if not is_rtx(binding):
        raise UsageError(f"{label} builds for the GPU of this machine only. Leave --compute-capability out.")
    known = rtx_targets(binding)
    strangers = [name for name in capabilities if name not in known]
    if strangers:
        raise UsageError(f"{label} does not build for compute capability {strangers[0]}; it has {', '.join(known)}.")
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(known[name], index)


def _widen(config: Any, compatibility: Compatibility, binding: ModuleType) -> None:
    if compatibility == "none":
        return
    label, member = " ".join(binding_label(binding)), compatibility.replace("-", "_").upper()
    if is_rtx(binding):
        raise UsageError(f"{label} is portable by itself. Name compute capabilities instead of hardware compatibility.")
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


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
