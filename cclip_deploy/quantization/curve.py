"""How many calibration pictures are enough: damage to the masks against their number, for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import graph_key
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.files import link_or_copy, scratch_folder
from cclip_deploy.datasets.image_sets import ImageSet
from cclip_deploy.graph.precision.convert import lower
from cclip_deploy.graph.precision.ranges import METHODS, Method, ranges_of
from cclip_deploy.quantization.agreement import MaskAgreement, evaluation_images, measure_mask_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures, collect_statistics
from cclip_deploy.runtime.graph_model import load_model

IMAGE = "image_encoder"


@dataclass(frozen=True)
class CalibrationCurvePoint:
    """The masks of one calibration, beside FP32's."""

    method: Method
    pictures: int
    agreement: MaskAgreement

    def to_dict(self) -> dict[str, object]:
        """Plain JSON form."""
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
    """Quantize the image encoder with the first pictures of a calibration set, and judge it on the evaluation set.

    The smaller sets are parts of the larger ones. The bundle is not changed; its other graphs have to exist in what the
    rest of the precision runs in.

    Raises:
        UsageError, ImageError, DataError: as `choose_pictures`.
    """
    chosen = choose_pictures(replace(options, limit=max(counts), allow_few=True))
    evaluation = evaluation_images(options)
    points = []
    for count in sorted({min(count, len(chosen.paths)) for count in counts}):
        statistics = collect_statistics(bundle, IMAGE, chosen.paths[:count], threads)
        for method in methods:
            on_progress(f"{method}, {count} pictures")
            ranges = ranges_of(statistics, method, options.percentile)
            points.append(CalibrationCurvePoint(method, count, _judge(bundle, precision, ranges, evaluation, threads)))
    return points


def _judge(
    bundle: Bundle,
    precision: Precision,
    ranges: dict[str, float],
    evaluation: ImageSet,
    threads: int | None,
) -> MaskAgreement:
    """Masks of the bundle with an image encoder of these ranges, in a copy that is thrown away."""
    from cclip_deploy.graph.entry import graph_entry, save_graph

    source = bundle.graph(IMAGE)
    with scratch_folder(bundle.path.with_name(f"{bundle.path.name}.curve")) as folder:
        for file in bundle.sums:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.path / file, folder / file)
        file, model = f"graphs/{graph_key(IMAGE, precision)}.onnx", load_model(bundle, IMAGE)
        (folder / file).unlink(missing_ok=True)
        lowered = lower(model, precision, ranges).model
        save_graph(lowered, folder / file)
        entry = graph_entry(lowered, file, folder, source.sha256, precision)
        graphs = {**bundle.manifest.graphs, graph_key(IMAGE, precision): entry}
        unsealed = Bundle.unsealed(folder, bundle.manifest.model_copy(update={"graphs": graphs}), bundle.sums)
        return measure_mask_agreement(unsealed, precision, evaluation, threads)
