"""An ONNX graph becomes a TensorRT or TensorRT-RTX engine, strongly typed, and the engine proves its precision.

The types are the graph's own: no builder flag names a precision, on any version. So one code serves TensorRT 10 and 11
and TensorRT-RTX, and an engine whose layers do not run in what was asked for is never returned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.precision import Precision, parse_precision
from cclip_deploy.errors import DataError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import (
    binding_label,
    check_targets,
    listening_logger,
    listening_monitor,
    network_flags,
)
from cclip_deploy.runtime.tensorrt.build_watch import BuildWatch, signals_cancel
from cclip_deploy.runtime.tensorrt.layers import LayerTable, prove_precision, read_layer_table
from cclip_deploy.runtime.tensorrt.settings import (
    EngineSettings,
    TimingCache,
    TimingCacheUse,
    apply_settings,
    needs_gpu_to_build,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

Dims = tuple[int, ...]
ShapeRanges = Mapping[str, tuple[Dims, Dims, Dims]]

_PRODUCT_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "EINSUM", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        shapes: for each input with dynamic sizes the smallest, the usual and the largest shape.
        workspace_bytes: upper limit of scratch memory; None leaves it to the binding.
        precision: what the graph is in, and what the engine must prove to run in.
        kept_nodes: names of products that the graph keeps out of the precision on purpose; they must run in the rest's.
        further_shapes: one more optimization profile each, for shapes that are to be tuned by themselves.
        settings: targets, caches and the like.
    """

    shapes: ShapeRanges = field(default_factory=dict)
    workspace_bytes: int | None = None
    precision: Precision = Precision.FP32
    kept_nodes: frozenset[str] = frozenset()
    further_shapes: tuple[ShapeRanges, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        parse_precision(self.precision)
        check_targets(self.precision, self.settings.compute_capabilities)
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError(f"workspace_bytes is {self.workspace_bytes}; give a positive number of bytes, or None.")
        for name, (least, usual, most) in (pair for shapes in self.profiles() for pair in shapes.items()):
            if not len(least) == len(usual) == len(most):
                raise UsageError(f"Shapes of input {name!r} differ in length: {least}, {usual}, {most}.")
            if not all(0 < a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
                raise UsageError(
                    f"Shapes of input {name!r} must be positive and ordered smallest, usual, largest: "
                    f"{least}, {usual}, {most}."
                )

    def profiles(self) -> tuple[ShapeRanges, ...]:
        """The shapes of every optimization profile; a graph without dynamic sizes needs none."""
        return tuple(shapes for shapes in (self.shapes, *self.further_shapes) if shapes)


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine whose precision was proved on its products, with what its build said."""

    engine: bytes = field(repr=False)
    layers: LayerTable = field(repr=False)
    products: frozenset[str] = field(repr=False)
    kept: frozenset[str] = field(repr=False)
    build_seconds: float
    binding: str
    binding_version: str
    log: tuple[str, ...] = field(repr=False)
    timing_cache: TimingCacheUse | None = None


def build_engine(
    graph: Path | bytes,
    options: EngineOptions,
    binding: ModuleType,
    on_progress: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Build an engine and prove that it runs in `options.precision`.

    Args:
        graph: ONNX file, read by the parser itself, or its bytes.
        options: shapes, workspace and precision.
        binding: what `load_binding` returned.
        on_progress: called with a phase and the seconds so far. What it raises cancels the build, and so does what the
            handlers of SIGINT and SIGTERM raise.

    Raises:
        DataError: the graph is missing or the parser does not take it; every complaint with its node is in the message.
        UsageError: shapes that do not fit the graph's inputs.
        EnvironmentIssue: the build itself failed.
        ParityError: the engine does not run in the precision asked for, or does not show it.
    """
    started = time.perf_counter()
    watch = BuildWatch(on_progress, started)
    with signals_cancel(watch):
        memory, products, cache_use = _build(graph, options, binding, watch)
    layers = read_layer_table(watch.messages)
    prove_precision(layers, options.precision, products, options.kept_nodes)
    name, version = binding_label(binding)
    return BuiltEngine(
        engine=bytes(memory),
        layers=layers,
        products=products,
        kept=products & options.kept_nodes,
        build_seconds=time.perf_counter() - started,
        binding=name,
        binding_version=version,
        log=tuple(watch.lines()),
        timing_cache=cache_use,
    )


def _build(
    graph: Path | bytes, options: EngineOptions, binding: ModuleType, watch: BuildWatch
) -> tuple[Any, frozenset[str], TimingCacheUse | None]:
    """The serialized engine, the names of its products, and what the timing cache did."""
    logger = listening_logger(binding, watch.note)
    builder = _start_builder(binding, logger)
    network = builder.create_network(network_flags(binding))
    watch.report("Parsing the graph")
    parser = _parse(graph, network, binding, logger)  # owns the weights, so it has to outlive the build
    watch.raise_if_cancelled()
    products = _product_names(network, binding)
    config = _configure(builder, network, options, binding)
    cache_file = options.settings.timing_cache
    cache = None if cache_file is None else TimingCache(cache_file, config, binding)
    config.progress_monitor = listening_monitor(binding, watch.phase_starts, watch.may_go_on)
    memory = builder.build_serialized_network(network, config)
    watch.raise_if_cancelled()
    if memory is None:
        hint = needs_gpu_to_build(options.settings, binding)
        raise EnvironmentIssue(
            f"{' '.join(binding_label(binding))} built no engine. {hint}It says: {watch.complaints()}"
        )
    cache_use = None if cache is None else cache.write()
    del network, cache, config, builder, parser
    return memory, products, cache_use


def _start_builder(binding: ModuleType, logger: Any) -> Any:
    try:
        return binding.Builder(logger)
    except (TypeError, RuntimeError) as error:  # how pybind11 says that the library gave no builder
        raise EnvironmentIssue(
            f"{' '.join(binding_label(binding))} does not start: {error}. It may need a GPU and its driver on this "
            "machine; TensorRT-RTX builds without."
        ) from error


def _parse(graph: Path | bytes, network: Any, binding: ModuleType, logger: Any) -> Any:
    parser = binding.OnnxParser(network, logger)
    if isinstance(graph, Path):
        if not graph.is_file():
            raise DataError(f"There is no ONNX file {graph}.")
        parsed = parser.parse_from_file(str(graph))
    else:
        parsed = parser.parse(graph)
    if parsed and network.num_outputs:
        return parser
    complaints = [_complaint(parser.get_error(index)) for index in range(parser.num_errors)]
    source = str(graph) if isinstance(graph, Path) else f"The ONNX graph ({len(graph)} bytes)"
    reasons = "; ".join(complaints) or "it has no output"
    raise DataError(f"{source} cannot be parsed by {' '.join(binding_label(binding))}: {reasons}.")


def _complaint(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return f"{where}{error.desc().strip()}"


def _configure(builder: Any, network: Any, options: EngineOptions, binding: ModuleType) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = binding.ProfilingVerbosity.DETAILED
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(binding.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    apply_settings(config, options.settings, binding)
    for ranges in options.profiles() or ({},):
        _check_shapes(inputs, ranges)
    for ranges in options.profiles():
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _check_shapes(inputs: Mapping[str, Dims], shapes: ShapeRanges) -> None:
    unknown = sorted(shapes.keys() - inputs.keys())
    if unknown:
        raise UsageError(f"Shapes were given for {', '.join(unknown)}, but the inputs are {', '.join(inputs)}.")
    for name, dims in inputs.items():
        if name not in shapes:
            if -1 in dims:
                raise UsageError(f"Input {name!r} has shape {dims} with dynamic sizes (-1). Give shapes for it.")
            continue
        for shape in shapes[name]:
            if len(shape) != len(dims) or any(d not in (-1, s) for s, d in zip(shape, dims, strict=True)):
                raise UsageError(f"Shape {shape} does not fit input {name!r}, which has shape {dims} (-1 is dynamic).")


def _product_names(network: Any, binding: ModuleType) -> frozenset[str]:
    """ONNX names of the convolutions and matrix products that depend on an input, from the parsed network.

    The same set as `product_nodes` reads from the graph, without a second copy of the weights or the onnx package.
    """
    kinds = {getattr(binding.LayerType, kind) for kind in _PRODUCT_LAYERS}
    varying = {network.get_input(index).name for index in range(network.num_inputs)}
    products = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        sources = (layer.get_input(i) for i in range(layer.num_inputs))
        if varying.isdisjoint(tensor.name for tensor in sources if tensor is not None):
            continue
        varying.update(layer.get_output(i).name for i in range(layer.num_outputs))
        if layer.type in kinds:
            products.add(layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]"))
    return frozenset(products)
