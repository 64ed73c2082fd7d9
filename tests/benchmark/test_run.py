"""Tests of the benchmark of a bundle against the baselines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.benchmark import baselines as peers
from cclip_deploy.benchmark.baselines import SGEMM
from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.export import export
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.bundles import change_weights, copy_of, reseal
from tests.conftest import THREADS, random_network

pytestmark = pytest.mark.slow

RESULT_KEYS = {
    "name", "backend", "precision", "stage", "p50_ms", "p90_ms", "p99_ms", "n", "threads", "device", "role", "form",
    "precision_class", "includes_prompt_encoding", "samples_ms", "multiply_adds",
}  # fmt: skip
RATIO_KEYS = {"baseline", "candidate", "ratio", "low", "high", "n"}


def quick(**changes: Any) -> BenchOptions:
    values: dict[str, Any] = {"compile": False, "rounds": 3, "warmup_rounds": 1, "threads": THREADS, **changes}
    return BenchOptions(**values)


def names(result: dict[str, Any]) -> list[str]:
    return [row["name"] for row in result["results"]]


def test_a_bundle_alone_is_timed_by_stage_and_the_baselines_are_listed_as_not_measured(tiny_bundle_path: Path) -> None:
    result = bench_bundle(Bundle.open(tiny_bundle_path), quick())
    assert [(row["name"], row["stage"]) for row in result["results"]] == [
        ("fused fp32", "image and prompt"), ("cached prompt fp32", "image and prompt"),
        ("prompt fp32", "prompt alone"), ("one more prompt fp32", "one more prompt"),
    ]  # fmt: skip
    assert {row["name"]: row["reason"] for row in result["not_measured"]} == {
        "pytorch eager": "needs --checkpoint",
        "torch.compile": "needs --checkpoint",
        "plain export": "needs --checkpoint or --plain",
    }
    assert [(r["baseline"], r["candidate"]) for r in result["ratios"]] == [("fused fp32", "cached prompt fp32")]


def test_the_result_has_the_documented_json_keys(tiny_bundle_path: Path) -> None:
    told = json.loads(json.dumps(bench_bundle(Bundle.open(tiny_bundle_path), quick()), allow_nan=False))
    assert told.keys() == {
        "fingerprint", "source", "network", "results", "ratios", "threads", "seed", "bundle", "not_measured",
    }  # fmt: skip
    assert told["fingerprint"].keys() >= {"cpu", "packages", "time_utc"}
    graphs = Bundle.open(tiny_bundle_path).manifest.graphs
    assert told["network"]["multiply_adds"] == {name: graph.multiply_adds for name, graph in graphs.items()}
    assert told["bundle"] == str(tiny_bundle_path)
    for row in told["results"]:
        assert row.keys() >= RESULT_KEYS
        assert row["n"] == 3
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert (row["threads"], row["device"], row["backend"], row["precision"]) == (
            THREADS,
            "cpu",
            "onnxruntime",
            "fp32",
        )
    for ratio in told["ratios"]:
        assert ratio.keys() >= RATIO_KEYS
        rows = {row["name"]: np.array(row["samples_ms"]) for row in told["results"]}
        paired = rows[ratio["baseline"]] / rows[ratio["candidate"]]
        assert ratio["ratio"] == pytest.approx(float(np.median(paired)))


def test_a_checkpoint_and_a_plain_bundle_are_timed_and_paired(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path
) -> None:
    result = bench_bundle(
        Bundle.open(tiny_bundle_path), quick(checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path)
    )
    assert {"pytorch eager", "pytorch eager, causal path", "plain export"} <= set(names(result))
    assert {row["backend"] for row in result["results"] if "pytorch" in row["name"]} == {"pytorch"}
    assert [row["name"] for row in result["not_measured"]] == ["torch.compile"]
    assert {ratio["baseline"] for ratio in result["ratios"]} == {
        "pytorch eager", "pytorch eager, channels last", "plain export",
    }  # fmt: skip
    pairs = {(ratio["baseline"], ratio["candidate"]) for ratio in result["ratios"]}
    assert ("pytorch eager", "fused fp32") in pairs
    assert ("plain export", "cached prompt fp32") in pairs


def test_a_plain_bundle_is_exported_if_none_is_given_and_removed(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Path, export.ExportOptions]] = []

    def give(checkpoint: Path, path: Path, options: export.ExportOptions, *rest: object) -> None:
        made.append((path, options))
        shutil.copytree(plain_bundle_path, path)

    monkeypatch.setattr(export, "export_bundle", give)
    result = bench_bundle(Bundle.open(tiny_bundle_path), quick(checkpoint=tiny_checkpoint))
    assert "plain export" in names(result)
    (path, options), = made  # fmt: skip
    assert (options.plain, options.batch, options.image_hw, options.prompt_length) == (True, 1, (64, 96), 24)
    assert not path.exists()


def test_a_compiler_that_fails_is_reported_and_the_rest_is_timed(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(peers, "compiled", broken)
    options = quick(checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path, compile=True)
    result = bench_bundle(Bundle.open(tiny_bundle_path), options)
    assert result["not_measured"] == [
        {
            "name": "torch.compile",
            "reason": "failed: RuntimeError: no C++ compiler and a long story",
        }
    ]
    assert "pytorch eager" in names(result)


def test_fp16_graphs_are_timed_and_engines_are_named_as_not_run(engine_bundle_path: Path) -> None:
    result = bench_bundle(Bundle.open(engine_bundle_path), quick())
    assert {"cached prompt fp16", "prompt fp16", "one more prompt fp16", "fused fp32"} <= set(names(result))
    assert "fused fp16" not in names(result)  # there is no such graph
    row = next(row for row in result["results"] if row["name"] == "new prompt fp16")
    assert (row["stage"], row["includes_prompt_encoding"]) == ("image and prompt", True)
    costs = result["network"]["multiply_adds"]
    assert row["multiply_adds"] == sum(costs[name] for name in ("image_encoder", "prompt_encoder", "mask_decoder"))
    left_out = {row["name"]: row["reason"] for row in result["not_measured"]}
    assert left_out["image_encoder fp16 on tensorrt-rtx"] == "engines run on a GPU only"
    assert sum("on tensorrt-rtx" in name for name in left_out) == 3


def test_a_precision_that_only_some_graphs_have_is_named_as_left_out(engine_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)

    def without_prompts(manifest: dict[str, Any]) -> None:
        del manifest["graphs"]["prompt_encoder.fp16"]
        del manifest["engines"][1]

    reseal(copy, without_prompts)
    result = bench_bundle(Bundle.open(copy), quick())
    assert {row["precision"] for row in result["results"]} == {"fp32"}
    left_out = {row["name"]: row["reason"] for row in result["not_measured"]}
    assert left_out["graphs fp16"] == "the bundle lacks one of the three fp16 graphs"


def test_every_candidate_really_computes_its_graph(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    real = OnnxRuntimeBackend.run

    def run(self: Any, graph: str, inputs: Any) -> Any:
        runs.append(graph)
        return real(self, graph, inputs)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", run)
    bench_bundle(Bundle.open(tiny_bundle_path), quick(warmup_rounds=0))
    setting_up = ["prompt_encoder", "image_encoder"]
    assert runs[:2] == setting_up
    counts = {graph: runs[2:].count(graph) for graph in set(runs)}
    assert counts == {"fused": 3, "image_encoder": 3, "mask_decoder": 6, "prompt_encoder": 3}


def test_bundles_of_different_networks_are_a_usage_error(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ours, plain = Bundle.open(tiny_bundle_path), Bundle.open(plain_bundle_path)
    with pytest.raises(UsageError, match="is a plain export"):
        bench_bundle(plain, quick())
    with pytest.raises(UsageError, match="is not a plain export"):
        bench_bundle(ours, quick(plain_bundle=tiny_bundle_path))
    save_checkpoint(random_network(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"is not the file that .* was exported from"):
        bench_bundle(ours, quick(checkpoint=tmp_path / "other.safetensors", plain_bundle=plain_bundle_path))
    other = copy_of(plain_bundle_path, tmp_path)

    def from_elsewhere(manifest: dict[str, Any]) -> None:
        manifest["checkpoint"]["sha256"] = manifest["graphs"]["plain"]["made_from_sha256"] = "0" * 64

    reseal(other, from_elsewhere)
    with pytest.raises(UsageError, match=r"differs from .* in checkpoint"):
        bench_bundle(ours, quick(plain_bundle=other))


def test_a_plain_bundle_of_a_larger_batch_is_refused(
    tiny_bundle_path: Path, plain_bundle_path: Path, tmp_path: Path
) -> None:
    other = copy_of(plain_bundle_path, tmp_path)

    def larger(manifest: dict[str, Any]) -> None:
        for tensor in manifest["graphs"]["plain"]["inputs"]:
            tensor["shape"][0] = 2

    reseal(other, larger)
    with pytest.raises(UsageError, match="batch of 2"):
        bench_bundle(Bundle.open(tiny_bundle_path), quick(plain_bundle=other))


OURS = (
    "fused", "cached prompt", "prompt", "one more prompt", "image pass", "1 × image, 2 × prompt, new prompts",
    "1 × image, 2 × prompt, cached prompts", "2 × image, 1 × prompt, new prompts",
    "2 × image, 1 × prompt, cached prompts",
)  # fmt: skip
PEERS = (
    "pytorch eager", "pytorch eager, causal path", "pytorch eager, channels last",
    "pytorch eager, causal path, channels last", "plain export", "plain export, onnxslim", "plain export, OpenVINO",
    "plain export, OpenVINO defaults", "ov.convert_model", "ov.convert_model, OpenVINO defaults",
)  # fmt: skip


@pytest.fixture(scope="module")
def beside_peers(tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    """A result of --peers on the tiny bundle, without torch.compile, which takes half a minute."""
    options = quick(
        checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path, peers=True, workloads=((1, 2), (2, 1)),
    )  # fmt: skip
    return bench_bundle(Bundle.open(tiny_bundle_path), options)


def test_with_peers_both_backends_run_and_all_logits_match_pytorch(beside_peers: dict[str, Any]) -> None:
    ours = [f"{name} fp32{backend}" for backend in ("", ", OpenVINO") for name in OURS]
    assert sorted(names(beside_peers)) == sorted([*ours, *PEERS, SGEMM])
    assert [row["name"] for row in beside_peers["not_measured"]] == ["torch.compile"]
    whole = [row for row in beside_peers["results"] if row["stage"] == "image and prompt"]
    assert {row["name"] for row in whole} == {*PEERS, *(n for n in ours if n.startswith(("fused", "cached")))}
    in_fp32 = [row for row in whole if row["precision_class"] == "fp32"]
    assert all(row["relative_error"] < 2e-5 and row["mask_dice_worst"] > 0.999 for row in in_fp32)
    assert {row["name"] for row in whole} - {row["name"] for row in in_fp32} <= {
        "plain export, OpenVINO defaults", "ov.convert_model, OpenVINO defaults",
    }  # fmt: skip


def test_roles_and_prompt_encoding_are_named_for_every_row(beside_peers: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in beside_peers["results"]}
    assert {name for name, row in rows.items() if row["role"] == "baseline"} == set(PEERS)
    assert {name for name, row in rows.items() if row["role"] == "machine"} == {SGEMM}
    encoded = {name for name, row in rows.items() if row["includes_prompt_encoding"]}
    ours = ("fused", "prompt", "1 × image, 2 × prompt, new prompts", "2 × image, 1 × prompt, new prompts")
    assert encoded == {*PEERS, *(f"{name} fp32{backend}" for name in ours for backend in ("", ", OpenVINO"))}
    costs = {name: row["multiply_adds"] for name, row in rows.items()}
    counted = beside_peers["network"]["multiply_adds"]
    assert costs["cached prompt fp32"] == counted["image_encoder"] + counted["mask_decoder"]
    assert costs["plain export"] == costs["plain export, OpenVINO defaults"] == counted["plain"]
    many = counted["image_encoder"] + 2 * counted["mask_decoder"]
    assert costs["1 × image, 2 × prompt, cached prompts fp32"] == many
    assert costs["1 × image, 2 × prompt, new prompts fp32"] == many + 2 * counted["prompt_encoder"]


def test_openvino_with_its_defaults_reports_its_precision(beside_peers: dict[str, Any]) -> None:
    types = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    for row in beside_peers["results"]:
        if row["setting"] == "OpenVINO defaults":
            assert row["precision"] in types
            assert types[row["precision"]] in row["product_precisions"]
            assert row["inference_precision_hint"] == types[row["precision"]]
            assert 0.9 < row["mask_dice_worst"] <= row["mask_dice"] <= 1
    forced = next(row for row in beside_peers["results"] if row["name"] == "ov.convert_model")
    assert (forced["precision"], set(forced["product_precisions"])) == ("fp32", {"f32"})


def test_dice_is_of_masks_of_a_useful_size(beside_peers: dict[str, Any], tiny_network: CausalCLIPSeg) -> None:
    pairs = beside_peers["accuracy"]["pairs"]
    assert len(pairs) == 4
    assert all(0.05 <= pair["mask_fraction"] <= 0.95 and pair["used_for_dice"] for pair in pairs)
    assert 0 < beside_peers["accuracy"]["near_zero_fraction"] < 1


def test_new_prompts_are_encoded_in_the_timed_region_and_cached_ones_are_not(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    decoded: list[np.ndarray] = []
    run, decode = OnnxRuntimeBackend.run, Segmenter.decode

    def count(self: Any, graph: str, inputs: Any) -> Any:
        if graph == "prompt_encoder":
            encoded.append(len(inputs["tokens"]))
        return run(self, graph, inputs)

    def keep(self: Any, *inputs: Any) -> Any:
        decoded.append(decode(self, *inputs))
        return decoded[-1]

    def timings_of(candidates: Any, *_: Any, **__: Any) -> Any:
        monkeypatch.setattr(OnnxRuntimeBackend, "run", count)
        monkeypatch.setattr(Segmenter, "decode", keep)
        for form in ("new prompts", "cached prompts"):
            encoded.clear()
            candidate = next(c for c in candidates if c.form == form)
            candidate.run()
            seen[form] = list(encoded)
        raise StopIteration

    seen: dict[str, list[int]] = {}
    monkeypatch.setattr("cclip_deploy.benchmark.run.measure_interleaved", timings_of)
    monkeypatch.setattr("cclip_deploy.benchmark.run.measure_predict", lambda *_: {})
    options = quick(
        checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path, peers=True, backend="onnxruntime",
        workloads=((1, 20),),
    )  # fmt: skip
    with pytest.raises(StopIteration):
        bench_bundle(Bundle.open(tiny_bundle_path), options)
    assert seen == {"new prompts": [16, 4], "cached prompts": []}
    assert decoded[0].shape == (1, 20, 64, 96)
    np.testing.assert_allclose(decoded[0], decoded[1], rtol=1e-4, atol=1e-4)


def test_channels_last_is_measured_in_that_format(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen: dict[bool, set[bool]] = {}
    real = CausalCLIPSeg.causal_logits

    def watch(self: CausalCLIPSeg, image: Any, tokens: Any) -> Any:
        weights = [p for p in self.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        is_last = all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
        seen.setdefault(is_last, set()).add(image.is_contiguous(memory_format=torch.channels_last))
        return real(self, image, tokens)

    monkeypatch.setattr(CausalCLIPSeg, "causal_logits", watch)
    bench_bundle(Bundle.open(tiny_bundle_path), quick(checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path))
    assert seen == {True: {True}, False: {False}}


def test_with_peers_the_json_has_figures_peak_and_predict(beside_peers: dict[str, Any]) -> None:
    told = json.loads(json.dumps(beside_peers, allow_nan=False))
    assert told.keys() >= {"figures", "peak", "predict", "network"}
    assert 1e9 < told["peak"]["multiply_adds_per_second"] < 1e14
    assert told["predict"].keys() == {"onnxruntime", "openvino"}
    assert all(0.1 < cost["seconds"] < 60 and cost["peak_bytes"] > 2**25 for cost in told["predict"].values())
    of_two = [f["form"] for f in told["figures"] if f["workload"] == [1, 2] and f["compared_with"] == "plain"]
    assert of_two == ["new prompts", "cached prompts"] * 2
    assert (told["network"]["name"], told["network"]["image_hw"]) == ("tiny", [64, 96])


def test_a_bundle_above_its_error_limit_is_not_timed(
    tiny_bundle_path: Path, plain_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    change_weights(copy / "graphs" / "fused.onnx", lambda weights: weights * np.float32(1.05))
    reseal(copy)
    with pytest.raises(ParityError, match=r"fused fp32 has .* above its limit.*verify BUNDLE --backend onnxruntime"):
        bench_bundle(Bundle.open(copy), quick(checkpoint=tiny_checkpoint, plain_bundle=plain_bundle_path))


def test_a_chosen_backend_is_timed_alone(tiny_bundle_path: Path) -> None:
    result = bench_bundle(Bundle.open(tiny_bundle_path), quick(backend="openvino"))
    assert {row["backend"] for row in result["results"]} == {"openvino"}
    assert [(r["baseline"], r["candidate"]) for r in result["ratios"]] == [
        ("fused fp32, OpenVINO", "cached prompt fp32, OpenVINO")
    ]


def test_invalid_options_are_a_usage_error(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--peers needs the checkpoint"):
        quick(peers=True)
    with pytest.raises(UsageError, match="at least 1 image and 1 prompt"):
        quick(peers=True, checkpoint=tiny_checkpoint, workloads=((0, 1),))
