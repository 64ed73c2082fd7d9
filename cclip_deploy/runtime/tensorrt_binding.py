"""The Python bindings of TensorRT and TensorRT-RTX: which one, and the few places where they differ.

Both have the same interface, so the imported module is a parameter everywhere else. Neither has usable type stubs; what
comes out of a binding is `Any`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from cclip_deploy.errors import EnvironmentProblem, UsageError
from cclip_deploy.precisions import Precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BindingName = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_LEAST_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}


def load_binding(name: BindingName) -> ModuleType:
    """Import a binding; EnvironmentProblem with the command that installs it where it is missing or cannot load."""
    if name not in _MODULES:
        raise UsageError(f"There is no TensorRT binding {name!r}. Use {' or '.join(_MODULES)}.")
    module, remedy = _MODULES[name], f"pip install 'cclip-deploy[{_EXTRAS[name]}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise EnvironmentProblem(f"The Python package of {name} is not installed. Install it: {remedy}") from error
        raise EnvironmentProblem(f"{name} lacks the module {error.name!r}. Install it again: {remedy}") from error
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"{name} is installed but does not load: {error}. Install it again: {remedy}"
        ) from error


def binding_label(binding: ModuleType) -> tuple[str, str]:
    """Name, as `load_binding` takes it, and version of an imported binding: ("tensorrt-rtx", "1.7.1.116")."""
    names = {module: name for name, module in _MODULES.items()}
    return names.get(binding.__name__, binding.__name__), str(binding.__version__)


def network_flags(binding: ModuleType) -> int:
    """Creation flags of a strongly typed network: asked for on TensorRT 10, accepted and always on in 11 and RTX.

    Raises:
        EnvironmentProblem: a TensorRT that would choose the types by itself.
    """
    flags = binding.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    name, version = binding_label(binding)
    if name == "tensorrt" and int(version.split(".")[0]) < 10:
        raise EnvironmentProblem(f"TensorRT {version} has no strongly typed networks. Install TensorRT 10 or later.")
    return 0


def check_target(precision: Precision, compute_capability: str | None) -> None:
    """Raise UsageError where a GPU of this compute capability cannot compute in the precision, or is none."""
    if compute_capability is None:
        return
    least = next((needed for part, needed in _LEAST_CAPABILITY.items() if part in precision.split("-")), (0, 0))
    try:
        major, minor = (int(part) for part in compute_capability.split("."))
    except ValueError:
        raise UsageError(
            f"Compute capability {compute_capability!r} is not a number such as 8.9. Look the GPU's up."
        ) from None
    if (major, minor) < least:
        raise UsageError(
            f"{precision.upper()} needs a GPU of compute capability {least[0]}.{least[1]} or newer; "
            f"{compute_capability} was asked for. Build in fp16 or int8 for it."
        )


def aim_at(config: Any, compute_capability: str | None, binding: ModuleType) -> None:
    """Set the GPU that an engine is built for; UsageError where the binding cannot, or not for that one."""
    if compute_capability is None:
        return
    name, version = binding_label(binding)
    if not hasattr(config, "set_compute_capability"):
        raise UsageError(f"{name} {version} builds for the GPU of this machine only. Leave --compute-capability out.")
    known = {kind[2:-1] + "." + kind[-1]: kind for kind in binding.ComputeCapability.__members__ if kind[:2] == "SM"}
    if compute_capability not in known:
        raise UsageError(
            f"{name} {version} does not build for compute capability {compute_capability}; it has {', '.join(known)}."
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(binding.ComputeCapability, known[compute_capability]), 0)


def listening_logger(binding: Any, listen: Callable[[str, str], None]) -> Any:
    """A logger that hands on severity ("ERROR", "VERBOSE", ...) and text of every message."""

    class ListeningLogger(binding.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            binding.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            listen(str(severity).rsplit(".", 1)[-1], message)

    return ListeningLogger()


def listening_monitor(
    binding: Any, start: Callable[[str, str | None, int], None], may_go_on: Callable[[], bool]
) -> Any:
    """A progress monitor that reports each phase (name, parent's name, steps) and asks at each step to go on."""

    class ListeningMonitor(binding.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            binding.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return may_go_on()

    return ListeningMonitor()
