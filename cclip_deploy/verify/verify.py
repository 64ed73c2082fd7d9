"""Verify a bundle: checksums, parity of every graph with PyTorch, and the precision of every engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.bundle import CHAIN, Bundle
from cclip_deploy.bundle.manifest import graph_key
from cclip_deploy.common.threads import set_torch_threads
from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.reading import find_images
from cclip_deploy.inference.spec import chain_precisions
from cclip_deploy.parity.compare import Check, can_chain, check_graphs, plain_batch, without_useful_masks
from cclip_deploy.parity.reference import Reference, load_references
from cclip_deploy.parity.stages import check_tokenizer_file, mask_stage_checks, stage_checks
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.quantization.record import read_record
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.registry import BackendConfig, OpenBackend, opened, precisions_to_run
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend
from cclip_deploy.verify.derivation import derivation_checks
from cclip_deploy.verify.engine_proof import engine_checks

if TYPE_CHECKING:
    from cclip_deploy.model.checkpoint import LoadedCheckpoint

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Verification:
    """The result: all checks, notes on their limits, and what ran in each precision."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    ran: tuple[dict[str, Any], ...] = ()
    not_verified: tuple[dict[str, str], ...] = ()
    """The graphs that the backend cannot run, with the reason."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of `verify --json`."""
        return {
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            "notes": list(self.notes),
            "ran": list(self.ran),
            "not_verified": list(self.not_verified),
        }


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify. With `checkpoint`, references are computed again; `pictures` and `prompts` need it."""

    checkpoint: Path | None = None
    pictures: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()
    threads: int | None = None
    choice: BackendConfig = field(default_factory=BackendConfig)


def verify_bundle(bundle: Bundle, options: VerifyOptions, on_progress: Progress = lambda _: None) -> Verification:
    """Check all checksums, every graph in every precision, and the proof of every engine's precision.

    Raises:
        BundleError: a file was altered, a graph or engine is not listed, or a graph is not one that export writes.
        UsageError: images or prompts were given without a checkpoint.
    """
    on_progress("Checking checksums")
    strays = bundle.check_all()
    for entry in bundle.manifest.graphs.values():
        read_checked(bundle, entry)
    references, notes, checks = _references(bundle, options, on_progress)
    checks += stage_checks(bundle, references)
    config = replace(options.choice, threads=options.threads)
    run = _run_graphs(bundle, config, references, on_progress)
    derived, derivation_notes = derivation_checks(bundle, references, on_progress)
    engines, engine_notes = engine_checks(bundle)
    # The first failed check is the one that is reported, so causes come before consequences.
    checks += [check for check in run.checks if check.precision == "fp32"] + derived
    checks += [check for check in run.checks if check.precision != "fp32"] + engines
    notes += run.notes + derivation_notes + engine_notes + _calibration_notes(bundle)
    notes += _rounding_notes(bundle, run.ran)
    if strays:
        notes.append(f"{', '.join(strays)} have no checksum and are not loaded.")
    notes += _reference_notes(references)
    notes += [
        f"{engine.file} was checked by the record of its build, not run: that needs a GPU and --backend "
        f"{engine.backend}."
        for engine in bundle.manifest.engines
        if engine.file not in run.engines
    ]
    not_verified = tuple(
        {"graph": name, "backend": config.backend, "reason": run.not_run[graph.precision]}
        for name, graph in bundle.manifest.graphs.items()
        if graph.precision in run.not_run
    )
    return Verification(tuple(checks), tuple(notes), tuple(run.ran), not_verified)


@dataclass
class _Run:
    """Checks of the graphs that a backend ran, by precision."""

    not_run: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ran: list[dict[str, Any]] = field(default_factory=list)
    engines: set[str] = field(default_factory=set)


def _run_graphs(bundle: Bundle, config: BackendConfig, references: Sequence[Reference], on_progress: Progress) -> _Run:
    precisions, not_run = precisions_to_run(config, bundle)
    run = _Run(not_run)
    for precision in precisions:
        with opened(config, bundle, precision, _has_onnx()) as found:
            graphs = _graphs_of(bundle, found)
            on_progress(f"Comparing {precision} graphs on {found.ran}: {', '.join(graphs)}")
            with_chain = can_chain(bundle.manifest, precision) and _runs_chain(found)
            run.checks += check_graphs(found.backend, graphs, references, plain_batch(bundle.manifest), with_chain)
            if with_chain:
                run.checks += mask_stage_checks(bundle, found.backend, references)
            chain = chain_precisions(found.backend, bundle) if with_chain else {}
            chain |= dict.fromkeys(graphs, precision)
            run.ran.append({**found.to_dict(), "graphs": chain})
            run.notes += found.notes(chain)
            if isinstance(found.backend, TensorRtBackend):
                run.engines |= {entry.file for entry in found.backend.entries}
    return run


def _has_onnx() -> bool:
    return importlib.util.find_spec("onnx") is not None


def _graphs_of(bundle: Bundle, found: OpenBackend) -> list[str]:
    """Return the graphs of the backend's precision that it can run."""
    backend = found.backend
    if isinstance(backend, TensorRtBackend):
        return [entry.graph for entry in backend.entries if entry.precision == backend.precision]
    return [name for name in _base_names(bundle) if graph_key(name, backend.precision) in bundle.manifest.graphs]


def _runs_chain(found: OpenBackend) -> bool:
    return not isinstance(found.backend, TensorRtBackend) or set(CHAIN) <= set(found.backend.graphs)


def _base_names(bundle: Bundle) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in bundle.manifest.graphs))


def _references(
    bundle: Bundle, options: VerifyOptions, on_progress: Progress
) -> tuple[list[Reference], list[str], list[Check]]:
    """Load or compute the references; return them with notes and with checks that need a checkpoint."""
    if options.checkpoint is None:
        if options.pictures or options.prompts:
            raise UsageError(
                "Images and prompts of your own need the network to compute references: give --checkpoint FILE too."
            )
        return load_references(bundle), [], []
    from cclip_deploy.environment.packages import require_export_packages

    require_export_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    on_progress(f"Computing references from {options.checkpoint}")
    loaded = load_checkpoint(options.checkpoint)
    notes = []
    if loaded.sha256 != bundle.manifest.checkpoint.sha256:
        notes.append(
            f"{options.checkpoint} is not the file that this bundle was exported from "
            f"({bundle.manifest.checkpoint.name}, SHA-256 {bundle.manifest.checkpoint.sha256[:12]}…)."
        )
    tokenizer = check_tokenizer_file(bundle, PromptTokenizer.from_open_clip())
    return _record_references(bundle, loaded, options), notes, [tokenizer]


def _record_references(bundle: Bundle, loaded: LoadedCheckpoint, options: VerifyOptions) -> list[Reference]:
    """Compute references from the checkpoint; only sizes and names of graphs are read from the bundle."""
    from cclip_deploy.parity.record import make_references
    from cclip_deploy.runtime.pytorch import PyTorchBackend

    if loaded.config.to_dict() != bundle.manifest.model:
        raise UsageError(
            f"{options.checkpoint} is a {loaded.config.name!r} network, the bundle has "
            f"{bundle.manifest.model['name']!r}. Use the checkpoint that it was exported from."
        )
    set_torch_threads(options.threads)
    pictures = find_images(options.pictures) if options.pictures else []
    return make_references(PyTorchBackend(loaded.model), bundle.manifest, pictures, options.prompts)


def _rounding_notes(bundle: Bundle, ran: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note on how 16-bit graphs were run on the CPU."""
    half = [name for name, graph in bundle.manifest.graphs.items() if graph.precision.has_16_bits]
    if not half or not any(row["ran"] == "onnxruntime on cpu" for row in ran):
        return []
    how = (
        "ran in FP32 arithmetic with every result rounded to 16 bits, because no CPU kernel does so"
        if _has_onnx()
        else "ran without rounding between operators, which needs the package onnx on a CPU"
    )
    return [f"{', '.join(half)} {how}."]


def _reference_notes(references: Sequence[Reference]) -> list[str]:
    """Return notes on what the references cannot show."""
    notes = []
    if not any(reference.source for reference in references):
        notes.append(
            "The references of this bundle start from tokens and normalized pixels, so tokenizer, preprocessing and "
            "threshold were not checked. Export it again, or give --checkpoint FILE."
        )
    for name in without_useful_masks(references):
        notes.append(
            f"No mask of the reference {name} covers between 2 % and 98 % of its image, so mask agreement shows little "
            "there beyond the tensor errors."
        )
    return notes


def _calibration_notes(bundle: Bundle) -> list[str]:
    """Return notes on the calibration of each quantized graph; raise BundleError for a wrong record."""
    notes = []
    for name, graph in bundle.manifest.graphs.items():
        if graph.calibration is not None:
            record = read_record(bundle, graph)
            disjoint = f"none of them is among the {record.evaluation_pictures} evaluation images"
            evaluation = disjoint if record.evaluation_pictures else "no evaluation set was given to keep separate"
            notes.append(f"{name} was calibrated on {len(record.pictures)} images ({record.method}); {evaluation}.")
    return notes
