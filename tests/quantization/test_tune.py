"""Sensitivity search: the chosen blocks, the split into tuning and held-out images, and the profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.files import sha256_file
from cclip_deploy.datasets.image_sets import SetImage, read_image_set
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision import convert as conversion
from cclip_deploy.graph.precision.convert import convert_graph
from cclip_deploy.quantization import tune
from cclip_deploy.quantization.agreement import with_prompts
from cclip_deploy.quantization.calibrate import CalibrationOptions, calibrate, choose_pictures
from cclip_deploy.quantization.pareto_plot import draw_pareto_front
from cclip_deploy.quantization.profile import Agreement, TunedProfile, read_tuned_profile, write_tuned_profile
from cclip_deploy.quantization.sensitivity import SensitivityEvaluator
from cclip_deploy.quantization.tune import TuneOptions, blocks_of, tune_precision
from tests.bundles import copy_of, reseal
from tests.cli.run import invoke
from tests.conftest import THREADS, TINY_HW


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images for calibration, eight for tuning and evaluation."""
    folder = tmp_path_factory.mktemp("films") / "data"
    write_dataset(folder, {"train": 8, "test": 8}, TINY_HW, 6, prompts_per_image=2)
    return folder


@pytest.fixture(scope="module")
def wanted(films: Path) -> TuneOptions:
    """Options with a budget that INT8 masks of the untrained tiny bundle meet with some blocks in high precision."""
    calibration = CalibrationOptions((films,), "min-max", evaluation_set=(films,))
    return TuneOptions("int8", (films,), calibration, Agreement(mean=0.5, worst=0.2), threads=THREADS)


@pytest.fixture(scope="module")
def profile(tiny_bundle_path: Path, wanted: TuneOptions) -> TunedProfile:
    return tune_precision(Bundle.open(tiny_bundle_path), wanted)


def test_blocks_partition_the_products_that_can_be_quantized(tiny_bundle_path: Path) -> None:
    model = onnx.load(tiny_bundle_path / "graphs/image_encoder.onnx")
    blocks = blocks_of(model, "int8")
    nodes = [node for found in blocks.values() for node in found]
    assert len(nodes) == len(set(nodes))
    assert {"tower.conv1", "tower.layer3.1", "neck.masker4", "rise.0"} <= blocks.keys()
    assert len(blocks["neck.masker4"]) == 4


def test_tuning_held_out_and_calibration_images_are_disjoint(profile: TunedProfile, films: Path) -> None:
    tuned = profile.tuned
    assert not set(tuned.tuning_pictures) & set(tuned.held_out_pictures)
    both = {*tuned.tuning_pictures, *tuned.held_out_pictures}
    assert both == {sha256_file(path) for path in (films / "images").glob("test-*.png")}
    assert tuned.calibration is not None
    assert not both & set(tuned.calibration.pictures)


def test_the_pareto_front_starts_with_all_low_and_adds_blocks(profile: TunedProfile) -> None:
    front = profile.tuned.front
    assert front[0].kept == ()
    fractions = [point.share for point in front]
    assert fractions == sorted(fractions, reverse=True)
    assert all(set(one.kept) < set(other.kept) for one, other in pairwise(front))
    assert profile.tuned.damage.keys() >= set(front[-1].kept)


def test_the_reported_dice_is_reproduced_from_the_profile(
    profile: TunedProfile, tiny_bundle_path: Path, films: Path
) -> None:
    """With the FP32 image encoder the masks equal FP32's."""
    bundle = Bundle.open(tiny_bundle_path)
    images = with_prompts(read_image_set((films,), "test")).by_hash()
    held_out = [images[sha256] for sha256 in profile.tuned.held_out_pictures]
    evaluator = SensitivityEvaluator(bundle, "int8", held_out, THREADS)
    full = onnx.load(tiny_bundle_path / "graphs/image_encoder.onnx")
    assert np.concatenate(list(evaluator.evaluate(full, range(len(held_out))).values())).min() == 1
    options = CalibrationOptions((films,), "min-max")
    ranges = calibrate(bundle, "image_encoder", full, choose_pictures(options), options, THREADS).ranges
    found = evaluator.evaluate(convert_graph(full, "int8", ranges, profile.keep).model, range(len(held_out)))
    assert np.concatenate(list(found.values())).mean() == pytest.approx(profile.tuned.held_out.mean, abs=1e-9)


class ScriptedEvaluator:
    """Evaluator whose Dice for each image comes from a table by the number of high-precision blocks."""

    scores: ClassVar[dict[int, Callable[[int], float]]] = {}
    images: ClassVar[list[SetImage]] = []

    def __init__(self, bundle: Bundle, precision: str, images: Sequence[SetImage], *_: object) -> None:
        type(self).images = list(images)

    def evaluate(self, blocks: Sequence[str], cases: Sequence[int]) -> dict[int, np.ndarray]:
        """Dice is 1 for numbers of blocks that are not in the table."""
        score = self.scores.get(len(blocks), lambda case: 1.0)
        return {case: np.array([score(case)]) for case in cases}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedEvaluator]:
    """Replace graphs by their high-precision blocks, and the evaluator by one that looks up a table."""
    monkeypatch.setattr(tune, "SensitivityEvaluator", ScriptedEvaluator)

    def blocks_as_graph(model: object, precision: str, ranges: object = None, high_precision: object = ()) -> object:
        return SimpleNamespace(model=high_precision)

    monkeypatch.setattr(conversion, "convert_graph", blocks_as_graph)
    return ScriptedEvaluator


def many_images(folder: Path, patients: Sequence[str]) -> Path:
    """Write a flat test split of small different images, one for each patient name ("" for an unknown patient)."""
    folder.mkdir(parents=True)
    mask = folder / "mask.png"
    Image.new("L", (8, 8)).save(mask)
    rows = []
    for number, patient in enumerate(patients):
        name = f"{number}.png"
        Image.fromarray(np.full((8, 8), [number % 256] * 7 + [number // 256], np.uint8)).save(folder / name)
        rows.append({"image": name, "mask": "mask.png", "text": "lung", "split": "test"})
        rows[-1] |= {"subject": patient} if patient else {}
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_point_that_is_worse_than_a_cheaper_one_is_not_chosen(
    scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block gives a lower mean and worst image than none; only its smaller standard error meets the budget."""
    none = lambda case: 0.9832 if case % 2 else 1.0  # noqa: E731 - mean 0.9916, standard error 0.0015 on 32 images
    one = lambda case: 0.9790 if case % 32 == 0 else 0.9914  # noqa: E731 - mean 0.9910, standard error 0.0004
    monkeypatch.setattr(scripted, "scores", {0: none, 1: one, 2: lambda case: 0.995})
    films = many_images(tmp_path / "set", [""] * 64)
    tuned = tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,))).tuned
    first, second, third = tuned.front[:3]
    assert [len(point.kept) for point in (first, second, third)] == [0, 1, 2]
    assert second.tuning.mean < first.tuning.mean
    assert second.tuning.worst < first.tuning.worst
    assert (
        second.tuning.mean - 2 * second.tuning.standard_error
        > 0.99
        > first.tuning.mean - 2 * first.tuning.standard_error
    )
    assert tuned.share == third.share


def test_a_cheaper_point_that_is_as_good_on_the_held_out_half_is_reported(
    scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out half does not affect the choice, but its results are reported."""
    films, bundle = many_images(tmp_path / "set", [""] * 8), Bundle.open(tiny_bundle_path)
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 0.98 if case < 4 else 0.999, 1: lambda case: 0.995})
    tuned = tune_precision(bundle, TuneOptions("fp16", (films,))).tuned
    better = tuned.cheaper_equivalent()
    assert better is not None
    assert (better.kept, better.share > tuned.share) == ((), True)
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 0.98, 1: lambda case: 0.995})
    assert tune_precision(bundle, TuneOptions("fp16", (films,))).tuned.cheaper_equivalent() is None


def test_a_profile_of_an_earlier_version_still_loads() -> None:
    """It was written before profiles contained data sets and patients."""
    profile = read_tuned_profile(Path(__file__).with_name("earlier_profile.toml"))
    assert (profile.keep, profile.tuned.sources) == (("tower.conv1", "neck.aggregate.0"), ())


def test_of_equal_points_the_cheapest_is_chosen_and_a_better_worst_image_is_enough(
    scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films, bundle = many_images(tmp_path / "set", [""] * 8), Bundle.open(tiny_bundle_path)
    wanted = TuneOptions("fp16", (films,), budget=Agreement(mean=0.9, worst=0.9))
    monkeypatch.setattr(scripted, "scores", dict.fromkeys(range(3), lambda case: 0.95))
    assert tune_precision(bundle, wanted).keep == ()
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 1.0 if case else 0.7, 1: lambda case: 0.95})
    assert len(tune_precision(bundle, wanted).keep) == 1, "its mean is lower, and its worst image better"


def test_no_patient_is_in_both_halves(
    scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    patients = ["a"] * 7 + ["b"] * 3 + ["c"] * 3 + ["d"] + [""] * 4
    films, lines = many_images(tmp_path / "set", patients), []
    tuned = tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,)), lines.append).tuned
    of_file = {sha256_file(films / f"{number}.png"): patient for number, patient in enumerate(patients)}
    tuning, held_out = ([of_file[sha] for sha in part] for part in (tuned.tuning_pictures, tuned.held_out_pictures))
    assert len(tuning) == len(held_out) == 9
    assert not {*tuning} & {*held_out} - {""}
    assert (tuned.tuning_patients, tuned.held_out_patients) == (len({*tuning} - {""}), len({*held_out} - {""}))
    (source,) = tuned.sources
    assert (source.layout, source.split, source.images, source.patients) == ("flat", "test", 18, 4)
    assert any("no patient is in both" in line for line in lines)
    assert any("without a known patient count as separate patients" in line for line in lines)


def test_one_patient_cannot_be_split(scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path) -> None:
    films = many_images(tmp_path / "set", ["a"] * 9 + ["b"])
    with pytest.raises(UsageError, match=r"10 different images of 2 patients.*Give images of more patients"):
        tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,)))


@pytest.mark.parametrize(("limit", "used"), [(10, 10), (64, 64), (70, 70), (500, 72)])
def test_the_limit_bounds_the_evaluation_images(
    limit: int, used: int, scripted: type[ScriptedEvaluator], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    films = many_images(tmp_path / "set", [""] * 72)
    tuned = tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,), limit=limit)).tuned
    assert len(scripted.images) == used
    assert len({*tuned.tuning_pictures, *tuned.held_out_pictures}) == used
    assert {image.prompts for image in scripted.images} == {("lung",)}


@pytest.mark.slow
def test_an_unreachable_budget_is_refused(tiny_bundle_path: Path, wanted: TuneOptions) -> None:
    with pytest.raises(ParityError, match="does not hold on the tuning half for any set"):
        tune_precision(Bundle.open(tiny_bundle_path), replace(wanted, budget=Agreement(mean=1, worst=1)))


def test_a_budget_that_prompt_encoder_and_decoder_break_is_refused_before_the_search(
    tiny_bundle_path: Path, films: Path
) -> None:
    """With FP16 prompt encoder and decoder the masks differ from FP32's whatever the image encoder runs in."""
    lines: list[str] = []
    wanted = TuneOptions("fp16", (films,), budget=Agreement(mean=1, worst=1), threads=THREADS)
    with pytest.raises(ParityError, match=r"does not hold even with every block .*mask decoder"):
        tune_precision(Bundle.open(tiny_bundle_path), wanted, lines.append)
    assert not [line for line in lines if line.startswith("Damage of")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_16_bit_precision_is_tuned_without_calibration(
    precision: Precision, tiny_bundle_path: Path, films: Path
) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    wanted = TuneOptions(precision, (films,), budget=Agreement(mean=0.5, worst=0.2), threads=THREADS)
    profile = tune_precision(bundle, wanted)
    assert profile.precision == precision
    assert profile.tuned.calibration is None
    assert (
        profile.tuned.damage.keys() == blocks_of(onnx.load(bundle.path / "graphs/image_encoder.onnx"), precision).keys()
    )
    assert "in fp32" in profile.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp32"}, "FP32 is the reference of the search"),
        ({"calibration": None}, "needs --calibration"),
        ({"precision": "fp16"}, "takes no --calibration"),
        ({"budget": Agreement(mean=1.5, worst=0.5)}, "Budgets must be above 0"),
        ({"limit": 3}, "split into a tuning half and a held-out half"),
    ],
)
def test_invalid_options_are_refused(
    change: dict[str, object], message: str, tiny_bundle_path: Path, wanted: TuneOptions
) -> None:
    with pytest.raises(UsageError, match=message):
        tune_precision(Bundle.open(tiny_bundle_path), replace(wanted, **change))  # type: ignore[arg-type]


def test_a_profile_round_trips(profile: TunedProfile, tmp_path: Path) -> None:
    write_tuned_profile(profile, tmp_path / "p.toml")
    assert read_tuned_profile(tmp_path / "p.toml") == profile


@pytest.mark.parametrize(
    ("line", "message"),
    [("extra = 1", "extra: unknown key"), ("=", "is not a TOML file"), ('io = "fp16"', "io: unknown key")],
)
def test_a_profile_with_unknown_keys_is_refused(line: str, message: str, profile: TunedProfile, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    write_tuned_profile(profile, path)
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UsageError, match=message):
        read_tuned_profile(path)


def test_a_profile_is_tied_to_its_graph_and_images(
    profile: TunedProfile, tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    model = onnx.load(copy / "graphs/image_encoder.onnx")
    model.doc_string = "another"
    onnx.save(model, copy / "graphs/image_encoder.onnx")
    reseal(copy)
    with pytest.raises(UsageError, match="tuned for another image encoder"):
        profile.check_bundle(Bundle.open(copy))
    profile.check_bundle(Bundle.open(tiny_bundle_path))
    with pytest.raises(UsageError, match="0 of 8 are the same"):
        profile.calibration_options(CalibrationOptions(tuple((films / "images").glob("test-*.png"))))


@pytest.mark.slow
def test_build_engine_takes_the_profile_of_tune_precision(
    tiny_bundle_path: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra: pip install 'cclip-deploy[rtx]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy, path = copy_of(tiny_bundle_path, tmp_path), tmp_path / "p.toml"
    done = invoke(
        "tune-precision", copy, "--calibration", films, "--evaluation-set", films, "--budget-mean", "0.5",
        "--budget-worst", "0.2", "--picture", tmp_path / "front.svg", "-o", path, "--threads", THREADS, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["keep"] == list(read_tuned_profile(path).keep)
    assert (tmp_path / "front.svg").read_text().startswith("<?xml")
    # Other blocks, so that the engine has high-precision products.
    profile = read_tuned_profile(path).model_copy(update={"keep": ("tower.conv1", "neck.aggregate.0")})
    write_tuned_profile(profile, path)
    built = invoke(
        "build-engine", copy, "--tuned", path, "--calibration", films, "--graph", "image_encoder", "--threads", THREADS,
        "--json",
    )  # fmt: skip
    assert built.exit_code == 0, built.stderr
    proof = json.loads((copy / json.loads(built.stdout)["engines"][0]["layers"]).read_text())
    assert {"node_conv2d"} <= set(proof["kept"])
    refused = invoke("build-engine", copy, "--tuned", path, "--fp8", "--calibration", films)
    assert refused.exit_code == 2
    assert "Remove the precision options" in " ".join(refused.stderr.split())


def test_a_pareto_front_is_drawn_as_png_or_svg_only(profile: TunedProfile, tmp_path: Path) -> None:
    draw_pareto_front(profile, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"must end in \.png or \.svg"):
        draw_pareto_front(profile, tmp_path / "front.jpg")
