"""The sensitivity search: what it keeps, on which pictures it decides and judges, and the profile that comes of it."""

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
from cclip_deploy.graph.precision import convert as lowering
from cclip_deploy.graph.precision.convert import lower
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
    """Eight films to calibrate with, eight to tune and judge on."""
    folder = tmp_path_factory.mktemp("films") / "data"
    write_dataset(folder, {"train": 8, "test": 8}, TINY_HW, 6, prompts_per_image=2)
    return folder


@pytest.fixture(scope="module")
def wanted(films: Path) -> TuneOptions:
    """The tiny bundle is untrained, so its budget is what its INT8 masks can hold with some blocks kept."""
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


def test_the_same_pictures_never_decide_and_judge(profile: TunedProfile, films: Path) -> None:
    tuned = profile.tuned
    assert not set(tuned.tuning_pictures) & set(tuned.held_out_pictures)
    both = {*tuned.tuning_pictures, *tuned.held_out_pictures}
    assert both == {sha256_file(path) for path in (films / "images").glob("test-*.png")}
    assert tuned.calibration is not None
    assert not both & set(tuned.calibration.pictures)


def test_the_front_begins_with_everything_low_and_loses_share_with_every_block(profile: TunedProfile) -> None:
    front = profile.tuned.front
    assert front[0].kept == ()
    shares = [point.share for point in front]
    assert shares == sorted(shares, reverse=True)
    assert all(set(one.kept) < set(other.kept) for one, other in pairwise(front))
    assert profile.tuned.damage.keys() >= set(front[-1].kept)


def test_the_reported_dice_is_that_of_the_kept_blocks(
    profile: TunedProfile, tiny_bundle_path: Path, films: Path
) -> None:
    """Measured again from the profile alone, and with nothing low the masks are FP32's own."""
    bundle = Bundle.open(tiny_bundle_path)
    judged = with_prompts(read_image_set((films,), "test")).by_hash()
    held_out = [judged[sha256] for sha256 in profile.tuned.held_out_pictures]
    trial = SensitivityEvaluator(bundle, "int8", held_out, THREADS)
    full = onnx.load(tiny_bundle_path / "graphs/image_encoder.onnx")
    assert np.concatenate(list(trial.judge(full, range(len(held_out))).values())).min() == 1
    options = CalibrationOptions((films,), "min-max")
    ranges = calibrate(bundle, "image_encoder", full, choose_pictures(options), options, THREADS).ranges
    found = trial.judge(lower(full, "int8", ranges, profile.keep).model, range(len(held_out)))
    assert np.concatenate(list(found.values())).mean() == pytest.approx(profile.tuned.held_out.mean, abs=1e-9)


class ScriptedTrial:
    """Stands for the evaluator: a form's Dice on each image comes from a table by the number of blocks it keeps."""

    scores: ClassVar[dict[int, Callable[[int], float]]] = {}
    images: ClassVar[list[SetImage]] = []

    def __init__(self, bundle: Bundle, precision: str, images: Sequence[SetImage], *_: object) -> None:
        type(self).images = list(images)

    def judge(self, kept: Sequence[str], cases: Sequence[int]) -> dict[int, np.ndarray]:
        """Every form that the table does not name is FP32's."""
        score = self.scores.get(len(kept), lambda case: 1.0)
        return {case: np.array([score(case)]) for case in cases}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedTrial]:
    """The search over forms that are only named, judged by a table."""
    monkeypatch.setattr(tune, "SensitivityEvaluator", ScriptedTrial)
    monkeypatch.setattr(lowering, "lower", lambda model, precision, ranges=None, keep=(): SimpleNamespace(model=keep))
    return ScriptedTrial


def many_images(folder: Path, patients: Sequence[str]) -> Path:
    """A flat test split of small different images, one for each name of a patient ("" where it is not known)."""
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


def test_a_form_that_is_worse_than_a_cheaper_one_is_not_chosen(
    scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one block kept mean and worst image are lower than with none; it holds the budget by its smaller spread."""
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


def test_a_cheaper_form_that_is_as_good_on_the_held_out_part_is_named(
    scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out part has no say in the choice, but its judgment of what was not chosen is not kept back."""
    films, bundle = many_images(tmp_path / "set", [""] * 8), Bundle.open(tiny_bundle_path)
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 0.98 if case < 4 else 0.999, 1: lambda case: 0.995})
    tuned = tune_precision(bundle, TuneOptions("fp16", (films,))).tuned
    better = tuned.cheaper_as_good_when_judged()
    assert better is not None
    assert (better.kept, better.share > tuned.share) == ((), True)
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 0.98, 1: lambda case: 0.995})
    assert tune_precision(bundle, TuneOptions("fp16", (films,))).tuned.cheaper_as_good_when_judged() is None


def test_a_profile_of_an_earlier_version_still_loads() -> None:
    """It was written before profiles named data sets and patients."""
    profile = read_tuned_profile(Path(__file__).with_name("earlier_profile.toml"))
    assert (profile.keep, profile.tuned.sources) == (("tower.conv1", "neck.aggregate.0"), ())


def test_of_equal_forms_the_one_with_fewer_blocks_is_chosen_and_one_that_is_better_in_one_respect_may_be(
    scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films, bundle = many_images(tmp_path / "set", [""] * 8), Bundle.open(tiny_bundle_path)
    wanted = TuneOptions("fp16", (films,), budget=Agreement(mean=0.9, worst=0.9))
    monkeypatch.setattr(scripted, "scores", dict.fromkeys(range(3), lambda case: 0.95))
    assert tune_precision(bundle, wanted).keep == ()
    monkeypatch.setattr(scripted, "scores", {0: lambda case: 1.0 if case else 0.7, 1: lambda case: 0.95})
    assert len(tune_precision(bundle, wanted).keep) == 1, "its mean is lower, and its worst image better"


def test_no_patient_decides_and_judges(scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path) -> None:
    patients = ["a"] * 7 + ["b"] * 3 + ["c"] * 3 + ["d"] + [""] * 4
    films, told = many_images(tmp_path / "set", patients), []
    tuned = tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,)), told.append).tuned
    of_file = {sha256_file(films / f"{number}.png"): patient for number, patient in enumerate(patients)}
    tuning, held_out = ([of_file[sha] for sha in part] for part in (tuned.tuning_pictures, tuned.held_out_pictures))
    assert len(tuning) == len(held_out) == 9
    assert not {*tuning} & {*held_out} - {""}
    assert (tuned.tuning_patients, tuned.held_out_patients) == (len({*tuning} - {""}), len({*held_out} - {""}))
    (source,) = tuned.sources
    assert (source.layout, source.split, source.images, source.patients) == ("flat", "test", 18, 4)
    assert any("no patient is in both" in line for line in told)
    assert any("without a known patient count as patients of their own" in line for line in told)


def test_one_patient_cannot_be_halved(scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path) -> None:
    films = many_images(tmp_path / "set", ["a"] * 9 + ["b"])
    with pytest.raises(UsageError, match=r"10 different images of 2 patients.*Give images of more patients"):
        tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,)))


@pytest.mark.parametrize(("limit", "used"), [(10, 10), (64, 64), (70, 70), (500, 72)])
def test_as_many_evaluation_images_are_used_as_the_limit_says(
    limit: int, used: int, scripted: type[ScriptedTrial], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    films = many_images(tmp_path / "set", [""] * 72)
    tuned = tune_precision(Bundle.open(tiny_bundle_path), TuneOptions("fp16", (films,), limit=limit)).tuned
    assert len(scripted.images) == used
    assert len({*tuned.tuning_pictures, *tuned.held_out_pictures}) == used
    assert {image.prompts for image in scripted.images} == {("lung",)}


@pytest.mark.slow
def test_a_budget_that_cannot_hold_writes_nothing(tiny_bundle_path: Path, wanted: TuneOptions) -> None:
    with pytest.raises(ParityError, match="does not hold on the tuning part whatever is kept"):
        tune_precision(Bundle.open(tiny_bundle_path), replace(wanted, budget=Agreement(mean=1, worst=1)))


def test_a_budget_that_no_block_can_mend_is_refused_before_any_is_tried(tiny_bundle_path: Path, films: Path) -> None:
    """With FP16 prompts and decoder the masks differ from FP32's, whatever the image encoder keeps."""
    told: list[str] = []
    wanted = TuneOptions("fp16", (films,), budget=Agreement(mean=1, worst=1), threads=THREADS)
    with pytest.raises(ParityError, match=r"does not hold with every block .* kept .*mask decoder"):
        tune_precision(Bundle.open(tiny_bundle_path), wanted, told.append)
    assert not [line for line in told if line.startswith("Damage of")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_without_codes_is_tuned_without_calibration(
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
    ("change", "said"),
    [
        ({"precision": "fp32"}, "FP32 is what is tuned against"),
        ({"calibration": None}, "needs --calibration"),
        ({"precision": "fp16"}, "takes no --calibration"),
        ({"budget": Agreement(mean=1.5, worst=0.5)}, "A budget is a Dice"),
        ({"limit": 3}, "one half decides and the other judges"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    change: dict[str, object], said: str, tiny_bundle_path: Path, wanted: TuneOptions
) -> None:
    with pytest.raises(UsageError, match=said):
        tune_precision(Bundle.open(tiny_bundle_path), replace(wanted, **change))  # type: ignore[arg-type]


def test_a_profile_comes_back_as_it_was_written(profile: TunedProfile, tmp_path: Path) -> None:
    write_tuned_profile(profile, tmp_path / "p.toml")
    assert read_tuned_profile(tmp_path / "p.toml") == profile


@pytest.mark.parametrize(
    ("line", "said"),
    [("extra = 1", "extra: extra inputs are not permitted"), ("=", "is not a TOML file"), ('io = "fp16"', "io: extra")],
)
def test_a_profile_with_unknown_keys_is_refused(line: str, said: str, profile: TunedProfile, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    write_tuned_profile(profile, path)
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UsageError, match=said):
        read_tuned_profile(path)


def test_a_profile_belongs_to_its_graph_and_its_pictures(
    profile: TunedProfile, tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    model = onnx.load(copy / "graphs/image_encoder.onnx")
    model.doc_string = "another"
    onnx.save(model, copy / "graphs/image_encoder.onnx")
    reseal(copy)
    with pytest.raises(UsageError, match="found for another image encoder"):
        profile.check_bundle(Bundle.open(copy))
    profile.check_bundle(Bundle.open(tiny_bundle_path))
    with pytest.raises(UsageError, match="0 of 8 are the same"):
        profile.calibration_options(CalibrationOptions(tuple((films / "images").glob("test-*.png"))))


@pytest.mark.slow
def test_the_command_tunes_and_build_engine_takes_what_it_wrote(
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
    # One more block, so that the engine has something to keep.
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
    assert "Leave the precision's flags" in " ".join(refused.stderr.split())


def test_a_front_is_drawn_as_png_or_svg_only(profile: TunedProfile, tmp_path: Path) -> None:
    draw_pareto_front(profile, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"none of \.png, \.svg"):
        draw_pareto_front(profile, tmp_path / "front.jpg")
