"""Engine profiles become build options, and mistakes in them are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.engines.profile import read_profile
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.inference.graph_chain import PROMPTS_AT_ONCE

PROFILES = sorted((Path(__file__).parents[2] / "engines" / "profiles").glob("*.toml"))
BASE = 'name = "x"\nwhy = "y"\nbackend = "tensorrt-rtx"\nprecision = "fp16"\n'


def test_there_is_a_profile_for_each_of_the_three_targets() -> None:
    assert {"data-centre", "workstation", "jetson"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_can_be_built_and_run(path: Path) -> None:
    profile = read_profile(path)
    assert profile.name == path.stem
    options = profile.build_options(threads=1)
    assert options.max_prompts >= PROMPTS_AT_ONCE
    assert options.max_batch >= 2  # the batch of verify
    assert profile.run.lanes >= 1
    assert (options.settings.timing_cache is None) == (options.backend == "tensorrt-rtx")


def test_a_profile_becomes_options(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        BASE + 'keep = ["tower"]\n[shapes]\nmax_batch = 4\none_alone = true\n[builder]\nworkspace_mib = 3\n'
        'compute_capabilities = ["8.9"]\neffort = 2\ntf32 = true\n[run]\ngpu_interface = "pycuda"\nlanes = 3\n'
    )
    options = read_profile(path).build_options(graphs=("mask_decoder",))
    assert (options.max_batch, options.usual_batch, options.one_alone) == (4, 1, True)
    assert (options.workspace_bytes, options.keep, options.graphs) == (3 << 20, ("tower",), ("mask_decoder",))
    assert (options.settings.compute_capabilities, options.settings.effort) == (("8.9",), 2)
    assert options.settings.tf32

    assert (options.gpu_interface, read_profile(path).run.lanes) == ("pycuda", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "[builder]\nworkspace = 3\n", "builder.workspace: unknown key"),
        (BASE.replace("fp16", "fp4"), "precision: input should be"),
        (BASE + "[run]\nlanes = 0\n", "run.lanes: input should be greater"),
        ('name = "x"\n', "why: field required; backend: field required"),
        ("not toml at all", "is not a TOML file"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_profile(path)
    with pytest.raises(DataError, match="no engine profile"):
        read_profile(tmp_path / "other.toml")


def test_a_folder_is_not_a_profile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, where a TOML file was expected"):
        read_profile(tmp_path)
