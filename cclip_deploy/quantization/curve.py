"""Agreement of the masks with FP32's as a function of the number of calibration images, for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import graph_key
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.files import link_or_copy, scratch_folder
from cclip_deploy.datasets.image_sets import ImageSet
from cclip_deploy.graph.precision.convert import convert_graph
from cclip_deploy.graph.precision.ranges import METHODS, Method, ranges_of
from cclip_deploy.quantization.agreement import MaskAgreement, evaluation_images, measure_mask_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures, collect_statistics
from cclip_deploy.runtime.graph_model import load_model

IMAGE = "image_encoder"


@dataclass(frozen=True)
class CalibrationCurvePoint:
    """Mask agreement of one calibration."""

    method: Method
    pictures: int
    agreement: MaskAgreement

    def to_dict(self) -> dict[str, object]:
        """Return the plain JSON form."""
        return {"method": self.method, "calibration_pictures": self.pictures, **self.agreement.model_dump(mode="json")}


def measure_curve(
    bundle: Bundle,
    options: CalibrationOptions,
    counts: Sequence[int],
    precision: Precision = Precision.INT8,
    methods: Sequence[Method] = METHODS,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[CalibrationCurvePoint]:
    """Compare masks on the evaluation set for image encoders quantized with increasing numbers of images.

    Smaller sets are subsets of larger ones. The bundle is not changed; its other graphs must exist in the precision of
    the unquantized rest.

    Raises:
        UsageError, ImageError, DataError: as `choose_pictures`.
    """
    chosen = choose_pictures(replace(options, limit=max(counts), allow_few=True))
    evaluation = evaluation_images(options)
    points = []
    for count in sorted({min(count, len(chosen.paths)) for count in counts}):
        statistics = collect_statistics(bundle, IMAGE, chosen.paths[:count], threads)
        for method in methods:
            on_progress(f"{method}, {count} images")
            ranges = ranges_of(statistics, method, options.percentile)
            points.append(
                CalibrationCurvePoint(method, count, _evaluate(bundle, precision, ranges, evaluation, threads))
            )
    return points


def _evaluate(
    bundle: Bundle,
    precision: Precision,
    ranges: dict[str, float],
    evaluation: ImageSet,
    threads: int | None,
) -> MaskAgreement:
    """Measure the masks with an image encoder quantized with these ranges, in a temporary copy of the bundle."""
    from cclip_deploy.graph.entry import graph_entry, save_graph

    source = bundle.graph(IMAGE)
    with scratch_folder(bundle.path.with_name(f"{bundle.path.name}.curve")) as folder:
        for file in bundle.sums:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.path / file, folder / file)
        file, model = f"graphs/{graph_key(IMAGE, precision)}.onnx", load_model(bundle, IMAGE)
        (folder / file).unlink(missing_ok=True)
        converted = convert_graph(model, precision, ranges).model
        save_graph(converted, folder / file)
        entry = graph_entry(converted, file, folder, source.sha256, precision)
        graphs = {**bundle.manifest.graphs, graph_key(IMAGE, precision): entry}
        unsealed = Bundle.unsealed(folder, bundle.manifest.model_copy(update={"graphs": graphs}), bundle.sums)
        return measure_mask_agreement(unsealed, precision, evaluation, threads)
