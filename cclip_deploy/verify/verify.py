"""Verify: a bundle's graphs against PyTorch's answers, recorded at export or computed afresh."""

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
from cclip_deploy.inference.segmenter import chain_precisions
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
    """All checks, what a reader must know beside them, and what ran in each precision."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    ran: tuple[dict[str, Any], ...] = ()
    not_verified: tuple[dict[str, str], ...] = ()
    """The graphs that the backend cannot run, each with the reason."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The form of `verify --json`."""
        return {
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            "notes": list(self.notes),
            "ran": list(self.ran),
            "not_verified": list(self.not_verified),
        }


@dataclass(frozen=True)
class VerifyOptions:
    """`checkpoint` computes the reference afresh; pictures and prompts of one's own need it."""

    checkpoint: Path | None = None
    pictures: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()
    threads: int | None = None
    choice: BackendConfig = field(default_factory=BackendConfig)


def verify_bundle(bundle: Bundle, options: VerifyOptions, on_progress: Progress = lambda _: None) -> Verification:
    """Check every checksum, every graph in every precision, and every engine's proof of precision.

    Raises:
        BundleError: a file was altered, is among the graphs or engines without being listed, or is a graph that no
            export makes.
        UsageError: pictures were given without a checkpoint to ask.
    """
    on_progress("Checking checksums")
    strays = bundle.check_all()
    for entry in bundle.manifest.graphs.values():
        read_checked(bundle, entry)
    references, notes, checks = _references(bundle, options, on_progress)
    checks += stage_checks(bundle, references)
    has_onnx = importlib.util.find_spec("onnx") is not None
    choice, ran, run_engines = replace(options.choice, threads=options.threads), [], set[str]()
    precisions, not_run = precisions_to_run(choice, bundle)
    outputs: list[Check] = []
    for precision in precisions:
        with opened(choice, bundle, precision, has_onnx) as found:
            graphs = _graphs_of(bundle, found)
            on_progress(f"Comparing {precision} graphs on {found.ran}: {', '.join(graphs)}")
            with_chain = can_chain(bundle.manifest, precision) and _runs_chain(found)
            outputs += check_graphs(found.backend, graphs, references, plain_batch(bundle.manifest), with_chain)
            if with_chain:
                outputs += mask_stage_checks(bundle, found.backend, references)
            chain = chain_precisions(found.backend, bundle) if with_chain else {}
            chain |= dict.fromkeys(graphs, precision)
            ran.append({**found.to_dict(), "graphs": chain})
            notes += [told for told in [found.told()] if told] + found.arithmetic_notes(chain)
            if isinstance(found.backend, TensorRtBackend):
                run_engines |= {entry.file for entry in found.backend.entries}
    derived, derivation_notes = derivation_checks(bundle, references, on_progress)
    engines, engine_notes = engine_checks(bundle)
    # The first failed check is the one that is named, so a cause comes before what follows from it.
    checks += [check for check in outputs if check.precision == "fp32"] + derived
    checks += [check for check in outputs if check.precision != "fp32"] + engines
    notes += derivation_notes + engine_notes + _calibration_notes(bundle)
    narrow = [name for name, graph in bundle.manifest.graphs.items() if "16" in graph.precision]
    if narrow and any(row["ran"] == "onnxruntime on cpu" for row in ran):
        told = (
            "ran in FP32 arithmetic with every result rounded as the graph says: no CPU kernel does so"
            if has_onnx
            else "ran without the roundings between operators, which a CPU makes only with the package onnx"
        )
        notes.append(f"{', '.join(narrow)} {told}.")
    if strays:
        notes.append(f"No checksum covers {', '.join(strays)}; nothing of it is loaded.")
    notes += _reference_notes(references)
    for engine in bundle.manifest.engines:
        if engine.file not in run_engines:
            judged = "was judged by the record of its build, not run: that needs a GPU"
            notes.append(f"{engine.file} {judged} and --backend {engine.backend}.")
    not_verified = tuple(
        {"graph": name, "backend": choice.backend, "reason": not_run[graph.precision]}
        for name, graph in bundle.manifest.graphs.items()
        if graph.precision in not_run
    )
    return Verification(tuple(checks), tuple(notes), tuple(ran), not_verified)


def _graphs_of(bundle: Bundle, found: OpenBackend) -> list[str]:
    """The graphs of this precision that the backend can run: an engine backend those that were built in it."""
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
    """References, recorded or computed afresh, with notes on them and checks that only a checkpoint allows."""
    if options.checkpoint is None:
        if options.pictures or options.prompts:
            raise UsageError(
                "Pictures and prompts of your own need the network to answer for them: give --checkpoint FILE too."
            )
        return load_references(bundle), [], []
    from cclip_deploy.environment.packages import require_export_packages

    require_export_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    on_progress(f"Computing reference answers from {options.checkpoint}")
    loaded = load_checkpoint(options.checkpoint)
    notes = []
    if loaded.sha256 != bundle.manifest.checkpoint.sha256:
        notes.append(
            f"{options.checkpoint} is not the file that this bundle was exported from "
            f"({bundle.manifest.checkpoint.name}, SHA-256 {bundle.manifest.checkpoint.sha256[:12]}…)."
        )
    tokenizer = check_tokenizer_file(bundle, PromptTokenizer.from_open_clip())
    return _record_afresh(bundle, loaded, options), notes, [tokenizer]


def _record_afresh(bundle: Bundle, loaded: LoadedCheckpoint, options: VerifyOptions) -> list[Reference]:
    """References by the checkpoint, open_clip and the trained preprocessing; of the bundle, only sizes are read."""
    from cclip_deploy.parity.record import make_references
    from cclip_deploy.runtime.pytorch import PyTorchBackend

    if loaded.config.to_dict() != bundle.manifest.model:
        raise UsageError(
            f"{options.checkpoint} is a {loaded.config.name!r} network, the bundle holds "
            f"{bundle.manifest.model['name']!r}. Give the checkpoint that it was exported from."
        )
    set_torch_threads(options.threads)
    pictures = find_images(options.pictures) if options.pictures else []
    return make_references(PyTorchBackend(loaded.model), bundle.manifest, pictures, options.prompts)


def _reference_notes(references: Sequence[Reference]) -> list[str]:
    """What the references do not show."""
    notes = []
    if not any(reference.source for reference in references):
        notes.append(
            "The references of this bundle begin with tokens and normalized pixels, so tokenizer, preprocessing and "
            "threshold were not checked. Export it again, or give --checkpoint FILE."
        )
    for name in without_useful_masks(references):
        notes.append(
            f"No {name} reference mask covers between 2 % and 98 % of its picture: there, masks say little beside the "
            "tensor errors."
        )
    return notes


def _calibration_notes(bundle: Bundle) -> list[str]:
    """What each quantized graph was calibrated with; BundleError where its record is none or another graph's."""
    notes = []
    for name, graph in bundle.manifest.graphs.items():
        if graph.calibration is not None:
            record = read_record(bundle, graph)
            apart = f"none of them among {record.evaluation_pictures} evaluation pictures"
            told = apart if record.evaluation_pictures else "no evaluation set was named to keep apart from them"
            notes.append(f"{name} was calibrated on {len(record.pictures)} pictures ({record.method}); {told}.")
    return notes
