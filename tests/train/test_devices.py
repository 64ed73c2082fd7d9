"""Tests of distributed training with two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cclip_deploy.model.checkpoint import load_checkpoint
from tests.cli.run import invoke, run

RECIPE = """
mode = "{mode}"
image_size = 64
epochs = 2
images_per_batch = {images}
prompts_per_image = 2
accumulate = 2
threads = 1

[game]
causal_statistics_only = true

[devices]
accelerator = "cpu"
count = {count}
strategy = "{strategy}"
precision = "64-true"
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_two_processes_equal_one_with_twice_the_batch(validated_folder: Path, tmp_path: Path, mode: str) -> None:
    settings = {
        "one": {"images": 2, "count": 1, "strategy": "auto"},
        "two": {"images": 1, "count": 2, "strategy": "ddp"},
    }
    reports, weights = {}, {}
    for name, values in settings.items():
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(mode=mode, **values))
        arguments = ("train", recipe, "--data", validated_folder, "-o", tmp_path / name, "--json")
        if name == "one":
            alone = invoke(*arguments)
            assert alone.exit_code == 0, alone.stderr[-2000:]
            reports[name] = json.loads(alone.stdout)
        else:
            done = run(*arguments)
            assert done.returncode == 0, done.stderr[-2000:]
            reports[name] = json.loads(done.stdout)
        weights[name] = load_checkpoint(tmp_path / name / "last.safetensors").model.state_dict()
    assert reports["one"]["steps"] == reports["two"]["steps"] == 4
    assert reports["two"]["last_loss"] == pytest.approx(reports["one"]["last_loss"], rel=1e-8)
    assert reports["two"]["best_dice"] == pytest.approx(reports["one"]["best_dice"], rel=1e-9)
    for name, tensor in weights["one"].items():
        error = (weights["two"][name].double() - tensor.double()).norm()
        assert error <= 1e-5 * tensor.double().norm().clamp(min=1e-3), name
