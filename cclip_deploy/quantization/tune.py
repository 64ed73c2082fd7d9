"""Sensitivity search: find the smallest set of image-encoder blocks that must stay in a higher precision.

The search starts with everything in the low precision. A block's damage is the loss of mean Dice when it alone is low.
Blocks move to the higher precision in the order of damage per multiply-add, until the budget holds on the tuning half
of the evaluation set by two standard errors of the mean, with a variant that no variant with fewer high-precision
blocks matches. The result is evaluated on the held-out half, which shares no patient with the tuning half.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.image_sets import read_image_set
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.quantization.agreement import LEAST_DICE, LEAST_MEAN_DICE, with_prompts
from cclip_deploy.quantization.calibrate import CalibrationOptions, CalibrationSet, calibrate, choose_pictures, readable
from cclip_deploy.quantization.halves import Halves, hashes, split_by_patient
from cclip_deploy.quantization.profile import Agreement, CalibrationUsed, ParetoPoint, TunedProfile, Tuning
from cclip_deploy.quantization.sensitivity import SensitivityEvaluator
from cclip_deploy.runtime.graph_model import load_model

if TYPE_CHECKING:
    from onnx import ModelProto

Progress = Callable[[str], None]
IMAGE = "image_encoder"
STANDARD_ERRORS = 2
"""Margin by which the mean on the tuning half must meet the budget, so that other images meet it too."""
BUDGET = Agreement(mean=LEAST_MEAN_DICE, worst=LEAST_DICE)
POINTS_BEYOND = 6
"""Number of variants evaluated after the budget holds, to complete the Pareto front."""


@dataclass(frozen=True)
class TuneOptions:
    """Precision, images and accuracy budget of a search.

    Attributes:
        precision: the low precision.
        evaluation_set: images, or data sets' test splits; split into a tuning half and a held-out half.
        calibration: for a quantized precision; its evaluation set is the one above.
        budget: least mean Dice to FP32's masks, and least mean of an image.
        limit: maximum number of evaluation images, from as many patients as possible.
        data_sets: how data-set folders are read.
        threads: of ONNX Runtime on the CPU.
    """

    precision: Precision
    evaluation_set: tuple[Path, ...]
    calibration: CalibrationOptions | None = None
    budget: Agreement = BUDGET
    limit: int = 64
    data_sets: DataSetOptions = field(default_factory=DataSetOptions)
    threads: int | None = None


def tune_precision(bundle: Bundle, options: TuneOptions, on_progress: Progress = lambda _: None) -> TunedProfile:
    """Run the search and return its result as a profile.

    Raises:
        UsageError: nothing can be tuned, the calibration is invalid, or there are too few evaluation images or
            patients.
        DataError: an image or a patient is in both sets, or a data set is invalid.
        ParityError: the budget does not hold on the tuning half with any variant, or not on the held-out half.
    """
    _check(options)
    calibration = None if options.calibration is None else choose_pictures(options.calibration)
    evaluation = with_prompts(read_image_set(options.evaluation_set, "test", options.data_sets))
    halves = split_by_patient(readable(evaluation.limited(options.limit), on_progress))
    for line in (*(calibration.describe()[:1] if calibration else ()), *halves.describe()):
        on_progress(line)
    search = _Search(bundle, options, calibration, halves, on_progress)
    search.check_budget_is_reachable()
    damage = search.damages()
    points, chosen = search.pareto_front(damage)
    profile = _profile(bundle, options, search, damage, points, chosen)
    _check_held_out(profile.tuned)
    return profile


class _Search:
    """State of the search: the blocks, their costs, the evaluator and the time per step."""

    def __init__(
        self,
        bundle: Bundle,
        options: TuneOptions,
        calibration: CalibrationSet | None,
        halves: Halves,
        on_progress: Progress,
    ) -> None:
        self.options, self.on_progress = options, on_progress
        self.model = load_model(bundle, IMAGE)
        self.blocks = blocks_of(self.model, options.precision)
        self.costs, self.total = _multiply_adds(self.model, self.blocks)
        self.ranges: dict[str, float] | None = None
        self.calibration: CalibrationUsed | None = None
        if calibration is not None and options.calibration is not None:
            given = options.calibration
            record = calibrate(bundle, IMAGE, self.model, calibration, given, options.threads, on_progress)
            pictures = tuple(picture.sha256 for picture in record.pictures)
            self.ranges = record.ranges
            self.calibration = CalibrationUsed(
                method=record.method, percentile=record.percentile, pictures=pictures, sources=record.sources
            )
        self.halves = halves
        self.evaluator = SensitivityEvaluator(bundle, options.precision, halves.images, options.threads, on_progress)
        self.tuning, self.every = range(len(halves.tuning.images)), range(len(halves.images))
        self.started, self.steps = time.monotonic(), 0

    def check_budget_is_reachable(self) -> None:
        """Raise ParityError if the budget does not hold even with every block in the higher precision."""
        rest = Precision(self.options.precision).rest
        self._report_step("Masks with every block in the higher precision", 2 * len(self.blocks))
        best = _agreement(self.evaluator.evaluate(self._all_high(rest), self.tuning))
        if not _holds(best, self.options.budget):
            raise ParityError(
                f"The budget (mean Dice {self.options.budget.mean}, worst image {self.options.budget.worst}) does "
                f"not hold even with every block of the image encoder in the higher precision ({best.mean:.5f}, "
                f"{best.worst:.5f}), because prompt encoder, mask decoder and the operators between the blocks run in "
                f"{rest}. Lower the budget, or choose a higher precision."
            )

    def _all_high(self, rest: Precision) -> ModelProto:
        from cclip_deploy.graph.precision.convert import convert_graph

        nodes = () if Precision(self.options.precision).is_quantized else tuple(self.blocks)
        return convert_graph(self.model, rest, high_precision=nodes).model

    def damages(self) -> dict[str, float]:
        """Return for each block 1 - mean Dice on the tuning half with that block alone in the low precision."""
        found = {}
        for block in self.blocks:
            self._report_step(f"Damage of {block}", 2 * len(self.blocks) - self.steps)
            others = [other for other in self.blocks if other != block]
            found[block] = 1 - _agreement(self.evaluator.evaluate(self._converted(others), self.tuning)).mean
        return found

    def pareto_front(self, damage: Mapping[str, float]) -> tuple[list[ParetoPoint], ParetoPoint | None]:
        """Return points with ever more high-precision blocks, and the first that meets the budget and beats its
        precursors.
        """
        order = sorted(self.blocks, key=lambda block: damage[block] / max(1, self.costs[block]), reverse=True)
        points: list[ParetoPoint] = []
        chosen: ParetoPoint | None = None
        count = 0
        while count < len(order):
            self._report_step(f"{count} of {len(order)} blocks in the higher precision", len(order) - count)
            point = self._point(order[:count])
            holds = _holds(point.tuning, self.options.budget, STANDARD_ERRORS)
            if chosen is None and holds and not any(cheaper.tuning.as_good_as(point.tuning) for cheaper in points):
                chosen = point
            points.append(point)
            count += 1 if chosen is None else max(1, (len(order) - len(chosen.kept)) // POINTS_BEYOND)
        return points, chosen

    def _point(self, blocks: Sequence[str]) -> ParetoPoint:
        dices = self.evaluator.evaluate(self._converted(blocks), self.every)
        return ParetoPoint(
            kept=tuple(blocks),
            share=(sum(self.costs.values()) - sum(self.costs[block] for block in blocks)) / self.total,
            tuning=_agreement({number: dices[number] for number in self.tuning}),
            held_out=_agreement({number: dices[number] for number in self.every if number not in self.tuning}),
        )

    def _converted(self, blocks: Sequence[str]) -> ModelProto:
        from cclip_deploy.graph.precision.convert import convert_graph

        return convert_graph(self.model, self.options.precision, self.ranges, blocks).model

    def _report_step(self, what: str, most_left: int) -> None:
        left = (time.monotonic() - self.started) / self.steps * most_left if self.steps else None
        estimate = f", at most {timedelta(seconds=round(left))} left" if left is not None else ""
        self.on_progress(f"{what}{estimate}")
        self.steps += 1


def blocks_of(model: ModelProto, precision: Precision) -> dict[str, tuple[str, ...]]:
    """Return the blocks of a graph that can stay in a higher precision, each with its products, in graph order.

    A block is a bottleneck (`tower.layer1.0`), a masker, or a layer that belongs to neither. A product whose weight has
    no module name is a block of its own.
    """
    from cclip_deploy.graph.precision.onnx_graph import varying_tensors
    from cclip_deploy.graph.precision.quantize import PRODUCTS, plan_quantization

    if Precision(precision).is_quantized:
        plan = plan_quantization(model)
        weights = {product.node: product.weight_input for product in plan.products}
        named = [(node, node.input[weights[node.name]]) for node in model.graph.node if node.name in weights]
    else:
        varying = varying_tensors(model)
        products = [node for node in model.graph.node if node.op_type in PRODUCTS]
        named = [(node, next((i for i in node.input[:2] if i not in varying), "")) for node in products]
    blocks: dict[str, list[str]] = defaultdict(list)
    for node, weight in named:
        blocks[_block(weight) or node.name].append(node.name)
    return {block: tuple(nodes) for block, nodes in blocks.items()}


def _block(weight: str) -> str | None:
    parts = weight.split(".")
    if len(parts) < 3:
        return None
    return ".".join(parts[:3] if len(parts) > 3 and parts[2].isdigit() else parts[:2])


def _multiply_adds(model: ModelProto, blocks: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], int]:
    """Return the multiply-adds of each block, and of the graph."""
    from cclip_deploy.graph.cost import cost_of_nodes

    counted = {cost.name: cost.multiply_adds for cost in cost_of_nodes(model, {"batch": 1})}
    costs = {block: sum(counted.get(node, 0) for node in nodes) for block, nodes in blocks.items()}
    return costs, max(1, sum(counted.values()))


def _check(options: TuneOptions) -> None:
    if options.precision == "fp32":
        raise UsageError("FP32 is the reference of the search. Name a lower precision.")
    if Precision(options.precision).is_quantized != (options.calibration is not None):
        wants = "needs" if Precision(options.precision).is_quantized else "takes no"
        raise UsageError(f"{options.precision} {wants} --calibration.")
    if not all(0 < least <= 1 for least in (options.budget.mean, options.budget.worst)):
        raise UsageError(f"Budgets must be above 0, up to 1; got {options.budget.mean} and {options.budget.worst}.")


def _agreement(dices: Mapping[int, NDArray[np.float64]]) -> Agreement:
    every = np.concatenate(list(dices.values()))
    means = np.array([values.mean() for values in dices.values()])
    error = means.std(ddof=1) / np.sqrt(len(means))
    return Agreement(mean=float(every.mean()), worst=float(means.min()), standard_error=float(error))


def _holds(found: Agreement, budget: Agreement, standard_errors: float = 0) -> bool:
    return found.mean - standard_errors * found.standard_error >= budget.mean and found.worst >= budget.worst


def _profile(
    bundle: Bundle,
    options: TuneOptions,
    search: _Search,
    damage: dict[str, float],
    points: Sequence[ParetoPoint],
    chosen: ParetoPoint | None,
) -> TunedProfile:
    if chosen is None:
        best = max(points, key=lambda point: point.tuning.mean)
        raise ParityError(
            f"The budget (mean Dice {options.budget.mean}, worst image {options.budget.worst}) does not hold on the "
            "tuning half for any set of high-precision blocks that no smaller set matches; the best has "
            f"{best.tuning.mean:.4f} and {best.tuning.worst:.4f}. Lower the budget, calibrate with other images, or "
            "choose a higher precision."
        )
    rest = Precision(options.precision).high_precision
    halves = search.halves
    return TunedProfile(
        name=f"tuned-{options.precision}",
        why=f"{chosen.share:.1%} of the image encoder's multiply-adds in {Precision(options.precision).product_type}, "
        f"{len(chosen.kept)} of {len(search.blocks)} blocks in {rest}; mean Dice to FP32 "
        f"{chosen.held_out.mean:.4f} on {len(halves.held_out.images)} held-out images. Not run on a GPU.",
        precision=options.precision,
        keep=chosen.kept,
        tuned=Tuning(
            graph_sha256=bundle.graph(IMAGE).sha256,
            budget=options.budget,
            share=chosen.share,
            tuning=chosen.tuning,
            held_out=chosen.held_out,
            tuning_pictures=hashes(halves.tuning),
            held_out_pictures=hashes(halves.held_out),
            tuning_patients=len(halves.tuning.patients),
            held_out_patients=len(halves.held_out.patients),
            sources=halves.tuning.sources,
            calibration=search.calibration,
            damage=damage,
            front=tuple(points),
        ),
    )


def _check_held_out(tuned: Tuning) -> None:
    if not _holds(tuned.held_out, tuned.budget):
        raise ParityError(
            f"The budget holds on the tuning half (mean Dice {tuned.tuning.mean:.4f}, worst image "
            f"{tuned.tuning.worst:.4f}) but not on the held-out one ({tuned.held_out.mean:.4f}, "
            f"{tuned.held_out.worst:.4f}). Give more evaluation images, or set a higher budget than you need. No "
            "profile was written."
        )
