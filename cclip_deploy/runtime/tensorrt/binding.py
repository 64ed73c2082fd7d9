"""Python bindings of TensorRT and TensorRT-RTX: import, and the differences between them.

Both have the same interface, so other modules take the imported module as a parameter. Neither has usable type stubs,
so their objects are typed as `Any`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

BindingName = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_LEAST_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}


def load_binding(name: BindingName) -> ModuleType:
    """Import a binding; raise EnvironmentIssue with the install command if it is missing or does not load."""
    if name not in _MODULES:
        raise UsageError(f"There is no TensorRT binding {name!r}. Use {' or '.join(_MODULES)}.")
    module, remedy = _MODULES[name], f"pip install 'cclip-deploy[{_EXTRAS[name]}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise EnvironmentIssue(f"The Python package of {name} is not installed. Install it: {remedy}") from error
        raise EnvironmentIssue(f"{name} lacks the module {error.name!r}. Reinstall it: {remedy}") from error
    except (ImportError, OSError) as error:
        raise EnvironmentIssue(f"{name} is installed but does not load: {error}. Reinstall it: {remedy}") from error


def capability_numbers(capability: str) -> tuple[int, ...]:
    """Return a compute capability as numbers that can be ordered: "8.9" -> (8, 9)."""
    return tuple(int(part) for part in capability.split("."))


def join_errors(messages: Sequence[str]) -> str:
    """Return the last error messages of a binding in one line."""
    return " | ".join(messages[-5:]) or "no message"


def binding_label(binding: ModuleType) -> tuple[str, str]:
    """Return name, as `load_binding` takes it, and version of an imported binding: ("tensorrt-rtx", "1.7.1.116")."""
    names = {module: name for name, module in _MODULES.items()}
    return names.get(binding.__name__, binding.__name__), str(binding.__version__)


def network_flags(binding: ModuleType) -> int:
    """Return the creation flags of a strongly typed network: a flag of TensorRT 10, the default of 11 and RTX.

    Raises:
        EnvironmentIssue: the TensorRT version has no strongly typed networks.
    """
    flags = binding.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    name, version = binding_label(binding)
    if name == "tensorrt" and int(version.split(".")[0]) < 10:
        raise EnvironmentIssue(f"TensorRT {version} has no strongly typed networks. Install TensorRT 10 or later.")
    return 0


def check_targets(precision: Precision, compute_capabilities: Sequence[str]) -> None:
    """Raise UsageError if a compute capability is invalid, or GPUs of it do not support the precision."""
    least = _LEAST_CAPABILITY.get(Precision(precision).product_type, (0, 0))
    for capability in compute_capabilities:
        try:
            major, minor = capability_numbers(capability)
        except ValueError:
            raise UsageError(f"Compute capability {capability!r} is not a version such as 8.9.") from None
        if (major, minor) < least:
            raise UsageError(
                f"{precision.upper()} needs a GPU of compute capability {least[0]}.{least[1]} or newer; "
                f"{capability} was requested. Build in fp16 or int8 for it."
            )


def make_logger(binding: Any, on_message: Callable[[str, str], None]) -> Any:
    """Return a logger that calls `on_message` with severity ("ERROR", "VERBOSE", ...) and text of every message."""

    class CallbackLogger(binding.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            binding.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            on_message(str(severity).rsplit(".", 1)[-1], message)

    return CallbackLogger()


def make_monitor(
    binding: Any, on_phase: Callable[[str, str | None, int], None], should_continue: Callable[[], bool]
) -> Any:
    """Return a progress monitor that reports each phase (name, parent's name, steps) and may cancel at each step."""

    class CallbackMonitor(binding.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            binding.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            on_phase(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return should_continue()

    return CallbackMonitor()


def numpy_type(binding: Any, dtype: Any) -> np.dtype[Any]:
    """Return the numpy type of an engine's input or output; raise UsageError if numpy has none."""
    names = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}
    for name, known in names.items():
        if getattr(binding.DataType, name, None) == dtype:
            return np.dtype(known)
    raise UsageError(f"numpy has no equivalent of the engine type {dtype}. Build the engine with --io fp32.")


def create_context(binding: Any, engine: Any, for_graphs: bool) -> tuple[Any, int]:
    """Create an execution context; return it and the size in bytes of the activation memory to pass to it.

    The size is 0 if the binding is too old to take activation memory from the caller. `for_graphs`: TensorRT-RTX
    compiles kernels for a new shape in the background and switches to them later, which a captured graph would not
    notice; for graphs it compiles immediately.
    """
    strategies = getattr(binding, "ExecutionContextAllocationStrategy", None)
    managed = getattr(strategies, "USER_MANAGED", None) if hasattr(engine, "device_memory_size_v2") else None
    kernels = getattr(binding, "DynamicShapesKernelSpecializationStrategy", None)
    if kernels is not None:
        config = engine.create_runtime_config()
        if managed is not None:
            config.set_execution_context_allocation_strategy(managed)
        if for_graphs:
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        context = engine.create_execution_context(config)
    elif managed is not None:
        context = engine.create_execution_context(managed)
    else:
        context = engine.create_execution_context()
    return context, 0 if managed is None else int(engine.device_memory_size_v2)
