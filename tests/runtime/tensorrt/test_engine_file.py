"""Engines are checked for hash, version and GPU before TensorRT reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError, CclipError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.device import GpuFacts
from cclip_deploy.runtime.tensorrt.engine_file import engines_of, load_engine
from tests.bundles import reseal
from tests.runtime.fake_gpu import FACTS, FakeGpu
from tests.runtime.fake_tensorrt import FakeTensorRt, engine_bundle

Make = Callable[..., Bundle]


@pytest.fixture
def make(tiny_bundle_path: Path, tmp_path: Path) -> Make:
    return lambda **changes: engine_bundle(tiny_bundle_path, tmp_path, **changes)


def load(bundle: Bundle, facts: GpuFacts = FACTS) -> tuple[Any, FakeTensorRt]:
    """Load the mask decoder's engine; return it, or the error, and the binding."""
    binding: Any = FakeTensorRt(FakeGpu(), bundle)
    entry = engines_of(bundle, "tensorrt-rtx", "fp32")["mask_decoder"]
    try:
        return load_engine(bundle, entry, binding, facts), binding
    except CclipError as error:
        return error, binding


def test_a_good_engine_is_deserialized(make: Make) -> None:
    loaded, binding = load(make())
    assert loaded.graph == "mask_decoder"
    assert binding.deserialized == [b"engine of mask_decoder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend_version": "1.6"}, r"built with tensorrt-rtx 1\.6, this process has tensorrt-rtx 1\.7.*build-engine"),
        ({"runs_on": None}, "does not record for which GPU"),
        ({"runs_on": {"compute_capabilities": ["8.6", "12.0"]}}, r"capability 8\.6, 12\.0; .* Fake GPU .* 8\.9"),
        ({"runs_on": {"compute_capabilities": ["12.0"], "and_later": True}}, r"12\.0 or later; this machine"),
        ({"runs_on": {"compute_capabilities": ["8.9"], "gpu": "Other GPU"}}, r"runs on a Other GPU \(8\.9\); this"),
    ],
)  # fmt: skip
def test_an_engine_for_another_gpu_or_version_is_refused_before_it_is_deserialized(
    make: Make, changes: dict[str, Any], message: str
) -> None:
    error, binding = load(make(**changes))
    assert isinstance(error, EnvironmentIssue)
    with pytest.raises(EnvironmentIssue, match=message):
        raise error
    assert binding.deserialized == []


@pytest.mark.parametrize(
    "runs_on",
    [
        {"compute_capabilities": ["8.0"], "and_later": True},
        {"compute_capabilities": ["8.9"], "gpu": "Fake GPU"},
        {"compute_capabilities": ["8.6", "8.9"]},
    ],
)
def test_an_engine_for_this_gpu_is_accepted(make: Make, runs_on: dict[str, Any]) -> None:
    assert load(make(runs_on=runs_on))[1].deserialized


def test_a_changed_engine_is_refused_before_it_is_deserialized(make: Make) -> None:
    bundle = make()
    (bundle.path / "engines/mask_decoder.engine").write_bytes(b"engine of something else")
    error, binding = load(bundle)
    assert isinstance(error, BundleError)
    assert binding.deserialized == []


def test_an_engine_that_changes_after_its_checksum_was_read_is_refused(make: Make) -> None:
    bundle = make()
    bundle.check("engines/mask_decoder.engine")
    (bundle.path / "engines/mask_decoder.engine").write_bytes(b"engine of something else")
    error, binding = load(bundle)
    assert isinstance(error, BundleError)
    assert "was altered" in str(error)
    assert binding.deserialized == []


def test_the_message_of_a_failed_deserialization_is_reported(make: Make) -> None:
    bundle = make()
    (bundle.path / "engines/mask_decoder.engine").write_bytes(b"junk")
    reseal(bundle.path)
    error, _ = load(Bundle.open(bundle.path))
    assert isinstance(error, EnvironmentIssue)
    assert "does not load engines/mask_decoder.engine: this is not an engine" in str(error)


def test_an_engine_with_other_tensors_than_its_graph_is_refused(make: Make) -> None:
    bundle = make()
    (bundle.path / "engines/mask_decoder.engine").write_bytes(b"engine of prompt_encoder")
    reseal(bundle.path)
    error, _ = load(Bundle.open(bundle.path))
    assert isinstance(error, BundleError)
    assert "mask_decoder.engine has inputs" in str(error)


def test_an_engine_of_a_removed_graph_is_refused(make: Make) -> None:
    error, _ = load(make(graph_sha256="0" * 64))
    assert isinstance(error, BundleError)
    assert "no longer in the bundle" in str(error)


def test_a_missing_engine_is_reported_with_its_build_command(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"has no fp32 engine for tensorrt-rtx; it has none\. .* --fp32 --backend"):
        engines_of(tiny_bundle, "tensorrt-rtx", "fp32")
    with pytest.raises(UsageError, match=r"no int8-fp16 engine .* mask_decoder fp32 tensorrt-rtx.* --int8 --fp16"):
        engines_of(make(), "tensorrt-rtx", "int8-fp16")


def test_unquantized_graphs_use_engines_in_the_precision_of_the_rest(make: Make) -> None:
    bundle = make()
    engines = tuple(
        e.model_copy(update={"precision": "int8" if e.graph == "image_encoder" else "fp32"})
        for e in bundle.manifest.engines
    )
    mixed = Bundle(bundle.path, bundle.manifest.model_copy(update={"engines": engines}), bundle.sums)
    found = engines_of(mixed, "tensorrt-rtx", "int8")
    assert {graph: entry.precision for graph, entry in found.items()} == {
        "image_encoder": "int8", "prompt_encoder": "fp32", "mask_decoder": "fp32",
    }  # fmt: skip
