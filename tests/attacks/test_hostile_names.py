"""Markup in names, prompts and table cells is printed literally, and terminal codes are removed.

Before, table cells and lines without `markup=False` obeyed `[red]` and `[link=…]`, an unmatched `[/b]` in an arm's or a
graph's name ended the command with a MarkupError, and marks that turn the direction of writing reached the terminal.
"""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cclip_deploy.cli import console
from cclip_deploy.cli.console import image_progress, progress, reports_errors, styled, table, yes_or_no
from cclip_deploy.common.html_page import Figure, Section, Table, Tile, write_page
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import DataError
from tests.cli.run import invoke

MARKUP = ["[red]a[/red]", "[/b]", "[link=https://x]a[/link]", "[bold", "\\[x]", "[]", "[@click=f()]a[/]", ":smile:"]
CODES = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnp.exe", "\u2066a\u2069", "\x08\x08", "\x7f"]
STEERING = set("\x1b\x07\x9b\x08\x7f\u202e\u2066\u2069")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What both consoles print, as to a terminal of 200 columns with colors."""
    file = io.StringIO()
    for name in ("stdout", "stderr"):
        made = console._SafeConsole(
            file=file, markup=False, highlight=False, emoji=False, width=200, force_terminal=True, color_system=None
        )
        monkeypatch.setattr(console, name, made)
    return file


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_shown_as_it_is_in_every_kind_of_output(shown: io.StringIO, text: str) -> None:
    made = table(text, text, f"{text} ")
    made.add_row(text, text)
    console.stdout.print(made)
    console.stdout.print(f"1 {text}", text, styled(text, "red"), soft_wrap=True)
    assert shown.getvalue().count(text) == 8


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_errors_and_progress_is_shown_as_it_is(shown: io.StringIO, text: str) -> None:
    @reports_errors
    def fail() -> None:
        with progress(quiet=False) as tell, image_progress(quiet=False) as on_picture:
            tell(text)
            on_picture(Path(text), 1, 2)
        raise DataError(text)

    with pytest.raises(SystemExit):
        fail()
    assert f"Error: {text}" in shown.getvalue()


@pytest.mark.parametrize("code", CODES)
def test_terminal_codes_are_dropped_in_every_kind_of_output(shown: io.StringIO, code: str) -> None:
    made = table(code, code)
    made.add_row(f"{code}cell")
    console.stdout.print(made)
    console.stdout.print(code, f"line{code}", styled(f"{code}styled", "red"), soft_wrap=True)

    @reports_errors
    def fail() -> None:
        raise DataError(f"{code}reason")

    with pytest.raises(SystemExit):
        fail()
    assert not STEERING & set(shown.getvalue())
    for word in ("cell", "line", "styled", "reason"):
        assert word in shown.getvalue()


def test_verdicts_are_in_color_and_only_where_the_project_says_so() -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, color_system="standard", width=80)
    terminal.print(yes_or_no(True), yes_or_no(False), yes_or_no(None))
    assert "\x1b[32myes" in file.getvalue()
    assert "\x1b[1;31mno" in file.getvalue()


def test_no_command_uses_markup_or_another_console() -> None:
    """One place decides: both consoles have markup off, and nothing makes text from it."""
    folder = Path(console.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "attr", getattr(node, "id", ""))
            assert named not in ("from_markup", "escape", "from_ansi"), path
            if isinstance(node, ast.keyword) and node.arg == "markup":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False
            assert not (named == "Console" and path.name != "console.py"), path
    assert not console.stdout._markup
    assert not console.stderr._markup


def save(path: Path, value: int = 9) -> Path:
    Image.fromarray(np.full((16, 16), value, np.uint8)).save(path)
    return path


NAME = "[link=https:x]a[\x1b]0;b\u202e[b].png"


def test_predict_shows_names_and_prompts_as_they_are(tiny_bundle_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[red]in[bold]"
    folder.mkdir()
    save(folder / NAME)
    (folder / "[blink]torn.png").write_bytes(b"\x89PNG [bold]")
    prompt = "left [/b] lung [link=https://x]y"
    arguments = ("predict", tiny_bundle_path, folder, "--prompt", prompt, "-o", tmp_path / "out", "--threads", "1")
    done = invoke(*arguments)
    assert done.exit_code == 6
    assert isinstance(done.exception, SystemExit)
    lines = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    cells = ["".join("".join(parts).split()) for parts in zip(*lines, strict=True)]
    assert "[red]in[bold]/[link=https:x]a[]0;b[b].png" in cells[0]
    assert "left[/b]lung" in cells[1]
    assert "[red]in[bold]" in done.stderr
    assert not STEERING & set(done.stdout + done.stderr)
    document = json.loads(invoke(*arguments, "--json").stdout)
    assert Path(document["predictions"][0]["image"]).name == NAME
    assert document["predictions"][0]["prompt"] == prompt


def test_data_and_evaluate_show_names_as_they_are(tiny_bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "[red]set[/i]\x1b]0;x"
    write_dataset(folder, {"train": 1, "test": 2}, (64, 96), 3)
    for place in ("images", "masks"):
        for path in (folder / place).glob("test*"):
            path.rename(path.with_name(path.name.replace("test", "[b]<script>&[s]")))
    rows = (folder / "table.csv").read_text().replace("/test-", "/[b]<script>&[s]-")
    (folder / "table.csv").write_text(rows)
    done = invoke("data", folder, "--bundle", tiny_bundle_path)
    assert done.exit_code == 0, done.stderr
    assert "[red]set[/i]" in done.stdout.replace("\n", "")
    report = tmp_path / "report"
    done = invoke("evaluate", tiny_bundle_path, folder, "-o", report, "--threads", "1")
    assert done.exit_code == 0, done.stderr
    assert "[b]<script>&[s]" in done.stderr.replace("\n", "")
    assert not STEERING & set(done.stdout + done.stderr)
    page = (report / "index.html").read_text()
    assert "<script" not in page
    assert "[b]&lt;script&gt;&amp;[s]" in page


HTML = "<script>alert('x')</script>\" onerror=\"y"


def test_every_part_of_a_page_is_escaped() -> None:
    page = write_page(
        HTML,
        HTML,
        [Section(HTML, (HTML,), (HTML,), (Tile(HTML, HTML, HTML),), Table((HTML,), ((HTML,),)), (Figure(HTML, HTML),))],
    )
    assert "<script" not in page
    assert 'onerror="' not in page
    assert page.count("&lt;script&gt;") == 15


@pytest.mark.parametrize("name", ["../../up", "a/b", "[/b]", "$\\frac$", "", ".", "\x1b[2J", "x" * 300])
def test_an_arm_of_a_plan_has_a_plain_name(tmp_path: Path, name: str) -> None:
    """Arms name folders, table rows and labels of plots."""
    plan = tmp_path / "plan.toml"
    plan.write_text(f'reference = "off"\n[recipe.data]\nfolder = "x"\n[arms.off]\n[arms.{json.dumps(name)}]\n')
    done = invoke("ablate", plan, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert not STEERING & set(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]
