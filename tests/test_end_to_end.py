"""The README's commands on a checkpoint of the published layout and size, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.demo.demo import find_real_film
from cclip_deploy.parity.compare import relative_error
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.tensorrt.layers import LayerTable
from tests.conftest import THREADS
from tests.published.checkpoint import example, golden

pytestmark = pytest.mark.slow

PROMPTS = ("lower left lung", "Bilateral pulmonary infection, upper left lung and upper right lung.")


def run_command(*arguments: object) -> dict[str, Any]:
    """What `cclip-deploy … --json` prints."""
    executable = Path(sys.executable).with_name("cclip-deploy")
    done = subprocess.run(
        [executable, *map(str, arguments), "--threads", str(THREADS), "--json"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.fixture(scope="module")
def bundle_path(published_checkpoint: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture checkpoint of seed 0, exported at 224 by the command line, with its engines."""
    path = tmp_path_factory.mktemp("published") / "seed0.cclip"
    run_command("export", published_checkpoint(0), "-o", path)
    run_command("build-engine", path, "--fp16", "--backend", "tensorrt-rtx")
    return path


@pytest.fixture(scope="module", autouse=True)
def _disk_is_given_back(bundle_path: Path) -> Any:
    yield
    shutil.rmtree(bundle_path.parent)


def test_fused_graph_equals_what_the_published_network_computes(bundle_path: Path) -> None:
    image, tokens = example(0, 2, 224, 32)
    backend = OnnxRuntimeBackend(Bundle.open(bundle_path), threads=THREADS)
    logits = backend.run("fused", {"image": image, "tokens": tokens})["logits"]
    assert relative_error(logits, golden("224")["causal_logits"]) <= 1e-5


@pytest.fixture(scope="module")
def inspected(bundle_path: Path) -> dict[str, Any]:
    """What `inspect --json` prints; it has no threads to set."""
    executable = Path(sys.executable).with_name("cclip-deploy")
    command = [executable, "inspect", bundle_path, "--json"]
    printed: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return printed


def test_multiply_adds_do_not_grow(inspected: dict[str, Any]) -> None:
    graphs = inspected["graphs"]
    counted = {name: graphs[name]["multiply_adds"] for name in ("image_encoder", "prompt_encoder", "mask_decoder")}
    limits = {"image_encoder": 21_754_231_296, "prompt_encoder": 1_139_708_928, "mask_decoder": 115_605_504}
    assert {name: count for name, count in counted.items() if count > limits[name]} == {}


def test_every_product_of_the_engines_is_fp16(inspected: dict[str, Any]) -> None:
    engines = inspected["engines"]
    assert {engine["graph"] for engine in engines} == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert all(set(engine["product_layers"]) == {"fp16"} for engine in engines)


def test_verify_passes_in_both_precisions(bundle_path: Path) -> None:
    result = run_command("verify", bundle_path)
    assert result["passed"]
    assert {check["precision"] for check in result["checks"]} == {"fp32", "fp16", "all"}


def test_predict_segments_the_chest_film_for_two_prompts(bundle_path: Path, tmp_path: Path) -> None:
    from PIL import Image

    film = find_real_film()
    assert film is not None, "pydicom-data is a development dependency"
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result = run_command("predict", bundle_path, film, *prompts, "-o", tmp_path)
    assert [row["prompt"] for row in result["predictions"]] == list(PROMPTS)
    for row in result["predictions"]:
        with Image.open(row["files"]["mask"]) as mask:
            assert mask.size == (1841, 1955)
            assert float((np.asarray(mask) == 255).mean()) == pytest.approx(row["area_share"])


def test_fp16_and_int8_image_engines_are_as_small_as_their_weights_allow(
    bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """97.2 M convolution weights; the limits leave room for TensorRT-RTX's own kernels and for constant maps."""
    films = tmp_path_factory.mktemp("films") / "data"
    write_dataset(films, {"train": 8}, (224, 224), 6)
    # The build puts new files in place of old ones, so the other tests' bundle stays as it is.
    linked = shutil.copytree(bundle_path, bundle_path.with_name("int8.cclip"), copy_function=os.link)
    told = run_command(
        "build-engine", linked, "--int8", "--calibration", films, "--graph", "image_encoder",
        "--no-calibration-cache",
    )  # fmt: skip
    sizes = {
        precision: (linked / f"engines/image_encoder.{precision}.tensorrt-rtx.engine").stat().st_size
        for precision in ("fp16", "int8")
    }
    assert sizes["fp16"] <= 204e6
    assert sizes["int8"] <= 126e6
    proof = json.loads((linked / told["engines"][0]["layers"]).read_text())
    table = LayerTable.from_dict(proof)
    convolutions = {node for node in proof["products"] if "conv" in node.lower()} - set(proof["kept"])
    assert len(convolutions) == 128
    assert {row.precision for node in convolutions for row in table.rows_of(node)} == {"int8"}
