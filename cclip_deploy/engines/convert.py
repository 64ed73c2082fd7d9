"""Convert a bundle's FP32 graphs to another precision and compare them with the reference outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import CalibrationEntry, GraphEntry, Manifest, graph_key
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.graph.precision.convert import ConvertedGraph, InputsAndOutputs
from cclip_deploy.quantization.calibrate import CalibrationOptions, CalibrationSet, Progress, calibrate, choose_pictures
from cclip_deploy.quantization.record import write_record
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.verify.derivation import layer_checks

if TYPE_CHECKING:
    import onnx

    from cclip_deploy.parity.compare import Check
    from cclip_deploy.parity.reference import Reference


@dataclass(frozen=True)
class ConvertOptions:
    """Which graphs to convert, and how; `keep` and `io` are passed to `graph.precision.convert.convert_graph`."""

    precision: Precision
    graphs: tuple[str, ...]
    calibration: CalibrationOptions | None = None
    keep: tuple[str, ...] = ()
    io: InputsAndOutputs = "fp32"
    threads: int | None = None


@dataclass(frozen=True)
class ConvertedGraphs:
    """A manifest with the converted graphs, the precision of each, and the products that stay in a higher precision."""

    manifest: Manifest
    precisions: Mapping[str, Precision]
    high_precision: Mapping[str, frozenset[str]] = field(default_factory=dict)


def convert_graphs(bundle: Bundle, options: ConvertOptions, folder: Path, on_progress: Progress) -> ConvertedGraphs:
    """Write the graphs of a precision, and their calibration, to the folder of `edited_bundle`, and compare them.

    FP32 graphs are those of the bundle. In a quantized precision, a graph without anything to quantize (prompt encoder,
    mask decoder) is converted to the precision of the unquantized rest.

    Raises:
        UsageError: a quantized precision without calibration, or another one with it; a name in `keep` matches nothing.
        ParityError: a graph differs too much from the reference, or has non-finite values (the layer is named).
    """
    _check_options(options)
    for name in options.graphs:
        bundle.check(bundle.graph(name).file)
    if options.precision == "fp32" and options.io == "fp32":
        return ConvertedGraphs(bundle.manifest, dict.fromkeys(options.graphs, Precision.FP32))
    if options.precision == "fp32":
        raise UsageError("FP32 graphs have FP32 inputs and outputs; --io fp16 requires a lower precision.")
    _require_onnx(options.precision)
    _check_keep(bundle, options)
    work = _Work(bundle, options, folder, on_progress)
    for name in options.graphs:
        work.add(name)
    work.check_all_found()
    manifest = bundle.manifest.model_copy(update={"graphs": {**bundle.manifest.graphs, **work.entries}})
    _compare(bundle, folder, manifest, work, on_progress)
    return ConvertedGraphs(manifest, work.precisions, work.high_precision)


class _Work:
    """Converts graphs one by one and collects their manifest entries."""

    def __init__(self, bundle: Bundle, options: ConvertOptions, folder: Path, on_progress: Progress) -> None:
        self.bundle, self.options, self.folder, self.on_progress = bundle, options, folder, on_progress
        self.chosen: CalibrationSet | None = None
        if options.calibration is not None:
            on_progress("Choosing calibration images")
            self.chosen = choose_pictures(options.calibration)
            for line in self.chosen.describe():
                on_progress(line)
        self.entries: dict[str, GraphEntry] = {}
        self.precisions: dict[str, Precision] = {}
        self.high_precision: dict[str, frozenset[str]] = {}
        self.found: set[str] = set()

    def add(self, name: str) -> None:
        from cclip_deploy.graph.precision.convert import convert_graph, matching, products_named, tensors_to_calibrate

        model = load_model(self.bundle, name)
        precision = self.options.precision
        if Precision(precision).is_quantized and not tensors_to_calibrate(model):
            precision = Precision(precision).rest
        self.precisions[name] = precision
        if precision == "fp32":
            return
        keep = matching(model, self.options.keep)
        self.found |= keep
        ranges, calibration = self._calibrated(name, model) if Precision(precision).is_quantized else (None, None)
        self.on_progress(f"Converting {name} to {precision}")
        converted = convert_graph(model, precision, ranges, keep, self.options.io)
        self.high_precision[name] = converted.high_precision
        high = tuple(sorted(products_named(model, keep)))
        if Precision(precision).is_quantized:
            self._report_fraction(name, precision, model, converted.high_precision)
        entry = self._write(name, precision, converted, calibration)
        self.entries[graph_key(name, precision)] = entry.model_copy(update={"high_precision_nodes": high})

    def _report_fraction(self, name: str, precision: str, model: onnx.ModelProto, high: frozenset[str]) -> None:
        from cclip_deploy.graph.cost import multiply_add_fraction
        from cclip_deploy.graph.precision.convert import product_names

        fraction = multiply_add_fraction(model, product_names(model) - high, {"batch": 1, "prompts": 1})
        self.on_progress(f"{name}: {fraction:.1%} of the multiply-adds in {Precision(precision).product_type}")

    def _calibrated(self, name: str, model: onnx.ModelProto) -> tuple[dict[str, float], CalibrationEntry]:
        options = self.options.calibration
        if options is None or self.chosen is None:
            raise UsageError(f"{self.options.precision} needs calibration images: give --calibration DIR.")
        record = calibrate(self.bundle, name, model, self.chosen, options, self.options.threads, self.on_progress)
        entry = write_record(record, f"calibration/{graph_key(name, self.options.precision)}.json", self.folder)
        return record.ranges, entry

    def _write(
        self, name: str, precision: Precision, converted: ConvertedGraph, calibration: CalibrationEntry | None
    ) -> GraphEntry:
        from cclip_deploy.graph.entry import graph_entry, save_graph

        file = f"graphs/{graph_key(name, precision)}.onnx"
        (self.folder / file).unlink(missing_ok=True)
        save_graph(converted.model, self.folder / file)
        source = self.bundle.graph(name).sha256
        entry = graph_entry(converted.model, file, self.folder, source, precision)
        return entry.model_copy(update={"calibration": calibration})

    def check_all_found(self) -> None:
        precision = self.options.precision
        if Precision(precision).is_quantized and not any(
            Precision(given).is_quantized for given in self.precisions.values()
        ):
            raise UsageError(
                f"Nothing in {', '.join(self.precisions)} can be quantized. Name image_encoder too, or build in "
                f"{Precision(precision).rest}."
            )
        _check_found(self.options.keep, self.found)


def _check_keep(bundle: Bundle, options: ConvertOptions) -> None:
    """Check the names in `keep` against the FP32 graphs, before anything is calibrated or converted."""
    from cclip_deploy.graph.precision.convert import matching

    if options.keep:
        _check_found(
            options.keep, {name for g in options.graphs for name in matching(load_model(bundle, g), options.keep)}
        )


def _check_found(keep: tuple[str, ...], found: set[str]) -> None:
    if unknown := sorted(set(keep) - found):
        raise UsageError(
            f"No graph that is converted has a convolution, product or block named {', '.join(map(repr, unknown))},"
            " so it cannot stay in a higher precision."
        )


def _check_options(options: ConvertOptions) -> None:
    if Precision(options.precision).is_quantized and options.calibration is None:
        raise UsageError(f"{options.precision} needs calibration images: give --calibration DIR.")
    if options.calibration is not None and not Precision(options.precision).is_quantized:
        raise UsageError(f"{options.precision} has no scales to calibrate. Leave --calibration out, or give --int8.")


def _require_onnx(precision: str) -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise EnvironmentIssue(
            f"Making {precision} graphs needs onnx ({error}). Install: pip install 'cclip-deploy[export]'"
        ) from error


def _compare(bundle: Bundle, folder: Path, manifest: Manifest, work: _Work, on_progress: Progress) -> None:
    from cclip_deploy.parity.compare import can_chain, check_graphs, refuse_failures
    from cclip_deploy.parity.reference import load_references
    from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

    references = load_references(bundle)
    unsealed = Bundle.unsealed(folder, manifest, bundle.sums)
    checks: list[Check] = []
    for precision in dict.fromkeys(given for given in work.precisions.values() if given != "fp32"):
        on_progress(f"Comparing the {precision} graphs with PyTorch's outputs")
        graphs = [name for name, given in work.precisions.items() if given == precision]
        with_chain = precision == work.options.precision and can_chain(manifest, precision)
        backend = OnnxRuntimeBackend(unsealed, precision, "cpu", work.options.threads, rounds_as_written=True)
        for name in graphs:
            checks += layer_checks(unsealed, graph_key(name, precision), references)
        checks += check_graphs(backend, graphs, references, with_chain=with_chain)
    _check_finite(unsealed, checks, references)
    refuse_failures(checks)


def _check_finite(bundle: Bundle, checks: list[Check], references: list[Reference]) -> None:
    """Raise ParityError naming the first layer with NaN or overflow, if a graph has non-finite outputs."""
    from cclip_deploy.parity.nan_check import require_finite

    for check in checks:
        if np.isfinite(check.value) or check.graph not in bundle.manifest.graphs or check.metric == "layer_error":
            continue
        reference = next(r for r in references if r.name == check.name.split("/")[1])
        keys = (check.graph, graph_key(check.graph, Precision(check.precision).of_graph(check.graph)))
        full, low = (load_model(bundle, key) for key in keys)
        require_finite(check.graph, low, full, check.precision, reference.inputs_of(check.graph))
