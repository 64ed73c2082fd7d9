"""Benchmark a bundle against the baselines in interleaved rounds."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclip_deploy.benchmark.accuracy import ReferencePairs, with_accuracy
from cclip_deploy.benchmark.baselines import Baselines, load_network, open_plain
from cclip_deploy.benchmark.bundle_candidates import bundle_candidates
from cclip_deploy.benchmark.candidate import BenchCandidate, Form
from cclip_deploy.benchmark.latency import Timing, measure_interleaved, report
from cclip_deploy.benchmark.plan import BenchInputs, BenchOptions, LeftOut, Progress
from cclip_deploy.benchmark.process import ProcessCost, measure_command, source_revision
from cclip_deploy.benchmark.targets import figures, ratio_baselines
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.parity.reference import PICTURE_PROMPTS, SHORTEST_PROMPT, synthetic_radiographs
from cclip_deploy.runtime.registry import BackendName, engine_precisions

PROGRAM = (sys.executable, "-c", "from cclip_deploy.cli.app import main; main()")


def bench_bundle(bundle: Bundle, options: BenchOptions, on_progress: Progress = lambda _: None) -> dict[str, Any]:
    """Time all candidates of a bundle in interleaved rounds.

    Returns:
        The JSON of `bench --json`: fingerprint, source (git commit), network, results, ratios (baseline time /
        candidate time, paired), and `not_measured` with the reasons. With a checkpoint also `accuracy`, the compared
        pairs. With `peers` also `figures` (see `targets.Figure`), `peak` (multiply-adds per second of a large matrix
        product; None if the bundle runs on a GPU) and `predict` (cost of `predict` in a subprocess).

    Raises:
        UsageError: the bundle is a plain export, or is not from the checkpoint or the plain bundle's network.
        EnvironmentIssue: the requested backend or device is not available.
        ParityError: a candidate of the bundle exceeds its error limit.
    """
    if bundle.manifest.form != "deploy":
        raise UsageError(f"{bundle.path} is a plain export. Give a deploy bundle, and this one with --plain.")
    left_out: LeftOut = [
        {"name": f"{engine.graph} {engine.precision} on {engine.backend}", "reason": "engines run on a GPU only"}
        for engine in bundle.manifest.engines
        if engine.backend not in options.backends()
    ]
    with _compared(bundle, options, left_out, on_progress) as compared:
        candidates = compared.candidates
        processes = measure_predict(bundle, options, left_out, on_progress) if options.peers else {}
        on_progress(f"Timing {len(candidates)} candidates, {options.threads} threads")
        timings = measure_interleaved(
            candidates,
            options.rounds,
            options.warmup_rounds,
            options.seed,
            on_round=lambda done, total: on_progress(f"Round {done} of {total}"),
            budget_seconds=options.budget_seconds,
        )
        result = report(candidates, timings, ratio_baselines(candidates))
    result |= {
        "source": source_revision(),
        "network": _network(bundle, candidates),
        "threads": options.threads,
        "seed": options.seed,
        "bundle": str(bundle.path),
        "not_measured": left_out,
    }
    if compared.pairs is not None:
        result["accuracy"] = compared.pairs.to_dict()
    return {**result, **_peer_figures(bundle, options, candidates, timings, processes)} if options.peers else result


def _network(bundle: Bundle, candidates: Sequence[BenchCandidate]) -> dict[str, Any]:
    """Return the network, its input size, and the multiply-adds of each graph for one image and one prompt."""
    manifest = bundle.manifest
    counted = {name: entry.multiply_adds for name, entry in manifest.graphs.items() if entry.precision == "fp32"}
    for candidate in candidates:
        if candidate.form is Form.PLAIN and candidate.multiply_adds is not None:
            counted["plain"] = candidate.multiply_adds
    return {
        "name": manifest.model["name"],
        "image_hw": list(manifest.image_hw),
        "prompt_length": manifest.prompt_length,
        "checkpoint_sha256": manifest.checkpoint.sha256,
        "multiply_adds": counted,
    }


def _peer_figures(
    bundle: Bundle,
    options: BenchOptions,
    candidates: Sequence[BenchCandidate],
    timings: Mapping[str, Timing],
    processes: Mapping[str, ProcessCost],
) -> dict[str, Any]:
    shown = figures(bundle.manifest, candidates, timings, processes)
    peaks = [
        {"name": c.name, "multiply_adds_per_second": c.multiply_adds / np.median(timings[c.name].samples_ms) * 1e3}
        for c in candidates
        if c.role == "machine" and c.multiply_adds
    ]
    return {
        "figures": [figure.to_dict() for figure in shown],
        "peak": peaks[0] if peaks else None,
        "predict": {backend: cost.to_dict() for backend, cost in processes.items()},
    }


@dataclass(frozen=True)
class _Compared:
    """The candidates to time, and the pairs they were compared on; None without a checkpoint."""

    candidates: list[BenchCandidate]
    pairs: ReferencePairs | None


@contextmanager
def _compared(bundle: Bundle, options: BenchOptions, left_out: LeftOut, on_progress: Progress) -> Iterator[_Compared]:
    inputs = BenchInputs.for_bundle(bundle, options)
    with tempfile.TemporaryDirectory(prefix="cclip-bench-") as scratch, ExitStack() as stack:
        candidates = bundle_candidates(bundle, inputs, options, left_out, stack)
        on_cpu = any(candidate.device == "cpu" for candidate in candidates)
        baselines = Baselines(inputs, options, left_out, on_progress, on_cpu)
        network = None
        if options.checkpoint is None:
            left_out += [{"name": str(name), "reason": "needs --checkpoint"} for name in (Form.EAGER, Form.COMPILED)]
        else:
            network = load_network(bundle, options)
            candidates += baselines.of_pytorch(network)
        plain = open_plain(bundle, options, Path(scratch), on_progress)
        if plain is None:
            left_out.append({"name": str(Form.PLAIN), "reason": "needs --checkpoint or --plain"})
        else:
            candidates += baselines.of_plain_export(plain)
        pairs = None
        if network is not None:
            if options.peers:
                candidates += baselines.of_openvino_conversion(network)
            on_progress("Comparing every candidate with PyTorch")
            pairs = ReferencePairs.of(bundle, network)
            candidates = with_accuracy(candidates, pairs, inputs, baselines.answer_of(network), left_out)
        yield _Compared([*candidates, *([baselines.of_machine()] if options.peers and on_cpu else [])], pairs)


def _predict_command(bundle: Bundle, image: Path, backend: BackendName, options: BenchOptions) -> list[str]:
    precision = engine_precisions(bundle, backend)[0] if options.choice_of(backend).runs_engines else "fp32"
    length, tokenizer = bundle.manifest.prompt_length, bundle.tokenizer()
    prompt = next(p for p in (*PICTURE_PROMPTS, SHORTEST_PROMPT) if len(tokenizer.ids(p)) <= length)
    return [
        *PROGRAM, "predict", str(bundle.path), str(image), "--prompt", prompt, "-o", str(image.parent / "masks"),
        "--threads", str(options.threads), "--backend", backend, "--device", options.device, "--precision", precision,
        "--json",
    ]  # fmt: skip


def measure_predict(
    bundle: Bundle, options: BenchOptions, left_out: LeftOut, on_progress: Progress
) -> dict[str, ProcessCost]:
    from PIL import Image

    found: dict[str, ProcessCost] = {}
    with tempfile.TemporaryDirectory(prefix="cclip-bench-") as folder:
        image = Path(folder) / "image.png"
        Image.fromarray((synthetic_radiographs(bundle.manifest.image_hw)[0] * 255).round().astype(np.uint8)).save(image)
        for backend in options.backends():
            on_progress(f"Timing predict in a subprocess, {backend}")
            try:
                found[backend] = measure_command(_predict_command(bundle, image, backend, options))
            except EnvironmentIssue as error:
                left_out.append({"name": f"predict, {backend}", "reason": str(error)})
    return found
