"""The documentation site builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs mkdocs-material: pip install 'cclip-deploy[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    documents = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert documents | {"training", "export", "engines", "benchmarks", "changelog", "contributing"} <= pages | {"index"}


def test_links_between_readme_and_docs_work_on_the_site(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    targets = {re.sub(r"#.*", "", link) for link in re.findall(r'<a href="([^":]+)"', home)} - {""}
    assert {"precision/", "gpu/", "training/", "decisions/0002-exact-rewrites/"} <= targets
    assert [target for target in targets if not (site / target).exists()] == []
    assert [image for image in re.findall(r'<img [^>]*src="([^":]+)"', home) if not (site / image).exists()] == []


def test_the_reference_shows_signatures_and_errors(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "reference/index.html").read_text(encoding="utf-8"))
    assert "export_bundle" in text
    assert "ParityError" in text
    assert len(re.findall(r"Raises:", text)) > 5


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead elsewhere; style sheets, scripts, fonts and images may not."""
    loads = re.compile(r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]* href="https?:[^"]*"[^>]*stylesheet')
    for path in site.rglob("*.html"):
        assert loads.findall(path.read_text(encoding="utf-8")) == []
