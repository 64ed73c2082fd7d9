"""Build settings: TensorRT-RTX builds with them; a fake configuration of plain TensorRT records them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.errors import DataError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import load_binding
from cclip_deploy.runtime.tensorrt.builder import EngineOptions, build_engine
from cclip_deploy.runtime.tensorrt.settings import EngineSettings, TimingCache, apply_settings, engine_target

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RANGES = {"x": ((1, 16), (1, 16), (8, 16))}
PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return load_binding("tensorrt-rtx")


@pytest.fixture(scope="module")
def graph() -> bytes:
    """One matrix product with a dynamic batch."""
    import numpy as np

    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 16)) for name in ("x", "y")]
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="only")], "net", ends[:1], ends[1:], [weight]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


class Config:
    """Fake builder configuration of plain TensorRT that records its settings."""

    def __init__(self, takes_cache: bool = True) -> None:
        self.flags: set[str] = {"TF32"}
        self.takes_cache = takes_cache
        self.cache: bytes | None = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return self.takes_cache

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: (self.cache or b"") + b"+measured")


@pytest.fixture
def plain() -> Any:
    """The parts of the module tensorrt that the settings use."""
    return SimpleNamespace(
        __name__="tensorrt", __version__="10.13.0",
        BuilderFlag=SimpleNamespace(REFIT="REFIT", STRIP_PLAN="STRIP_PLAN", TF32="TF32"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [EngineSettings(), EngineSettings(("8.6", "8.9")), EngineSettings(effort=5), EngineSettings(tf32=True),
                 EngineSettings(capturable=False)],
)  # fmt: skip
def test_rtx_builds_engines_with_settings(graph: bytes, rtx: ModuleType, settings: EngineSettings) -> None:
    built = build_engine(graph, EngineOptions(RANGES, settings=settings), rtx)
    assert len(built.engine) > 1000
    assert built.timing_cache is None
    assert engine_target(settings, rtx, None).compute_capabilities == (settings.compute_capabilities or PORTABLE)  # type: ignore[union-attr]


def test_a_second_profile_enlarges_the_engine(graph: bytes, rtx: ModuleType) -> None:
    one = {"x": ((1, 16), (1, 16), (1, 16))}
    alone = build_engine(graph, EngineOptions(RANGES), rtx)
    both = build_engine(graph, EngineOptions(RANGES, further_shapes=(one,)), rtx)
    assert len(both.engine) > 1.5 * len(alone.engine)
    with pytest.raises(UsageError, match="does not fit"):
        build_engine(graph, EngineOptions(RANGES, further_shapes=({"x": ((1, 8), (1, 8), (1, 8))},)), rtx)


@pytest.mark.parametrize("settings", [EngineSettings(refit=True), EngineSettings(strip_weights=True)])
def test_rtx_reports_that_a_refitted_engine_needs_a_gpu(
    graph: bytes, rtx: ModuleType, settings: EngineSettings
) -> None:
    try:
        built = build_engine(graph, EngineOptions(RANGES, settings=settings), rtx)
    except EnvironmentIssue as error:
        assert "needs a GPU to build an engine that is refitted or stripped" in str(error)  # noqa: PT017
    else:
        assert built.engine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EngineSettings(("9.0",)), r"does not build for compute capability 9\.0; it supports 7\.5, 8\.0"),
        (EngineSettings(compatibility="ampere-plus"), "portable by default"),
        (EngineSettings(timing_cache=Path("x")), "has no timing cache: it measures nothing"),
    ],
)
def test_settings_that_rtx_does_not_support_are_refused(
    graph: bytes, rtx: ModuleType, settings: EngineSettings, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(graph, EngineOptions(RANGES, settings=settings), rtx)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="must be 0 to 5, got 6"):
        EngineSettings(effort=6)
    with pytest.raises(UsageError, match=r"named twice: 8\.6, 8\.6"):
        EngineSettings(("8.6", "8.6"))
    with pytest.raises(UsageError, match=r"FP8 needs .* 8\.9 or newer; 8\.6 was requested"):
        EngineOptions(precision="fp8", settings=EngineSettings(("8.9", "8.6")))


def test_plain_tensorrt_gets_flags_and_compatibility(plain: Any) -> None:
    config: Any = Config()
    apply_settings(config, EngineSettings(compatibility="ampere-plus", refit=True, strip_weights=True, effort=4), plain)
    assert config.flags == {"REFIT", "STRIP_PLAN"}
    assert (config.hardware_compatibility_level, config.builder_optimization_level) == ("AMPERE_PLUS", 4)
    apply_settings(with_tf32 := Config(), EngineSettings(tf32=True), plain)
    assert with_tf32.flags == {"TF32"}
    for settings, message in (
        (EngineSettings(("8.9",)), "the GPU of this machine only"),
        (EngineSettings(compatibility="same-compute-capability"), "has no hardware compatibility same-compute"),
    ):
        with pytest.raises(UsageError, match=message):
            apply_settings(config, settings, plain)


def test_targets_of_a_plain_engine(plain: Any) -> None:
    local = ("NVIDIA L4", "8.9")
    own = engine_target(EngineSettings(), plain, local)
    same = engine_target(EngineSettings(compatibility="same-compute-capability"), plain, local)
    ampere = engine_target(EngineSettings(compatibility="ampere-plus"), plain, local)
    assert own is not None
    assert same is not None
    assert ampere is not None
    assert (own.compute_capabilities, own.gpu) == (("8.9",), "NVIDIA L4")
    assert (same.compute_capabilities, same.gpu) == (("8.9",), None)
    assert (ampere.compute_capabilities, ampere.and_later) == (("8.0",), True)
    assert engine_target(EngineSettings(), plain, None) is None


def test_a_timing_cache_is_read_written_and_hashed(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "timing.cache"
    first = TimingCache(path, Config(), plain).write()
    assert (first.given_sha256, path.read_bytes()) == (None, b"+measured")
    second = TimingCache(path, Config(), plain).write()
    assert second.given_sha256 == first.left_sha256 == hashlib.sha256(b"+measured").hexdigest()
    assert path.read_bytes() == b"+measured+measured"
    assert [p.name for p in path.parent.iterdir()] == ["timing.cache"]


def test_an_unreadable_timing_cache_is_reported(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        TimingCache(tmp_path, Config(), plain)


def test_a_timing_cache_of_another_gpu_is_refused_and_unchanged(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"of another GPU")
    with pytest.raises(EnvironmentIssue, match=r"was not made with this GPU and tensorrt 10\.13\.0"):
        TimingCache(path, Config(takes_cache=False), plain)
    assert path.read_bytes() == b"of another GPU"
