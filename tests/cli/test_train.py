"""Tests of `cclip-deploy train`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.model.config import TINY
from tests.cli.run import invoke, run, without
from tests.model.open_clip_twin import open_clip_twin

RECIPE = """
image_size = 64
epochs = 1
images_per_batch = 2
threads = 1
devices = {{ accelerator = "cpu" }}
data = {{ folder = "{folder}" }}
"""


def write_recipe(folder: Path) -> Path:
    write_dataset(folder / "films", {"train": 4, "val": 2}, (64, 64), seed=0)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder / "films"))
    return folder / "recipe.toml"


def test_train_prints_its_results_and_the_tensors_found_in_clip(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    save_file(open_clip_twin(TINY).state_dict(), tmp_path / "clip.safetensors")
    done = invoke("train", recipe, "-o", tmp_path / "run", "--clip-weights", tmp_path / "clip.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "best Dice on val" in done.stdout
    assert "waiting for data" in done.stdout
    assert "image_tower.attnpool.connect.0.weight" in done.stdout
    assert f"Checkpoint: {tmp_path / 'run' / 'best.safetensors'}" in done.stdout
    assert (tmp_path / "run" / "best.safetensors").is_file()
    again = invoke("train", recipe, "-o", tmp_path / "run", "--clip-weights", tmp_path / "clip.safetensors")
    assert again.exit_code == 2
    assert "--resume" in again.stderr


def test_clip_weights_with_an_initial_checkpoint_are_a_usage_error(tmp_path: Path) -> None:
    """The option is validated with the recipe; otherwise the checkpoint would silently replace CLIP's weights."""
    recipe = write_recipe(tmp_path)
    recipe.write_text(f'start_checkpoint = "{tmp_path / "start.safetensors"}"\n{recipe.read_text()}')
    done = invoke("train", recipe, "-o", tmp_path / "run", "--clip-weights", tmp_path / "clip.safetensors")
    assert done.exit_code == 2
    assert "clip_weights and start_checkpoint both set the towers' initial weights; give only one" in (
        " ".join(done.stderr.split())
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_json_and_writes_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = invoke("train", recipe, "-o", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["steps"], said["images"], said["clip"]) == (1, 2, None)
    assert not (tmp_path / "run").exists()


def test_without_torch_no_data_is_generated_and_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'[data]\nfolder = "{tmp_path / "films"}"\nsynthetic = {{ images = 625 }}\n', encoding="utf-8"
    )
    done = run("train", tmp_path / "recipe.toml", "-o", tmp_path / "run", env=without("torch"))
    assert done.returncode == 3
    assert done.stderr == "Error: Training needs torch. Install: pip install 'cclip-deploy[train]'.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_exit_codes_of_a_wrong_recipe_and_a_missing_data_set(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("epoch = 3")
    assert invoke("train", tmp_path / "recipe.toml").exit_code == 2
    (tmp_path / "recipe.toml").write_text("epochs = 3")
    said = invoke("train", tmp_path / "recipe.toml")
    assert said.exit_code == 2
    assert "names no data set" in said.stderr
    assert invoke("train", tmp_path / "recipe.toml", "--data", tmp_path / "none", "-o", tmp_path / "run").exit_code == 6
    assert not (tmp_path / "run").exists()
