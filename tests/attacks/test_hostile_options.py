"""Out-of-range options and unwritable outputs are refused with one line, before any work.

Before: `--threads 100000` ended the process in ONNX Runtime, `--image-size 9999999968` in torch's allocator, and
`train -o` below a folder that cannot be written told so after the training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.limits import LARGEST_IMAGE_SIDE, MAX_THREADS
from cclip_deploy.common.paths import check_writable
from cclip_deploy.common.threads import check_threads
from cclip_deploy.datasets.synthetic import generator as synthetic
from cclip_deploy.errors import CclipError, EnvironmentIssue, UsageError
from cclip_deploy.evaluation.evaluate import NetworkConfig, open_network
from cclip_deploy.evaluation.report import check_report_folder
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.model.config import InputForm, image_hw
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.run import train
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.cli.run import invoke

NO_FOLDER = Path("/proc/nowhere/out")
"""Below a file system that takes no files, whoever asks."""
RECIPE = 'model = "tiny"\nimage_size = {size}\n[data]\nfolder = "nowhere"\n'
TOO_MANY = [MAX_THREADS + 1, 100_000, 2**31, 2**63, 0, -1]


@pytest.mark.parametrize("threads", TOO_MANY)
def test_threads_are_bounded_wherever_they_are_used(
    tiny_bundle_path: Path, tiny_checkpoint: Path, threads: int
) -> None:

    bundle = Bundle.open(tiny_bundle_path)
    uses: list[Callable[[], object]] = [
        lambda: check_threads(threads),
        lambda: OnnxRuntimeBackend(bundle, threads=threads).load("mask_decoder"),
        lambda: OpenVinoBackend(bundle, threads=threads),
        lambda: BenchOptions(threads=threads),
        lambda: export_bundle(tiny_checkpoint, Path("nowhere"), ExportOptions(threads=threads), "test"),
        lambda: open_network(NetworkConfig(tiny_checkpoint, threads=threads)).__enter__(),
        lambda: verify_bundle(bundle, VerifyOptions(tiny_checkpoint, threads=threads)),
    ]
    for use in uses:
        with pytest.raises(UsageError, match=f"{threads} threads are out of range. Use 1 to {MAX_THREADS}"):
            use()
    check_threads(MAX_THREADS)
    check_threads(None)


@pytest.mark.parametrize("threads", [MAX_THREADS + 1, 100_000])
def test_recipes_and_commands_bound_threads(tmp_path: Path, threads: int) -> None:
    for key in ("threads", "loader_threads"):
        recipe = tmp_path / "a.toml"
        recipe.write_text(f'{key} = {threads}\nmodel = "tiny"\n')
        with pytest.raises(UsageError, match=rf"{key}: .*{MAX_THREADS}"):
            TrainConfig.from_toml(recipe)
    commands = (
        "verify x",
        "bench x",
        "export x -o y",
        "predict x y --prompt z",
        "evaluate x y",
        "demo",
        "build-engine x",
    )
    for command in (*commands, "tune-precision x -o y --evaluation-set z", "ablate x"):
        option = "--jobs" if command.startswith("ablate") else "--threads"
        done = invoke(*command.split(), option, str(threads))
        assert done.exit_code == 2, command
        assert str(MAX_THREADS) in done.stderr


@pytest.mark.parametrize(
    "size", ["9999999968", f"{LARGEST_IMAGE_SIDE + 32}", "224x9999999968", "9" * 5000, "-32", "0", "nan"]
)
def test_image_sizes_are_bounded_wherever_they_are_given(tmp_path: Path, tiny_checkpoint: Path, size: str) -> None:
    with pytest.raises(UsageError):
        image_hw(size)
    done = invoke("export", tiny_checkpoint, "-o", tmp_path / "out", f"--image-size={size}")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: Image size ")
    done = invoke("evaluate", tiny_checkpoint, tmp_path, f"--image-size={size}")
    assert (done.exit_code, done.stderr[:18]) == (2, "Error: Image size ")
    recipe = tmp_path / "a.toml"
    recipe.write_text(RECIPE.format(size=f'"{size}"'))
    done = invoke("train", recipe, "-o", tmp_path / "run")
    assert (done.exit_code, done.stderr[:18]) == (2, "Error: Image size ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.toml"]
    with pytest.raises(UsageError):
        InputForm.from_dict({"image_hw": [9_999_999_968, 224], "prompt_length": 24})
    assert image_hw(LARGEST_IMAGE_SIDE) == (LARGEST_IMAGE_SIDE, LARGEST_IMAGE_SIDE)


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    synthetic.write_dataset(tmp_path / "set", {"train": 2, "test": 2}, (64, 64), 3)
    return tmp_path / "set"


def outputs(
    bundle: Path, checkpoint: Path, data: Path, recipe: Path, plan: Path, output: Path
) -> dict[str, tuple[object, ...]]:
    """Every command that writes where it is told."""
    return {
        "train": ("train", recipe, "--data", data, "-o", output),
        "evaluate": ("evaluate", bundle, data, "-o", output),
        "export": ("export", checkpoint, "-o", output),
        "predict": ("predict", bundle, data / "images", "--prompt", "x", "-o", output),
        "bench": ("bench", bundle, "-o", output / "bench.json"),
        "tune-precision": (
            "tune-precision",
            bundle,
            "-o",
            output / "a.toml",
            "--evaluation-set",
            data,
            "--precision",
            "fp16",
        ),
        "ablate": ("ablate", plan, "--data", data, "-o", output),
        "demo": ("demo", "-o", output),
        "synth": ("synth", output, "--images", "5"),
    }


COMMANDS = list(outputs(*[Path()] * 6))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["no file system", "below a file", "a long name", "a loop"])
def test_an_output_that_cannot_be_written_is_reported_before_the_work(
    tiny_bundle_path: Path, tiny_checkpoint: Path, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: str, place: str,
) -> None:  # fmt: skip
    """The work would be a training, a session or a drawing; none of them may begin."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    output = {
        "no file system": NO_FOLDER, "below a file": tmp_path / "file" / "out", "a long name": tmp_path / ("x" * 5000),
        "a loop": tmp_path / "loop" / "out",
    }[place]  # fmt: skip
    recipe, plan = tmp_path / "a.toml", tmp_path / "plan.toml"
    recipe.write_text('model = "tiny"\nimage_size = 64\nepochs = 1\n')
    plan.write_text(
        'name = "a"\nquestion = "q"\nrecipe = "a.toml"\nseeds = [0]\nreference = "x"\n[arms.x]\n[arms.y]\nseed = 1\n'
    )
    began = "the work began"
    for module in (
        "train.loop.run_epochs",
        "runtime.onnxruntime.cpu.make_session",
        "datasets.synthetic.generator.write_layout",
    ):
        name, function = module.rsplit(".", 1)
        monkeypatch.setattr(
            __import__(f"cclip_deploy.{name}", fromlist=["x"]), function, lambda *a, **k: pytest.fail(began)
        )
    done = invoke(*outputs(tiny_bundle_path, tiny_checkpoint, data_set, recipe, plan, output)[command])
    assert began not in str(done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (2, 3, 6), done.stderr
    assert done.stderr.splitlines()[-1].startswith(("Error: ", "│ Error: "))
    assert "Traceback" not in done.stderr


def test_nothing_is_left_of_the_trial_of_an_output(tmp_path: Path) -> None:
    check_writable(tmp_path, tmp_path / "a" / "b", None, tmp_path / "c.json")
    assert list(tmp_path.iterdir()) == []
    for path in (NO_FOLDER, Path("/proc/1/x"), tmp_path / ("x" * 300) / "y", Path("a\0b")):
        with pytest.raises(CclipError):
            check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported_early(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    for check in (check_writable, lambda path: check_report_folder(path, False)):
        with pytest.raises(EnvironmentIssue):
            check(tmp_path / "locked" / "out")


def test_a_training_tries_its_folder_before_it_reads_the_data() -> None:
    with pytest.raises(EnvironmentIssue, match="could not be written"):
        train(TrainConfig(), Path("/nowhere"), NO_FOLDER)
