"""Demo: run every stage on a tiny network and synthetic radiographs, and write a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.files import restore_folder, whole_folder
from cclip_deploy.common.paths import check_writable
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.demo.report import DemoFacts, save_report
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.environment.packages import require_export_packages, require_training_packages
from cclip_deploy.errors import EnvironmentIssue, ParityError, UsageError
from cclip_deploy.evaluation.evaluate import evaluate_dice
from cclip_deploy.evaluation.models import BundleModel
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.inference.predict import predict
from cclip_deploy.inference.prediction import Prediction
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.runtime.registry import BackendConfig, opened
from cclip_deploy.train.config import Devices, TrainConfig
from cclip_deploy.train.run import RunOptions, train
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle

if TYPE_CHECKING:
    from cclip_deploy.train.loop import TrainProgress

Progress = Callable[[str], None]

BUNDLE, REPORT, FACTS = "demo.cclip", "report.html", "report.json"
RECIPE = TrainConfig(
    image_size=96, epochs=6, images_per_batch=4, prompts_per_image=8, learning_rate=4e-3, tower_rate=0.3, threads=2,
    devices=Devices(accelerator="cpu"),
)  # fmt: skip
FILM_PROMPTS = (
    "Unilateral pulmonary infection, one infected area, lower left lung.",
    "Bilateral pulmonary infection, two infected areas, upper left lung and upper right lung.",
)
FILM_NAME = "RG1_UNCR.dcm"


@dataclass(frozen=True)
class DemoOptions:
    """Size of the demo; the defaults take minutes on two cores."""

    recipe: TrainConfig = RECIPE
    train_images: int = 400
    test_images: int = 60
    bench_rounds: int = 20
    bench_budget_seconds: float = 60.0
    threads: int = 2


def run_demo(output: Path, options: DemoOptions, command: str, on_progress: Progress = lambda _: None) -> DemoFacts:
    """Train, export, build engines, verify, benchmark and predict; `output` is replaced if it holds an earlier demo.

    Raises:
        UsageError: `output` exists and is not a demo.
        ParityError: the exported bundle fails verification.
        EnvironmentIssue: `output` cannot be written.
    """
    restore_folder(output)
    if output.exists() and not (output / FACTS).is_file():
        raise UsageError(f"{output} exists and is not an earlier demo. Choose another output.")
    check_writable(output)
    require_export_packages()
    require_training_packages()
    started = time.perf_counter()
    with whole_folder(output) as folder:
        folder.mkdir()
        facts = _run_stages(folder, options, command, on_progress)
        facts = facts.finished(time.perf_counter() - started)
        save_report(folder, facts, FACTS, REPORT)
    return facts


def _run_stages(folder: Path, options: DemoOptions, command: str, on_progress: Progress) -> DemoFacts:
    recipe, data = options.recipe, folder / "data"
    on_progress(f"Generating {options.train_images + options.test_images} synthetic radiographs")
    counts = {"train": options.train_images, "test": options.test_images}
    write_dataset(data, counts, recipe.image_hw, recipe.seed, prompts_per_image=recipe.prompts_per_image)
    running = RunOptions(tensorboard=False)
    trained = train(recipe, data, folder / "training", lambda p: _report_step(on_progress, p), running)
    checkpoint = trained.checkpoint
    held_out = of_split(read_data_set(data).samples, "test")
    film = find_real_film()
    images = _first_images(held_out, 2) + ([film] if film else [])
    exporting = ExportOptions(
        recipe.image_hw, recipe.prompt_length, with_masks=True, threads=options.threads,
        reference_images=tuple(images),
    )  # fmt: skip
    bundle = export_bundle(checkpoint, folder / BUNDLE, exporting, command, on_progress).bundle
    engines, no_engine = _build(bundle, options, on_progress)
    bundle = Bundle.open(bundle.path)
    verified = verify_bundle(bundle, VerifyOptions(threads=options.threads), on_progress)
    if not verified.passed:
        raise ParityError("The bundle of the demo failed verification and was deleted. Please report this.")
    with opened(BackendConfig(threads=options.threads), bundle, "fp32") as runs:
        network = BundleModel(bundle, runs)
        on_progress(f"Evaluating {len(held_out)} test prompts")
        scores = evaluate_dice(network, held_out)
        benched = bench_bundle(bundle, _bench_options(checkpoint, options), on_progress)
        shown = _predict(network.segmenter, held_out, film, folder / "predictions", on_progress)
    return DemoFacts(trained, scores, verified, engines, no_engine, benched, shown, film is not None, folder)


def find_real_film() -> Path | None:
    """Return the frontal chest radiograph of the package pydicom-data, if it is installed; download nothing."""
    import importlib.util

    spec = importlib.util.find_spec("data_store")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = next(Path(place).rglob(FILM_NAME), None)
        if found:
            return found
    return None


def _report_step(on_progress: Progress, progress: TrainProgress) -> None:
    if progress.step % 10 == 0 or progress.step == progress.steps:
        on_progress(f"Training, step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")


def _first_images(samples: Sequence[Sample], count: int) -> list[Path]:
    return list(dict.fromkeys(sample.image for sample in samples))[:count]


def _build(bundle: Bundle, options: DemoOptions, on_progress: Progress) -> tuple[list[dict[str, Any]], str | None]:
    """Build FP16 engines; return them, or none and the reason if TensorRT-RTX is not installed."""
    try:
        entries = build_engines(bundle, BuildOptions(threads=options.threads), on_progress)
    except EnvironmentIssue as error:
        return [], str(error)
    sizes = [(bundle.path / entry.file).stat().st_size for entry in entries]
    return [{**e.model_dump(mode="json"), "bytes": size} for e, size in zip(entries, sizes, strict=True)], None


def _bench_options(checkpoint: Path, options: DemoOptions) -> BenchOptions:
    return BenchOptions(
        checkpoint, compile=False, threads=options.threads, rounds=options.bench_rounds,
        budget_seconds=options.bench_budget_seconds,
    )  # fmt: skip


def _predict(
    segmenter: Segmenter, held_out: Sequence[Sample], film: Path | None, output: Path, on_progress: Progress
) -> list[Prediction]:
    """Segment three test images, each with its first two prompts, and the real radiograph with two prompts."""
    done: list[Prediction] = []
    for image in _first_images(held_out, 3):
        on_progress(f"Segmenting {image.name}")
        prompts = [sample.text for sample in held_out if sample.image == image][:2]
        done += predict(segmenter, [image], prompts, output).done
    if film is not None:
        on_progress(f"Segmenting {film.name}")
        done += predict(segmenter, [film], FILM_PROMPTS, output).done
    return done
