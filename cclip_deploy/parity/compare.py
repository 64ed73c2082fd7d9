"""Compare a backend's outputs with references: tensors by their errors, masks by Dice and flipped pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import CHAIN
from cclip_deploy.bundle.manifest import Manifest, graph_key
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import ParityError
from cclip_deploy.parity.reference import Reference, expand, subsample
from cclip_deploy.runtime.backend import Backend

Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]

USEFUL_AREA = 0.02
"""A mask is useful for parity if it covers at least this fraction of the image, and leaves as much uncovered."""
FEW_PIXELS = 4
"""Number of flipped pixels in a mask that is always allowed."""

FLOAT32_NOISE = 1e-5
"""Fraction of the largest logit below which the sign of a logit is float32 noise."""

ENCODERS = {"image_encoder": "image", "prompt_encoder": "tokens"}


@dataclass(frozen=True)
class Limits:
    """Limits of a precision. Relative error is ‖a−b‖/‖b‖; max error is max|a−b| / max|b|."""

    relative_error: float
    max_error: float
    mask_dice: float
    flipped_share: float

    def allow(self, metric: str, value: float) -> bool:
        """Return whether a value is within the limit; NaN is not."""
        limit = float(getattr(self, metric))
        return value >= limit if metric == "mask_dice" else value <= limit


LIMITS = {
    "fp32": Limits(relative_error=2e-5, max_error=1e-4, mask_dice=0.999, flipped_share=1e-4),
    "fp16": Limits(relative_error=2e-2, max_error=1e-1, mask_dice=0.95, flipped_share=5e-3),
    "bf16": Limits(relative_error=1e-1, max_error=1.5e-1, mask_dice=0.9, flipped_share=4e-2),
    "int8": Limits(relative_error=3e-1, max_error=4e-1, mask_dice=0.85, flipped_share=1e-1),
    "fp8": Limits(relative_error=5e-1, max_error=8e-1, mask_dice=0.75, flipped_share=2e-1),
}
"""Limits on the recorded references, by type of the products.

Those of INT8 and FP8 are wide enough for untrained weights, whose logits are close to zero everywhere, so they only
detect broken graphs. The masks of a trained network are compared on an evaluation set when the graph is built: see
`quantization.agreement`.
"""

SEEDED_LIMITS = Limits(relative_error=1, max_error=1.5, mask_dice=0, flipped_share=0.5)
"""Limits of quantized graphs on the seeded reference. It is noise, unlike the images that ranges were calibrated on, so
most values are clipped; outputs must only be finite, of the right shape and closer than zeros."""


def limits_of(precision: str, reference: str) -> Limits:
    """Return the limits of a precision on a reference; `int8-fp16` has those of INT8."""
    if Precision(precision).is_quantized and reference == "seeded":
        return SEEDED_LIMITS
    return LIMITS[Precision(precision).product_type]


@dataclass(frozen=True)
class Check:
    """A measured value and its limit."""

    name: str
    graph: str
    backend: str
    precision: str
    metric: str
    value: float
    limit: float
    passed: bool
    detail: str | None = None
    """What differs, if known: a sentence, a field, a node."""

    def describe(self) -> str:
        """Return the name, value, limit and detail as a phrase."""
        detail = f" ({self.detail})" if self.detail else ""
        where = f"{self.name} ({self.precision})" if self.precision != "all" else self.name
        return f"{where}, {self.metric} is {self.value:.6g}, the limit is {self.limit:.6g}{detail}"

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form of `verify --json`; a value that is not finite is null."""
        return {**asdict(self), "value": self.value if math.isfinite(self.value) else None}


def relative_error(value: Floats, truth: Floats) -> float:
    """Return ‖a−b‖/‖b‖ in float64; infinite if the truth is all zeros and the value is not."""
    distance = float(np.linalg.norm(value.astype(np.float64) - truth))
    size = float(np.linalg.norm(truth.astype(np.float64)))
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def max_error(value: Floats, truth: Floats) -> float:
    """Return max|a−b| / max|b| in float64; infinite if the truth is all zeros and the value is not."""
    distance = float(np.abs(value.astype(np.float64) - truth).max())
    size = float(np.abs(truth).max())
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def masks_of(logits: Floats, truth: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both masks (logit >= 0); pixels where both logits are float32 noise around zero are made equal."""
    found, expected = logits >= 0, truth >= 0
    undecided = np.abs(truth) <= FLOAT32_NOISE * np.abs(truth).max()
    return found, np.where(undecided & (np.abs(logits) <= 2 * FLOAT32_NOISE * np.abs(truth).max()), found, expected)


def mask_dices(logits: Floats, truth: Floats) -> NDArray[np.float64]:
    """Return the Dice coefficients (B, P) between the masks of logits (B, P, H, W); 1 for two empty masks."""
    return _dices(*masks_of(logits, truth))


def _dices(found: Masks, expected: Masks) -> NDArray[np.float64]:
    shared = (found & expected).sum(axis=(2, 3))
    sizes = found.sum(axis=(2, 3)) + expected.sum(axis=(2, 3))
    return np.where(sizes == 0, 1.0, 2 * shared / np.maximum(sizes, 1))


def mask_checks(
    name: str, graph: str, backend: Backend, found: Masks, expected: Masks, limits: Limits
) -> Iterator[Check]:
    """Check masks (B, P, H, W) by the fraction of flipped pixels, and by Dice if they are large enough.

    Dice applies to masks that cover USEFUL_AREA of the image and in which FEW_PIXELS flipped pixels do not exceed the
    limit. Smaller and empty masks are checked by their number of flipped pixels: `flipped_pixels`.
    """
    flips, pixels = (found != expected).sum(axis=(2, 3)), expected[0, 0].size
    least = max(USEFUL_AREA * pixels, FEW_PIXELS / (2 * (1 - limits.mask_dice)))
    large = expected.sum(axis=(2, 3)) >= least
    share = max(limits.flipped_share, FEW_PIXELS / pixels)
    measured = {"flipped_share": (float(flips.mean() / pixels), share)}
    if large.any():
        measured["mask_dice"] = (float(_dices(found, expected)[large].min()), limits.mask_dice)
    if not large.all():
        measured["flipped_pixels"] = (float(flips[~large].max()), share * pixels)
    for metric, (value, limit) in measured.items():
        passed = value >= limit if metric == "mask_dice" else value <= limit
        yield Check(name, graph, backend.name, backend.precision, metric, value, limit, passed)


def check_graphs(
    backend: Backend,
    graphs: Iterable[str],
    references: Sequence[Reference],
    plain_batch: int = 1,
    with_chain: bool | None = None,
) -> Iterator[Check]:
    """Run each graph on every reference and yield checks of its outputs.

    Args:
        backend: runs the graphs.
        graphs: their names.
        references: inputs and expected outputs.
        plain_batch: static batch size of the plain graph, if there is one.
        with_chain: whether to run the three graphs of `CHAIN` one after another too; by default if all are in `graphs`.

    Raises:
        ParityError: an output has another shape than the reference's.
    """
    names = list(graphs)
    if with_chain is None:
        with_chain = all(graph in names for graph in CHAIN)
    for reference in references:
        for graph in names:
            yield from _check_graph(backend, graph, reference, plain_batch)
        if with_chain:
            logits = _run_chain(backend, reference)
            yield from _check_logits("chain", backend, reference, logits, reference.logits)


def can_chain(manifest: Manifest, precision: str) -> bool:
    """Return whether a bundle has all graphs of `CHAIN` for a precision."""
    return all(graph_key(name, Precision(precision).of_graph(name)) in manifest.graphs for name in CHAIN)


def plain_batch(manifest: Manifest) -> int:
    """Return the static batch size of a bundle's plain graph; 1 if there is none."""
    plain = manifest.graphs.get("plain")
    return int(plain.inputs[0].shape[0]) if plain else 1


def refuse_failures(checks: Sequence[Check]) -> None:
    """Raise ParityError if checks failed; the message names the first."""
    failed = [check for check in checks if not check.passed]
    if failed:
        first = failed[0]
        raise ParityError(
            f"{len(failed)} of {len(checks)} parity checks failed; first: {first.describe()}. Nothing was published."
        )


def without_useful_masks(references: Sequence[Reference]) -> list[str]:
    """Return the names of references without useful masks, for which mask agreement shows little."""
    return [reference.name for reference in references if not useful(reference.logits).any()]


def useful(logits: Floats) -> NDArray[np.bool_]:
    """Return which masks (B, P) cover at least USEFUL_AREA of the image and leave as much uncovered."""
    shares: NDArray[np.float64] = (logits >= 0).mean(axis=(2, 3))
    return (shares >= USEFUL_AREA) & (shares <= 1 - USEFUL_AREA)


def _check_graph(backend: Backend, graph: str, reference: Reference, plain_batch: int) -> Iterator[Check]:
    if graph in ("fused", "plain"):
        rows, tokens = reference.pairs()
        if graph == "plain":
            logits = _run_batches(backend, graph, rows, tokens, plain_batch)
        else:
            logits = backend.run(graph, {"image": rows, "tokens": tokens})["logits"]
        batch, prompts, height, width = reference.logits.shape
        truth = reference.logits.reshape(batch * prompts, 1, height, width)
        yield from _check_logits(graph, backend, reference, logits, truth)
        return
    if graph == "mask_decoder":
        logits = backend.run(graph, expand(reference.decoder_inputs))["logits"]
        yield from _check_logits(graph, backend, reference, logits, reference.outputs[graph]["logits"])
        return
    source = ENCODERS[graph]
    outputs = backend.run(graph, {source: getattr(reference, source)})
    for name, value in outputs.items():
        yield from _check_output(
            graph, backend, reference, name, _compared_part(name, value), reference.outputs[graph][name]
        )


def _compared_part(name: str, value: Floats) -> Floats:
    """Return the part of an output that references contain; NaN if any other part is not finite."""
    part = subsample(name, value)
    return part if np.isfinite(value).all() else np.full_like(part, np.nan)


def _run_batches(backend: Backend, graph: str, rows: Floats, tokens: NDArray[np.int64], batch: int) -> Floats:
    """Run a graph with a static batch size; the last batch is padded with the first rows."""
    places = np.arange(-(-len(rows) // batch) * batch).reshape(-1, batch) % len(rows)
    parts = [backend.run(graph, {"image": rows[some], "tokens": tokens[some]})["logits"] for some in places]
    return np.concatenate(parts)[: len(rows)]


def _run_chain(backend: Backend, reference: Reference) -> Floats:
    """Encode one image at a time like `Segmenter`: a backend may compile the encoder for a single image."""
    kernels = backend.run("prompt_encoder", {"tokens": reference.tokens})
    rows = [reference.image[place : place + 1] for place in range(len(reference.image))]
    features = np.concatenate([backend.run("image_encoder", {"image": row})["features"] for row in rows])
    return backend.run("mask_decoder", {"features": features, **kernels})["logits"]


def _check_output(
    graph: str, backend: Backend, reference: Reference, output: str, value: Floats, truth: Floats
) -> Iterator[Check]:
    if value.shape != truth.shape:
        raise ParityError(f"{graph} gives {output} of shape {value.shape}, the reference's is {truth.shape}.")
    measured = {"relative_error": relative_error(value, truth), "max_error": max_error(value, truth)}
    yield from _checks(graph, backend, reference, output, measured)


def _check_logits(graph: str, backend: Backend, reference: Reference, value: Floats, truth: Floats) -> Iterator[Check]:
    yield from _check_output(graph, backend, reference, "logits", value, truth)
    limits = limits_of(backend.precision, reference.name)
    yield from mask_checks(f"{graph}/{reference.name}/logits", graph, backend, *masks_of(value, truth), limits)


def _checks(
    graph: str, backend: Backend, reference: Reference, output: str, measured: Mapping[str, float]
) -> Iterator[Check]:
    limits = limits_of(backend.precision, reference.name)
    for metric, value in measured.items():
        yield Check(
            name=f"{graph}/{reference.name}/{output}",
            graph=graph,
            backend=backend.name,
            precision=backend.precision,
            metric=metric,
            value=value,
            limit=float(getattr(limits, metric)),
            passed=limits.allow(metric, value),
        )
