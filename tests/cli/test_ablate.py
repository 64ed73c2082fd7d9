"""Tests of `cclip-deploy ablate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import invoke

PLAN = """
seeds = [1]
[films]
train = 4
val = 2
test = 2
[recipe]
image_size = 32
epochs = 1
images_per_batch = 2
threads = 1
devices = { accelerator = "cpu" }
[arms.off]
[arms.joint]
recipe = { mode = "joint" }
"""


@pytest.mark.slow
def test_ablate_prints_tables_and_a_resumed_run_prints_json(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    done = invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "one seed, no interval" in done.stdout
    assert "Paired difference to off" in done.stdout
    assert {"ablation.json", "ablation.md", "ablation.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    told = json.loads(invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run", "--json").stdout)
    assert [training["arm"] for training in told["trainings"]] == ["off", "joint"]


def test_an_invalid_plan_is_a_usage_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace('"joint"', '"jiont"'))
    done = invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "arm joint, setting 1: mode" in done.stderr
    assert not (tmp_path / "run").exists()
