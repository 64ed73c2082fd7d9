"""Bench: a bundle against the ways in which a user would run the same network, interleaved, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.bundle import Bundle, graph_key
from cclip_deploy.errors import UsageError
from cclip_deploy.evidence.latency import Candidate, measure_interleaved, report
from cclip_deploy.evidence.parity import CHAIN
from cclip_deploy.evidence.reference import seeded_inputs
from cclip_deploy.runtime.backend import Arrays
from cclip_deploy.runtime.onnx_runtime import Device, OnnxRuntimeBackend

if TYPE_CHECKING:
    from cclip_deploy.model.network import CausalCLIPSeg

Progress = Callable[[str], None]

WHOLE, PROMPT, DECODE = "image and prompt", "prompt alone", "one more prompt"


@dataclass(frozen=True)
class BenchOptions:
    """What to compare with, and for how long. The peers need the checkpoint."""

    checkpoint: Path | None = None
    plain_bundle: Path | None = None
    compile: bool = True
    device: Device = "cpu"
    threads: int = 2
    rounds: int = 30
    warmup_rounds: int = 2
    budget_seconds: float = 180.0
    seed: int = 0


def bench_bundle(bundle: Bundle, options: BenchOptions, on_progress: Progress = lambda _: None) -> dict[str, Any]:
    """Time every candidate in one interleaved run.

    Returns:
        The contract of `bench --json`: fingerprint, results, ratios (baseline time / candidate time, paired), and
        `not_measured`, which names what was left out and why.
    """
    if bundle.manifest.form != "deploy":
        raise UsageError(f"{bundle.path} is a plain export. Bench a deploy bundle and give this one as --plain.")
    with _candidates(bundle, options, on_progress) as (candidates, left_out):
        on_progress(f"Timing {len(candidates)} candidates, {options.threads} threads")
        timings = measure_interleaved(
            candidates,
            options.rounds,
            options.warmup_rounds,
            options.seed,
            on_round=lambda done, total: on_progress(f"Round {done} of {total}"),
            budget_seconds=options.budget_seconds,
        )
        peers = [c.name for c in candidates if c.name in ("pytorch eager", "plain export")]
        baselines = peers or [c.name for c in candidates if c.name == "fused fp32"]
        result = report(candidates, timings, baselines, options.seed)
    return {**result, "threads": options.threads, "bundle": str(bundle.path), "not_measured": left_out}


@contextmanager
def _candidates(
    bundle: Bundle, options: BenchOptions, on_progress: Progress
) -> Iterator[tuple[list[Candidate], list[dict[str, str]]]]:
    left_out: list[dict[str, str]] = [
        {"name": f"{engine.graph} {engine.precision} on {engine.backend}", "reason": "engines run on a GPU only"}
        for engine in bundle.manifest.engines
    ]
    candidates = _ours(bundle, options, left_out)
    with tempfile.TemporaryDirectory(prefix="cclip-bench-") as scratch:
        if options.checkpoint is None:
            left_out += [{"name": name, "reason": "needs --checkpoint"} for name in ("pytorch eager", "torch.compile")]
        else:
            candidates += _pytorch(bundle, options, left_out, on_progress)
        plain = _plain(bundle, options, Path(scratch), on_progress)
        if plain is None:
            left_out.append({"name": "plain export", "reason": "needs --checkpoint or --plain"})
        else:
            candidates.append(plain)
        yield candidates, left_out


def _ours(bundle: Bundle, options: BenchOptions, left_out: list[dict[str, str]]) -> list[Candidate]:
    image, tokens = seeded_inputs(bundle.manifest.image_hw, bundle.manifest.prompt_length)
    image, tokens = image[:1], tokens[:1]
    found = []
    for precision in bundle.precisions():
        if precision == "bf16" and options.device == "cpu":
            left_out.append({"name": "bf16 graphs", "reason": "no CPU kernel runs BF16; its widened form is no timing"})
            continue
        missing = [name for name in CHAIN if graph_key(name, precision) not in bundle.manifest.graphs]
        if missing:
            left_out.append({"name": f"{precision} graphs", "reason": f"the bundle has no {precision} {missing[0]}"})
            continue
        backend = OnnxRuntimeBackend(bundle, precision, options.device, options.threads)
        kernels: Arrays = backend.run("prompt_encoder", {"tokens": tokens})
        features: Arrays = backend.run("image_encoder", {"image": image})

        def cached(backend: OnnxRuntimeBackend = backend, kernels: Arrays = kernels) -> object:
            features = backend.run("image_encoder", {"image": image})["features"]
            return backend.run("mask_decoder", {"features": features, **kernels})

        def decode(
            backend: OnnxRuntimeBackend = backend, kernels: Arrays = kernels, features: Arrays = features
        ) -> object:
            return backend.run("mask_decoder", {"features": features["features"], **kernels})

        def prompt(backend: OnnxRuntimeBackend = backend) -> object:
            return backend.run("prompt_encoder", {"tokens": tokens})

        def fused(backend: OnnxRuntimeBackend = backend) -> object:
            return backend.run("fused", {"image": image, "tokens": tokens})

        stages = [("cached prompt", WHOLE, cached), ("prompt", PROMPT, prompt), ("one more prompt", DECODE, decode)]
        if graph_key("fused", precision) in bundle.manifest.graphs:
            stages.insert(0, ("fused", WHOLE, fused))
        found += [
            Candidate(f"{name} {precision}", backend.name, precision, stage, run, _extra(options))
            for name, stage, run in stages
        ]
    return found


def _extra(options: BenchOptions) -> dict[str, object]:
    return {"threads": options.threads, "device": options.device}


def _pytorch(
    bundle: Bundle, options: BenchOptions, left_out: list[dict[str, str]], on_progress: Progress
) -> list[Candidate]:
    from cclip_deploy.pipeline.export import require_export_packages

    require_export_packages()
    import torch

    from cclip_deploy.model.checkpoint import load_checkpoint

    if options.checkpoint is None:
        raise UsageError("PyTorch needs the weights: give --checkpoint FILE.")
    torch.set_num_threads(options.threads)
    loaded = load_checkpoint(options.checkpoint)
    if loaded.sha256 != bundle.manifest.checkpoint.sha256:
        raise UsageError(
            f"{options.checkpoint} is not the file that {bundle.path} was exported from "
            f"({bundle.manifest.checkpoint.name}), so they cannot be compared. Give that one."
        )
    model = loaded.model
    arrays = seeded_inputs(bundle.manifest.image_hw, bundle.manifest.prompt_length)
    image, tokens = (torch.from_numpy(np.ascontiguousarray(array[:1])) for array in arrays)

    def run(compute: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], object]:
        def timed() -> object:
            with torch.inference_mode():
                return compute(image, tokens)

        return timed

    extra = {**_extra(options), "device": "cpu"}
    found = [
        Candidate("pytorch eager", "pytorch", "fp32", WHOLE, run(model), extra),
        Candidate("pytorch eager, causal path", "pytorch", "fp32", WHOLE, run(model.causal_logits), extra),
    ]
    if options.compile:
        on_progress("Compiling with torch.compile")
        try:
            found.append(Candidate("torch.compile", "pytorch", "fp32", WHOLE, run(_compiled(model, run)), extra))
        except Exception as error:  # a compiler that is missing or fails is a fact to report, whatever its type
            left_out.append(
                {"name": "torch.compile", "reason": f"does not work here: {str(error).splitlines()[0][:120]}"}
            )
    else:
        left_out.append({"name": "torch.compile", "reason": "switched off"})
    return found


def _compiled(
    model: CausalCLIPSeg, run: Callable[[Callable[..., object]], Callable[[], object]]
) -> Callable[..., object]:
    import torch

    compiled: Callable[..., object] = torch.compile(model.causal_logits)
    run(compiled)()
    return compiled


def _plain(bundle: Bundle, options: BenchOptions, scratch: Path, on_progress: Progress) -> Candidate | None:
    """The plain export in ONNX Runtime: the bundle given, or one made for this run."""
    path = options.plain_bundle
    if path is None:
        if options.checkpoint is None:
            return None
        from cclip_deploy.pipeline.export import ExportOptions, export_bundle

        path = scratch / "plain.cclip"
        chosen = ExportOptions(
            bundle.manifest.image_hw, bundle.manifest.prompt_length, plain=True, threads=options.threads
        )
        export_bundle(options.checkpoint, path, chosen, "bench", lambda what: on_progress(f"Plain export: {what}"))
    plain = Bundle.open(path)
    _refuse_another_network(bundle, plain)
    backend = OnnxRuntimeBackend(plain, "fp32", options.device, options.threads)
    image, tokens = seeded_inputs(bundle.manifest.image_hw, bundle.manifest.prompt_length)
    batch = int(plain.graph("plain").inputs[0].shape[0])
    if batch != 1:
        raise UsageError(
            f"{path} has a batch of {batch}; the benchmark compares single pictures. Export it with --batch 1."
        )
    inputs: Arrays = {"image": image[:1], "tokens": tokens[:1]}
    backend.load("plain")
    return Candidate("plain export", backend.name, "fp32", WHOLE, lambda: backend.run("plain", inputs), _extra(options))


def _refuse_another_network(bundle: Bundle, plain: Bundle) -> None:
    ours, theirs = bundle.manifest, plain.manifest
    if theirs.form != "plain":
        raise UsageError(f"{plain.path} is no plain export. Make one: cclip-deploy export CHECKPOINT --plain -o PLAIN")
    facts = ("image_hw", "prompt_length")
    different = [name for name in facts if getattr(ours, name) != getattr(theirs, name)]
    if ours.checkpoint.sha256 != theirs.checkpoint.sha256:
        different.append("checkpoint")
    if different:
        raise UsageError(f"{plain.path} differs from {bundle.path} in {', '.join(different)}. Export both alike.")
