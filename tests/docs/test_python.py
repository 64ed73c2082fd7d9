"""The Python examples of README and docs/python.md run as they are written."""

from __future__ import annotations

import io
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cclip_deploy
from tests.imaging.test_dicom import write_dicom

ROOT = Path(__file__).parents[2]
INSTALL = "pip install fastapi python-multipart httpx"


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


EXAMPLES = [(page, code) for page in ("README.md", "docs/python.md") for code in examples(page)]
(SERVICE,) = [code for _, code in EXAMPLES if "FastAPI" in code]


@pytest.fixture
def beside_a_bundle(tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `lungs.cclip` and `image.dcm`, which the examples name; it becomes the working directory."""
    (tmp_path / "lungs.cclip").symlink_to(tiny_bundle_path)
    film = np.random.default_rng(0).integers(0, 4096, (48, 36)).astype(np.uint16)
    write_dicom(tmp_path / "image.dcm", film, bits=12, PixelSpacing=[0.2, 0.2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "code"), [e for e in EXAMPLES if e[1] != SERVICE], ids=lambda text: text[:20].split("\n")[0]
)
def test_an_example_runs(page: str, code: str, beside_a_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    assert re.search(r"\d", capsys.readouterr().out)


def test_the_service_is_short_and_imports_this_project_once() -> None:
    assert len(SERVICE.splitlines()) <= 12
    assert SERVICE.count("cclip_deploy") == 1
    assert "tempfile" not in SERVICE


class _HttpError(Exception):
    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail


def _stand_in() -> types.ModuleType:
    """The few names of FastAPI that the example uses."""

    class App:
        def post(self, path: str) -> Callable[[Any], Any]:
            return lambda function: function

    module = types.ModuleType("fastapi")
    module.FastAPI, module.HTTPException, module.UploadFile = App, _HttpError, object  # type: ignore[attr-defined]
    return module


def test_the_body_of_the_service_answers(beside_a_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", _stand_in())
    names: dict[str, Any] = {}
    exec(compile(SERVICE, "docs/python.md", "exec"), names)

    def post(content: bytes, prompt: str) -> dict[str, Any]:
        return dict(names["segment"](types.SimpleNamespace(file=io.BytesIO(content)), prompt))

    with names["segmenter"]:
        answer = post((beside_a_bundle / "image.dcm").read_bytes(), "left lung")
        assert answer["area_mm2"] == pytest.approx(0.04 * answer["area_px"])
        for content, prompt, said in ((b"no image", "left lung", "not a complete PNG"), (b"", "", "prompt is empty")):
            with pytest.raises(_HttpError) as caught:
                post(content, prompt)
            assert caught.value.status == 400
            assert said in caught.value.detail


def test_the_service_answers_over_http(beside_a_bundle: Path) -> None:
    for package in ("fastapi", "multipart", "httpx"):
        pytest.importorskip(package, reason=INSTALL)
    from fastapi.testclient import TestClient

    names: dict[str, Any] = {"__name__": "app"}
    exec(compile(SERVICE, "docs/python.md", "exec"), names)
    with names["segmenter"]:
        client = TestClient(names["app"])
        film = (beside_a_bundle / "image.dcm").read_bytes()
        done = client.post("/segment", params={"prompt": "left lung"}, files={"image": film})
        assert done.status_code == 200
        assert done.json()["prompt"] == "left lung"
        refused = client.post("/segment", params={"prompt": "left lung"}, files={"image": b"no image"})
        assert refused.status_code == 400
        assert "not a complete PNG" in refused.json()["detail"]


def test_the_package_is_marked_as_typed() -> None:
    """PEP 561; hatch puts every file of the package into the wheel."""
    assert (Path(cclip_deploy.__file__).parent / "py.typed").is_file()


def test_every_public_name_is_there() -> None:
    assert all(hasattr(cclip_deploy, name) for name in cclip_deploy.__all__)
    assert set(cclip_deploy.__all__) - {"__version__"} == set(cclip_deploy._MODULES)
