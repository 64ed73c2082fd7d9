"""The Python bindings of TensorRT and TensorRT-RTX: which one, and the few places where they differ.

Both have the same interface, so the imported module is a parameter everywhere else. Neither has usable type stubs; what
comes out of a binding is `Any`.
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
    """Import a binding; EnvironmentIssue with the command that installs it where it is missing or cannot load."""
    if name not in _MODULES:
        raise UsageError(f"There is no TensorRT binding {name!r}. Use {' or '.join(_MODULES)}.")
    module, remedy = _MODULES[name], f"pip install 'cclip-deploy[{_EXTRAS[name]}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise EnvironmentIssue(f"The Python package of {name} is not installed. Install it: {remedy}") from error
        raise EnvironmentIssue(f"{name} lacks the module {error.name!r}. Install it again: {remedy}") from error
    except (ImportError, OSError) as error:
        raise EnvironmentIssue(f"{name} is installed but does not load: {error}. Install it again: {remedy}") from error


def binding_label(binding: ModuleType) -> tuple[str, str]:
    """Name, as `load_binding` takes it, and version of an imported binding: ("tensorrt-rtx", "1.7.1.116")."""
    names = {module: name for name, module in _MODULES.items()}
    return names.get(binding.__name__, binding.__name__), str(binding.__version__)


def network_flags(binding: ModuleType) -> int:
    """Creation flags of a strongly typed network: asked for on TensorRT 10, accepted and always on in 11 and RTX.

    Raises:
        EnvironmentIssue: a TensorRT that would choose the types by itself.
    """
    flags = binding.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    name, version = binding_label(binding)
    if name == "tensorrt" and int(version.split(".")[0]) < 10:
        raise EnvironmentIssue(f"TensorRT {version} has no strongly typed networks. Install TensorRT 10 or later.")
    return 0


def check_targets(precision: Precision, compute_capabilities: Sequence[str]) -> None:
    """Raise UsageError where a GPU of one of these compute capabilities cannot compute in the precision, or is none."""
    least = _LEAST_CAPABILITY.get(Precision(precision).product_type, (0, 0))
    for capability in compute_capabilities:
        try:
            major, minor = (int(part) for part in capability.split("."))
        except ValueError:
            raise UsageError(
                f"Compute capability {capability!r} is not a number such as 8.9. Look the GPU's up."
            ) from None
        if (major, minor) < least:
            raise UsageError(
                f"{precision.upper()} needs a GPU of compute capability {least[0]}.{least[1]} or newer; "
                f"{capability} was asked for. Build in fp16 or int8 for it."
            )


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


def numpy_type(binding: Any, dtype: Any) -> np.dtype[Any]:
    """The numpy type of an engine's input or output; UsageError for one that numpy does not have."""
    names = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}
    for name, known in names.items():
        if getattr(binding.DataType, name, None) == dtype:
            return np.dtype(known)
    raise UsageError(f"numpy has no type {dtype} to hand to an engine. Build it with --io fp32.")


def create_context(binding: Any, engine: Any, for_graphs: bool) -> tuple[Any, int]:
    """An execution context, and how many bytes of activation memory it has to be given.

    0 bytes where the binding is too old to take them from the caller: the context then has its own. `for_graphs`:
    TensorRT-RTX compiles kernels for a new shape in the background and changes over to them later, which a captured
    graph would not notice, so for one it compiles at once.
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
