"""Tests of a small ablation: trials, measures, resuming, errors and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.ablation.data import prepare_data
from cclip_deploy.ablation.measures import TrialMeasures
from cclip_deploy.ablation.plan import AblationPlan
from cclip_deploy.ablation.report import describe_changes, tables, to_dict, write_report
from cclip_deploy.ablation.run import Ablation, ablate
from cclip_deploy.ablation.trial import TrialResult
from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.evaluation.causal import MaskStatistics
from cclip_deploy.evaluation.evaluate import EvaluationOptions, NetworkConfig, evaluate

RECIPE: dict[str, Any] = {
    "image_size": 32, "epochs": 1, "images_per_batch": 2, "threads": 1, "devices": {"accelerator": "cpu"},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "seeds": [1, 2],
    "films": {"train": 4, "val": 2, "test": 2},
    "recipe": RECIPE,
    "arms": {
        "off": {"settings": [{}, {"learning_rate": 1e30}]},
        "alternating": {"recipe": {"mode": "alternating"}},
        "clean": {"settings_of": "off", "signs": "by-chance"},
    },
}


def plan_with(**changes: Any) -> AblationPlan:
    return AblationPlan.model_validate({**PLAN, **changes})


def quiet(message: str) -> None:
    pass


def measures_of(ablation: Ablation) -> list[TrialMeasures]:
    return [result.measures for result in ablation.results if result.measures is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation") / "run"


@pytest.fixture(scope="module")
def done(folder: Path) -> Ablation:
    return ablate(plan_with(), folder, 1, quiet)


@pytest.mark.slow
def test_every_arm_has_all_measures_for_every_seed(done: Ablation) -> None:
    assert [(r.arm, r.seed) for r in done.results] == [(arm, seed) for arm in PLAN["arms"] for seed in (1, 2)]
    masks = {f"mask_{fact}_{level}" for fact in ("mean", "entropy_bits", "sd") for level in (3, 4, 5)}
    scores = {"dice_id", "dice_neutral", "dice_anti", "dice_shuffled", "drop", "toggle"}
    for result in done.results:
        numbers = result.to_dict()["numbers"]
        assert set(numbers) == masks | scores
        assert all(np.isfinite(value) for value in numbers.values())
        assert numbers["drop"] == numbers["dice_id"] - numbers["dice_anti"]


@pytest.mark.slow
def test_a_setting_whose_loss_is_not_finite_is_reported_and_not_chosen(done: Ablation) -> None:
    first, second = done.tuning["off"]
    assert first.val_dice is not None
    assert second.val_dice is None
    assert done.choice == {"off": 0, "alternating": 0, "clean": 0}
    assert ("off", "2", "learning_rate 1e+30", "loss not finite", "") in tables(done)[-1].rows


@pytest.mark.slow
def test_dice_matches_evaluate_on_the_saved_checkpoint(done: Ablation, folder: Path) -> None:
    checkpoint = folder / "grid" / "off-setting1-seed1" / "best.safetensors"
    choice = NetworkConfig(checkpoint, threads=1, image_hw=(32, 32), prompt_length=32)
    found = evaluate(choice, folder / "films" / "seed1" / "anti", EvaluationOptions(worst=0))
    assert measures_of(done)[0].dice_anti == pytest.approx(found.evaluation.scores.dice_per_image.value)


@pytest.mark.slow
def test_arms_share_images_and_seeds_do_not(done: Ablation, folder: Path) -> None:
    def texts(seed: int, name: str, split: str) -> list[str]:
        return [row.text for row in of_split(read_flat(folder / "films" / f"seed{seed}" / name), split)]

    assert texts(1, "train-follow", "train") == texts(1, "train-by-chance", "train")
    assert texts(1, "id", "test") == texts(1, "anti", "test")
    assert texts(1, "id", "test") != texts(2, "id", "test")
    assert not (folder / "films" / "seed0" / "id").exists()  # no test sets for tuning


@pytest.mark.slow
def test_toggled_images_are_test_images_with_other_confounders(done: Ablation, folder: Path) -> None:
    data = prepare_data(plan_with(), folder / "films", "off", 1, True, quiet)
    films = list(data.toggled_images())
    assert [film.prompts[0] for film in films] == [row.text for row in data.test_rows("id")]
    for film in films:
        assert film.lungs.any()
        assert not film.lungs.all()
        assert np.abs(film.one - film.other).max() > 0.1


@pytest.mark.slow
def test_only_missing_trials_are_trained(done: Ablation, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cclip_deploy.train import run

    trained: list[str] = []
    real = run.train

    def counted(config: Any, data: Path, target: Path, *rest: Any) -> Any:
        trained.append(target.name)
        return real(config, data, target, *rest)

    monkeypatch.setattr(run, "train", counted)
    again = ablate(plan_with(), folder, 1, quiet)
    assert (again.results, again.choice, trained) == (done.results, done.choice, [])
    more = ablate(plan_with(seeds=[1, 2, 3], arms={"off": PLAN["arms"]["off"]}), folder, 1, quiet)
    assert trained == ["off-setting1-seed3"]
    assert more.results[:2] == done.results[:2]


@pytest.mark.slow
def test_parallel_trials_give_the_same_measures(done: Ablation, tmp_path: Path) -> None:
    arms = {"off": {}, "alternating": PLAN["arms"]["alternating"]}
    both = ablate(plan_with(seeds=[1], arms=arms), tmp_path / "run", 2, quiet)
    assert [r.measures for r in both.results] == [r.measures for r in done.results if r.arm in arms and r.seed == 1]


@pytest.mark.slow
def test_an_interrupted_trial_resumes_from_its_state(
    done: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_with(seeds=[1], arms={"off": {}})
    with monkeypatch.context() as patch:
        patch.setattr("cclip_deploy.evaluation.split.measure_split", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ablate(plan, tmp_path / "run", 1, quiet)
    trial = tmp_path / "run" / "grid" / "off-setting1-seed1"
    assert (trial / "state.pt").exists()
    assert not (trial / "cell.json").exists()
    assert measures_of(ablate(plan, tmp_path / "run", 1, quiet))[0] == measures_of(done)[0]
    assert {path.name for path in trial.iterdir()} == {"best.safetensors", "cell.json", "run.json"}


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"films": {**PLAN["films"], "rho": 0.9}}, "on other images"),
        ({"recipe": {**RECIPE, "epochs": 2}}, r"differs in epochs \(1 then, 2 now\)"),
    ],
)
def test_results_of_another_ablation_are_refused(
    done: Ablation, folder: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        ablate(plan_with(**changes), folder, 1, quiet)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no ablation"):
        ablate(plan_with(), tmp_path, 1, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_damaged_result_is_refused(done: Ablation, folder: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    (copied / "grid" / "clean-setting1-seed2" / "cell.json").write_text("{")
    with pytest.raises(DataError, match=r"clean-setting1-seed2/cell.json is damaged"):
        ablate(plan_with(), copied, 1, quiet)


@pytest.mark.slow
def test_a_data_set_has_one_test_set_and_no_confounder_measures(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 4, "val": 2, "test": 2}, (32, 32), 5)
    recipe = {**RECIPE, "data": {"folder": str(tmp_path / "data")}}
    found = ablate(plan_with(films=None, recipe=recipe, seeds=[1], arms={"off": {}}), tmp_path / "run", 1, quiet)
    numbers = measures_of(found)[0].to_dict()
    assert {"dice_test", "dice_shuffled"} == {name for name in numbers if not name.startswith("mask_")}
    assert tables(found)[0].columns == ("arm", "Dice", "Dice, shuffled prompts")
    assert "no interval" in tables(found)[0].heading


@pytest.mark.slow
def test_a_data_set_without_val_split_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 4, "test": 2}, (32, 32), 5)
    recipe = {**RECIPE, "data": {"folder": str(tmp_path / "data")}}
    with pytest.raises(DataError, match="val"):
        ablate(plan_with(films=None, recipe=recipe, seeds=[1], arms={"off": {}}), tmp_path / "run", 1, quiet)


def made_up(values: dict[str, list[float]]) -> Ablation:
    """Return an ablation with the given drops; all other measures are 0.5."""
    masks = MaskStatistics((0.5,) * 3, (0.5,) * 3, (0.5,) * 3)
    names = ("dice_id", "dice_neutral", "dice_anti", "dice_shuffled", "toggle")
    plan = plan_with(seeds=[1, 2, 3], arms={arm: {} for arm in values})
    results = tuple(
        TrialResult(arm, 0, seed, 0.5, TrialMeasures(masks, drop=drop, **dict.fromkeys(names, 0.5)), 1.0)
        for arm, drops in values.items()
        for seed, drop in zip((1, 2, 3), drops, strict=True)
    )
    return Ablation(plan, {}, dict.fromkeys(values, 0), results)


def test_differences_are_paired_by_seed() -> None:
    found = made_up({"off": [0.1, 0.2, 0.3], "joint": [0.05, 0.15, 0.25]})
    scores, differences, *_ = tables(found)
    assert scores.rows[0][4] == "0.200 [-0.048, 0.448]"  # 0.2 ± 4.3027 x 0.1 / √3
    assert differences.rows[0][4] == "-0.050 [-0.050, -0.050]"
    result = to_dict(found, "cclip-deploy ablate")
    assert result["differences"]["joint"]["drop"]["values"] == pytest.approx([-0.05] * 3)
    assert result["arms"]["off"]["drop"]["sd"] == pytest.approx(0.1)


def test_every_pair_of_arms_is_tested_and_the_power_reported() -> None:
    found = made_up({"off": [0.1, 0.2, 0.3], "joint": [0.15, 0.2, 0.25], "reversal": [0.3, 0.4, 0.51]})
    pairs, power = tables(found)[2:4]
    assert [row[:2] for row in pairs.rows] == [("joint", "off"), ("reversal", "off"), ("reversal", "joint")]
    assert pairs.columns[-1] == "p, Holm (3 pairs)"
    assert pairs.rows[1][2:4] == ("+0.203 [+0.189, +0.218]", "3 of 3")  # 0.2033 ± 4.3027 x 0.00577 / √3
    assert [row[0] for row in power.rows] == ["joint", "reversal"]
    assert "Power of 3 seeds" in power.heading
    result = to_dict(found, "cclip-deploy ablate")["pairs"]["drop"]
    assert [(pair["arm"], pair["less"], pair["higher_in"]) for pair in result] == [
        ("joint", "off", 1), ("reversal", "off", 3), ("reversal", "joint", 3),
    ]  # fmt: skip
    assert result[1]["p_value"] < result[1]["p_holm"] < 0.05


def test_mask_statistics_are_reported_with_those_of_an_untrained_network() -> None:
    (masks,) = (table for table in tables(made_up({"off": [0.1, 0.2, 0.3]})) if "Causal masks" in table.heading)
    assert "an untrained masker has 0.50, 0.86, 0.21" in masks.heading


def test_a_report_has_tables_json_and_plot(tmp_path: Path) -> None:
    found = made_up({"off": [0.1, 0.2, 0.3], "joint": [0.05, 0.15, 0.25]})
    write_report(tmp_path, found, "cclip-deploy ablate plan.toml")
    assert json.loads((tmp_path / "ablation.json").read_text())["command"] == "cclip-deploy ablate plan.toml"
    text = (tmp_path / "ablation.md").read_text()
    assert "| joint | 0.500 [0.500, 0.500] |" in text
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    result = {table.columns for table in tables(found)}
    assert all(" | ".join(columns) in text for columns in result)


def test_a_setting_is_described_in_one_line() -> None:
    assert describe_changes({"learning_rate": 0.002, "game": {"mask_budget": 0.5, "causal_statistics_only": True}}) == (
        "learning_rate 0.002, game.mask_budget 0.5, game.causal_statistics_only true"
    )
    assert describe_changes({}) == "nothing"


def test_a_result_survives_its_json_form() -> None:
    result = made_up({"off": [0.1, 0.2, 0.3]}).results[0]
    numbers = result.to_dict()["numbers"]
    assert (numbers["drop"], numbers["mask_sd_5"], "dice_test" in numbers) == (0.1, 0.5, False)
    assert TrialResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    untested = TrialResult("off", 1, 0, None, None, 0.0)
    assert untested.to_dict()["numbers"] == {}
    assert TrialResult.from_dict(untested.to_dict()) == untested
