"""Pages are readable on a phone, in the dark, and with a screen reader."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cclip_deploy.common.html_page import Figure, Section, Table, Tile, save_page, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
PLOT = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
WIDE = Table(
    tuple(f"column {number}" for number in range(12)),
    ((*["a cell that is far too long for one line of a phone"] * 10, True, False),) * 3,
    frozenset({3, 4}),
)
SECTIONS = [
    Section("", warnings=("Fewer than 20 patients.",), tiles=(Tile.of("Dice", "0.85 [0.84, 0.86]"), Tile("HD95", "3"))),
    Section("Scores", ("Some text with `a/very/long/path/" + "x" * 200 + "`.",), table=WIDE),
    Section("Images", figures=(Figure(PIXEL, "Worst case: Dice 0.1"), Figure(PLOT, "Dice by threshold", "A curve"))),
]


@pytest.fixture(scope="module")
def page() -> str:
    return write_page("Evaluation", "Checkpoint x on y.", SECTIONS)


def in_browser(page: str, folder: Path, script: str, width: int, dark: bool = False) -> object:
    """Open a page in headless Chromium and return the JSON value of an asynchronous function body."""
    call = f"(async () => {{ {script} }})().then(found => {{ document.title = JSON.stringify(found) }})"
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{call}</script></body>"), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},900",
        "--virtual-time-budget=20000", "--dump-dom", (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    return json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_violation(page: str, tmp_path: Path, dark: bool) -> None:
    axe = Path(pytest.importorskip("axe_core_python").__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    script = (
        f"{axe}; const found = await axe.run(document); "
        "return [found.passes.length, found.violations.map(v => [v.id, v.impact, v.nodes[0].html])]"
    )
    passes, violations = in_browser(page, tmp_path, script, 1200, dark)  # type: ignore[misc]
    assert violations == []
    assert passes > 15


@needs_browser
def test_a_low_contrast_is_found(page: str, tmp_path: Path) -> None:
    """The check of the test above sees the page's colors."""
    axe = Path(pytest.importorskip("axe_core_python").__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    script = f"{axe}; return (await axe.run(document)).violations.map(v => v.id)"
    assert in_browser(page.replace("--soft: #54616d", "--soft: #c0c8d0"), tmp_path, script, 1200) == ["color-contrast"]


@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
def test_only_the_frame_of_a_wide_table_scrolls(page: str, tmp_path: Path, width: int) -> None:
    script = (
        "const frame = document.querySelector('.frame'), root = document.documentElement; "
        "return [root.scrollWidth - root.clientWidth, frame.scrollWidth - frame.clientWidth > 300]"
    )
    assert in_browser(page, tmp_path, script, width) == [0, True]


@needs_browser
def test_the_dark_form_follows_the_system(page: str, tmp_path: Path) -> None:
    script = "return getComputedStyle(document.body).backgroundColor"
    light, dark = (in_browser(page, tmp_path, script, 800, dark) for dark in (False, True))
    assert (light, dark) == ("rgb(245, 247, 249)", "rgb(18, 23, 28)")


def test_figures_have_an_alternative_text(page: str) -> None:
    assert re.findall(r'alt="(.*?)"', page) == ["Worst case: Dice 0.1", "A curve"]


def test_a_page_needs_no_other_file_and_no_network(page: str) -> None:
    assert re.findall(r"https?:|<script|<link|@import|url\(", page) == []


def test_a_file_name_that_is_not_utf_8_can_be_saved(tmp_path: Path) -> None:
    save_page(write_page("film\udcff.png", "", []), tmp_path / "a.html")
    assert "<h1>film\\udcff.png</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")
