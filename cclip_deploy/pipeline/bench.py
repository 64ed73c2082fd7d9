"""Bench: a bundle against the ways in which a user would run the same network, interleaved, on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import EnvironmentProblem, UsageError
from cclip_deploy.evidence.latency import Candidate, Timing, measure_interleaved, report
from cclip_deploy.evidence.process import ProcessCost, measure_command
from cclip_deploy.evidence.reference import PICTURE_PROMPTS, SHORTEST_PROMPT, drawn_films
from cclip_deploy.pipeline.bench_ours import name_of, our_candidates
from cclip_deploy.pipeline.bench_plan import BenchInputs, BenchOptions, LeftOut, Progress, with_answers_checked
from cclip_deploy.pipeline.goals import figures
from cclip_deploy.pipeline.peers import EAGER, PLAIN, SGEMM, Peers, load_network, open_plain

PROGRAM = (sys.executable, "-c", "from cclip_deploy.cli.app import main; main()")


def bench_bundle(bundle: Bundle, options: BenchOptions, on_progress: Progress = lambda _: None) -> dict[str, Any]:
    """Time every candidate in one interleaved run.

    Returns:
        The contract of `bench --json`: fingerprint, results, ratios (baseline time / candidate time, paired), and
        `not_measured`, which names what was left out and why. With `peers` also `figures` (see `goals.Figure`), `peak`
        (multiply-adds a second of a large matrix product) and `predict` (what one costs in a process of its own).

    Raises:
        ParityError: one of our own candidates does not compute what PyTorch does.
    """
    if bundle.manifest.form != "deploy":
        raise UsageError(f"{bundle.path} is a plain export. Bench a deploy bundle and give this one as --plain.")
    left_out: LeftOut = [
        {"name": f"{engine.graph} {engine.precision} on {engine.backend}", "reason": "engines run on a GPU only"}
        for engine in bundle.manifest.engines
        if engine.backend not in options.backends()
    ]
    processes = _predict_alone(bundle, options, left_out, on_progress) if options.peers else {}
    with _candidates(bundle, options, left_out, on_progress) as candidates:
        on_progress(f"Timing {len(candidates)} candidates, {options.threads} threads")
        timings = measure_interleaved(
            candidates,
            options.rounds,
            options.warmup_rounds,
            options.seed,
            on_round=lambda done, total: on_progress(f"Round {done} of {total}"),
            budget_seconds=options.budget_seconds,
        )
        present = [c.name for c in candidates if c.name in (EAGER, PLAIN)]
        baselines = present or [c.name for c in candidates if c.name == name_of("fused", "fp32", options.backend)]
        result = report(candidates, timings, baselines, options.seed)
    result |= {"threads": options.threads, "bundle": str(bundle.path), "not_measured": left_out}
    return {**result, **_beside_peers(bundle, options, candidates, timings, processes)} if options.peers else result


def _beside_peers(
    bundle: Bundle,
    options: BenchOptions,
    candidates: list[Candidate],
    timings: Mapping[str, Timing],
    processes: Mapping[str, ProcessCost],
) -> dict[str, Any]:
    shown = figures(bundle.manifest, candidates, timings, processes, options.seed)
    product = next(candidate for candidate in candidates if candidate.name == SGEMM)
    seconds = float(np.median(timings[SGEMM].samples_ms)) / 1e3
    return {
        "network": {"name": bundle.manifest.model["name"], "image_hw": list(bundle.manifest.image_hw)},
        "figures": [figure.to_dict() for figure in shown],
        "peak": {"name": SGEMM, "multiply_adds_per_second": float(str(product.extra["multiply_adds"])) / seconds},
        "predict": {backend: cost.to_dict() for backend, cost in processes.items()},
    }


@contextmanager
def _candidates(bundle: Bundle, options: BenchOptions, left_out: LeftOut, tell: Progress) -> Iterator[list[Candidate]]:
    inputs = BenchInputs.for_bundle(bundle, options)
    peers = Peers(inputs, options, left_out, tell)
    with tempfile.TemporaryDirectory(prefix="cclip-bench-") as scratch, ExitStack() as stack:
        candidates = our_candidates(bundle, inputs, options, left_out, stack)
        network = None
        if options.checkpoint is None:
            left_out += [{"name": name, "reason": "needs --checkpoint"} for name in (EAGER, "torch.compile")]
        else:
            network = load_network(bundle, options)
            candidates += peers.of_pytorch(network)
        plain = open_plain(bundle, options, Path(scratch), tell)
        if plain is None:
            left_out.append({"name": PLAIN, "reason": "needs --checkpoint or --plain"})
        else:
            candidates += peers.of_plain_export(plain)
        if network is not None:
            if options.peers:
                candidates += peers.of_openvino_conversion(network)
            tell("Comparing every candidate's answer with PyTorch's")
            truth = peers.answer_of(network)
            candidates = with_answers_checked(candidates, truth, left_out)
        yield [*candidates, peers.of_machine()] if options.peers else candidates


def _predict_command(bundle: Bundle, film: Path, backend: str, options: BenchOptions) -> list[str]:
    length, tokenizer = bundle.manifest.prompt_length, bundle.tokenizer()
    prompt = next(p for p in (*PICTURE_PROMPTS, SHORTEST_PROMPT) if len(tokenizer.ids(p)) <= length)
    return [
        *PROGRAM, "predict", str(bundle.path), str(film), "--prompt", prompt, "-o", str(film.parent / "masks"),
        "--threads", str(options.threads), "--backend", backend, "--json",
    ]  # fmt: skip


def _predict_alone(bundle: Bundle, options: BenchOptions, left_out: LeftOut, tell: Progress) -> dict[str, ProcessCost]:
    from PIL import Image

    found: dict[str, ProcessCost] = {}
    with tempfile.TemporaryDirectory(prefix="cclip-bench-") as folder:
        film = Path(folder) / "film.png"
        Image.fromarray((drawn_films(bundle.manifest.image_hw)[0] * 255).round().astype(np.uint8)).save(film)
        for backend in options.backends():
            tell(f"Timing predict in a process of its own, {backend}")
            try:
                found[backend] = measure_command(_predict_command(bundle, film, backend, options))
            except EnvironmentProblem as error:
                left_out.append({"name": f"predict, {backend}", "reason": str(error)})
    return found
