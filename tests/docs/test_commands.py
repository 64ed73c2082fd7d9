"""Every command in README and docs exists with its options; those of README run, at a small size."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from cclip_deploy.cli.commands import app
from tests.cli.run import invoke
from tests.docs.code_blocks import ROOT, all_commands, commands
from tests.imaging.test_dicom import write_dicom

COMMANDS = all_commands()
SUBCOMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
THREADS = ["--threads", "1"]
SMALL = {
    "export": ["--image-size", "64x96", *THREADS],
    "bench": ["--rounds", "3", "--warmup", "0", "--no-compile", *THREADS],
    "predict": THREADS,
    "verify": THREADS,
}
"""Options that make a command of README quick."""
ELSEWHERE = {
    "build-engine": "tests/engines: needs tensorrt-rtx",
    "train": "tests/demo trains this recipe",
    "evaluate": "tests/demo evaluates this checkpoint",
    "ablate": "tests/ablation: takes an hour as written",
}


def shown(page_and_arguments: tuple[str, list[str]]) -> str:
    page, arguments = page_and_arguments
    return f"{page}: {shlex.join(arguments)}"[:100]


@pytest.mark.parametrize("command", COMMANDS, ids=shown)
def test_a_documented_command_has_existing_options_and_files(command: tuple[str, list[str]]) -> None:
    _, (program, name, *arguments) = command
    if program == "python":
        module = ROOT / (arguments[0].replace(".", "/") if name == "-m" else name)
        assert module.exists() or module.with_suffix(".py").exists()
        return
    if not any(argument.startswith("[") for argument in arguments):  # a synopsis
        with SUBCOMMANDS[name].make_context(name, list(arguments)) as context:
            assert context.params


def test_every_page_is_read() -> None:
    counts = Counter(page for page, _ in COMMANDS)
    assert counts["README.md"] >= 12
    assert len(COMMANDS) >= 60
    assert len(counts) >= 9


def test_an_option_that_was_removed_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        SUBCOMMANDS["verify"].make_context("verify", ["lungs.cclip", "--gone"])


def test_the_commands_of_readme_run_in_order(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny checkpoint as checkpoint.pth. The command for a GPU ends with the error that asks for one."""
    monkeypatch.chdir(tmp_path)
    pixels = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96)
    write_dicom(tmp_path / "image.dcm", pixels)
    Path("images").mkdir()
    for path in ("image.png", "images/a.png", "images/b.png"):
        Image.fromarray((pixels >> 5).astype(np.uint8)).save(path)
    ran = set()
    for program, name, *arguments in commands("README.md"):
        if program == "cclip-deploy" and name not in ELSEWHERE:
            given = [str(tiny_checkpoint) if argument == "checkpoint.pth" else argument for argument in arguments]
            given = [argument for argument in given if argument != "--peers"]  # tests/benchmark has it
            done = invoke(name, *given, *SMALL.get(name, []))
            needs_gpu = "tensorrt-rtx" in given
            assert done.exit_code == (2 if needs_gpu else 0), f"{name} {given}: {done.stderr}"
            assert not needs_gpu or "has no fp16 engine" in done.stderr
            ran.add(name)
    assert ran == {"export", "predict", "verify", "bench", "inspect", "doctor"}
    masks = {path.name for path in Path("predictions").rglob("*.png")}
    assert len(masks) >= 6
