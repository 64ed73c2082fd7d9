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
    reports = {"ablation.json", "ablation.md", "ablation.png", "index.html"}
    assert reports <= {path.name for path in (tmp_path / "run").iterdir()}
    assert '<td class="short">joint</td>' in (tmp_path / "run" / "index.html").read_text()
    told = json.loads(invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run", "--json").stdout)
    assert told["schema"] == "cclip-deploy/ablate/1"
    assert [training["arm"] for training in told["trainings"]] == ["off", "joint"]


def test_a_dry_run_counts_the_trainings_and_writes_nothing(tmp_path: Path) -> None:
    plan = PLAN.replace("seeds = [1]", "seeds = [1, 2, 3]").replace("epochs = 1", "epochs = 5")
    plan = plan.replace(
        "[arms.off]\n", "[arms.off]\nsettings = [{ learning_rate = 0.001 }, { learning_rate = 0.002 }]\n"
    )
    (tmp_path / "plan.toml").write_text(plan)
    result = tmp_path / "run" / "grid" / "joint-setting1-seed2" / "cell.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    done = invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run", "--dry-run", "--jobs", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(arm["arm"], arm["tuning"], arm["seeds"], arm["done"]) for arm in found["arms"]] == [
        ("off", 2, 3, 0), ("joint", 0, 3, 1),
    ]  # fmt: skip
    assert [arm["steps"] for arm in found["arms"]] == [10, 10]  # 5 epochs of 4 images, 2 at a time
    off, joint = (arm["step_s"] for arm in found["arms"])
    assert off > 0
    assert found["left_s"] == pytest.approx((5 * 10 * off + 2 * 10 * joint) / 2)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "plan.toml", result]
    shown = invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "none", "--dry-run").stdout
    assert "8 trainings, 0 of them done" in shown


def test_an_invalid_plan_is_a_usage_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace('"joint"', '"jiont"'))
    done = invoke("ablate", tmp_path / "plan.toml", "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "arm joint, setting 1: mode" in done.stderr
    assert not (tmp_path / "run").exists()
