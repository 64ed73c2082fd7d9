"""Tests of the demo on a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.demo.demo import BUNDLE, FACTS, RECIPE, REPORT, DemoOptions, find_real_film, run_demo
from cclip_deploy.errors import UsageError
from cclip_deploy.train.config import DataSource, TrainConfig

RECIPE_FILE = Path(__file__).parents[2] / "training" / "configs" / "synthetic_tiny.toml"


def test_the_recipe_of_the_demo_is_that_of_the_recipe_file() -> None:
    written = TrainConfig.from_toml(RECIPE_FILE)
    assert written.model_copy(update={"data": DataSource()}) == RECIPE


def test_demo_does_not_replace_another_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UsageError, match="is not an earlier demo"):
        run_demo(tmp_path, DemoOptions(), "test")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_demo_writes_bundle_data_and_a_report_with_its_images(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    recipe = RECIPE.model_copy(update={"image_size": 64, "epochs": 1})
    options = DemoOptions(recipe, train_images=8, test_images=4, bench_rounds=3, bench_budget_seconds=5)
    facts = run_demo(output, options, "test")
    assert find_real_film() is not None, "pydicom-data is a development dependency"
    assert {row.stage for row in facts.rows()} == {"train", "evaluate", "verify", "build-engine", "bench"}
    assert {engine["precision"] for engine in facts.engines} == {"fp16"}
    assert Bundle.open(output / BUNDLE).check_all() == ()
    assert len({sample.image for sample in read_flat(output / "data")}) == 12
    page, kept = (output / REPORT).read_text(), json.loads((output / FACTS).read_text())
    assert kept["verify"]["passed"]
    for prediction in kept["predictions"]:
        assert (output / prediction["files"]["overlay"]).is_file()
        assert f'src="{prediction["files"]["overlay"]}"' in page
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
