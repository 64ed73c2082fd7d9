"""Every table and quoted number of README and docs is what the kept measurements give."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import performance, precision
from benchmarks.tables.markers import TABLE, VALUE, Page, unmarked_tables
from benchmarks.tables.pages import PAGES
from benchmarks.tables.sources import Measurements, markdown, with_interval
from cclip_deploy.benchmark.plot import TITLES

ROOT = Path(__file__).parent.parent
PAGES_OF_DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.path for page in PAGES]


def text_of(page: Page, root: Path = ROOT) -> str:
    return (root / page.path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measurements() -> Measurements:
    return Measurements(ROOT / "docs" / "measurements")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page_shows_what_was_measured(page: Page, measurements: Measurements) -> None:
    assert page.differences(text_of(page), measurements) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_one_changed_digit_in_any_region_is_found(page: Page, measurements: Measurements) -> None:
    text = text_of(page)
    for kind, pattern in (("table", TABLE), ("value", VALUE)):
        for region in pattern.finditer(text):
            digit = re.search(r"\d", region["body"])
            if digit is None:
                continue
            place = region.start("body") + digit.start()
            changed = f"{text[:place]}{(int(digit[0]) + 1) % 10}{text[place + 1 :]}"
            assert page.differences(changed, measurements) == [f"{kind} '{region['name']}'"]
            assert page.render(changed, measurements) == text


def copy_of_pages(folder: Path) -> Path:
    for page in PAGES:
        (folder / page.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / page.path, folder / page.path)
    shutil.copytree(ROOT / "docs" / "measurements", folder / "docs" / "measurements")
    return folder


def run_tables(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.tables", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_check_fails_and_names_the_table_when_a_measurement_changes(tmp_path: Path) -> None:
    """The file that changes is the source of one page alone; writing then mends what `--check` found."""
    root = copy_of_pages(tmp_path)
    kept = root / "docs" / "measurements" / "ablation_synthetic_tiny.json"
    result = json.loads(kept.read_text())
    result["arms"]["off"]["dice_id"]["mean"] = 0.4567
    kept.write_text(json.dumps(result))
    failed = run_tables("--check", "--root", root)
    assert failed.returncode == 1
    assert failed.stdout == "docs/causal-evidence.md: table 'ablation scores' differs from docs/measurements\n"
    assert run_tables("--root", root).returncode == 0
    assert "| off | 0.457 [" in (root / "docs" / "causal-evidence.md").read_text()
    assert run_tables("--check", "--root", root).returncode == 0


def test_a_missing_measurement_is_said_in_the_tables_place(tmp_path: Path) -> None:
    page = Page("page.md", {"lost": lambda measurements: str(measurements.read("lost.json"))}, {})
    text = page.render("<!-- table: lost -->\n| 1 |\n<!-- /table -->\n", Measurements(tmp_path))
    assert "| 1 |" not in text
    assert "docs/measurements/lost.json is missing" in text


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: other -->\n<!-- /table -->\n",
        "no marker at all\n",
        "<!-- table: known -->\n<!-- /table -->\n<!-- value: 3 -->\n",
        "<!-- table: known -->\n<!-- /table -->\n<!-- table:known -->\n",
    ],
    ids=["unknown name", "unused renderer", "unpaired value", "misspelled marker"],
)
def test_markers_and_renderers_must_fit(text: str, tmp_path: Path) -> None:
    page = Page("page.md", {"known": lambda _: "| 1 |"}, {})
    with pytest.raises(ValueError, match=r"page\.md: "):
        page.render(text, Measurements(tmp_path))


@pytest.mark.parametrize("path", PAGES_OF_DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_table_is_rendered_or_one_of_words(path: Path) -> None:
    if path.name == "recipes.md":
        pytest.skip("generated from the models; tests/train compares it")
    assert unmarked_tables(path.read_text(encoding="utf-8")) == []


def test_tables_that_nothing_renders_are_found() -> None:
    table = "| a | b |\n| --- | ---: |\n| 1 | {} |\n"
    loose, words = table.format("2"), f"<!-- words -->\n{table.format('≤ 2e-5')}"
    measured = [f"<!-- words -->\n{table.format(cell)}" for cell in ("3.4 ms", "12 %", "0.8 [0.7, 0.9]")]
    rendered = f"<!-- table: x -->\n{table.format('3.4 ms')}<!-- /table -->\n"
    assert unmarked_tables("\n".join([words, rendered, "a rule\n\n---\n"])) == []
    assert len(unmarked_tables("\n".join([words, loose, rendered, *measured]))) == 4


def test_numbers_have_one_rounding() -> None:
    assert with_interval(3.4159, 2.949, 3.5387, " ×") == "3.42 × [2.95, 3.54]"
    assert with_interval(149.23, 138.2, 175.4, " ×") == "149 × [138, 175]"
    assert with_interval(0.8534, 0.84, 0.9, digits=3) == "0.853 [0.840, 0.900]"
    assert with_interval(12.345, None, None) == "12.3"
    assert with_interval(None, None, None) == "–"
    assert markdown(("a", "b"), [("1", "2")], right=[1]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def kept_benchmark(folder: Path) -> Measurements:
    """A result of `bench --peers` of two runtimes, with prompts that are new and cached, and OpenVINO's defaults."""
    names = {"pytorch eager": 900.0, "pytorch eager, channels last": 750.0, "plain export": 390.0}
    names |= {"plain export, OpenVINO defaults": 188.0, "fused fp32": 130.0, "cached prompt fp32": 100.0}
    names |= {"fused int8, OpenVINO": 50.0, "cached prompt int8, OpenVINO": 40.0}
    precisions = {name: "int8" for name in names if "int8" in name} | {"plain export, OpenVINO defaults": "bf16"}
    rows = [
        {
            "name": name, "backend": "openvino" if "OpenVINO" in name else "onnxruntime", "stage": "image and prompt",
            "precision": precisions.get(name, "fp32"), "p50_ms": ms, "n": 10, "relative_error": 0.018,
            "mask_dice": 0.9987,
            "ours": name.startswith(("fused", "cached")),
        }
        for name, ms in names.items()
    ]  # fmt: skip
    ratios = [
        {"baseline": slow, "candidate": fast, "ratio": names[slow] / names[fast], "low": None, "high": None}
        for slow in names
        for fast in names
    ]
    figures = [
        {
            "what": what, "backend": "onnxruntime", "precision": "fp32", "value": value, "unit": unit, "low": None,
            "high": None, "goal": goal, "at_least": True, "met": met,
        }
        for what, value, unit, goal, met in (
            ("128 new prompts on one image, time per prompt and image", 21.5, "ms", None, None),
            ("128 new prompts on one image, against the plain export in ONNX Runtime", 37.2, "×", None, None),
            ("128 new prompts on one image, against OpenVINO with its defaults (plain export)", 18, "×", None, None),
            ("128 cached prompts on one image, against the plain export in ONNX Runtime", 149.2, "×", 100, True),
            ("one image and one cached prompt, against the fastest FP32 baseline (plain export)", 3.9, "×", 3.8, True),
        )
    ]  # fmt: skip
    (folder / performance.SMALL).write_text(json.dumps({"results": rows, "ratios": ratios, "figures": figures}))
    return Measurements(folder)


def test_the_speed_table_compares_new_prompts_before_cached_ones(tmp_path: Path) -> None:
    """A chosen baseline, the faster memory format of PyTorch, and OpenVINO's defaults with their error."""
    kept = kept_benchmark(tmp_path)
    rows = performance.one_image(performance.SMALL, ["plain export"])(kept).splitlines()
    title = TITLES.get("plain export, OpenVINO defaults", "plain export, OpenVINO defaults")
    against = [f"against {name}" for name in ("the plain export", "PyTorch eager", "OpenVINO defaults")]
    assert rows[0].split(" | ")[2:] == [*against, "relative error", "mask Dice |"]
    assert rows[2:] == [
        "| plain export in ONNX Runtime, fp32 | 390 | 1 × | 1.92 × | 0.482 × | 1.8e-02 | 0.9987 |",
        f"| {title}, bf16 | 188 | 2.07 × | 3.99 × | 1 × | 1.8e-02 | 0.9987 |",
        "| **cclip-deploy, new prompt**: ONNX Runtime, fp32 | 130 | 3.00 × | 5.77 × | 1.45 × | 1.8e-02 | 0.9987 |",
        "| **cclip-deploy, new prompt**: OpenVINO, int8 | 50.0 | 7.80 × | 15.0 × | 3.76 × | 1.8e-02 | 0.9987 |",
        "| **cclip-deploy, cached prompt**: ONNX Runtime, fp32 | 100 | 3.90 × | 7.50 × | 1.88 × | 1.8e-02 | 0.9987 |",
        "| **cclip-deploy, cached prompt**: OpenVINO, int8 | 40.0 | 9.75 × | 18.8 × | 4.70 × | 1.8e-02 | 0.9987 |",
    ]


def test_many_prompts_have_a_row_for_new_and_for_cached_ones(tmp_path: Path) -> None:
    kept = kept_benchmark(tmp_path)
    assert performance.many_prompts(performance.SMALL)(kept).splitlines()[2:] == [
        "| 128 new prompts on one image | ONNX Runtime, fp32 | 21.5 ms | 37.2 × | 18.0 × |",
        "| 128 cached prompts on one image | ONNX Runtime, fp32 | – | 149 × | – |",
    ]


def test_a_goal_is_bold_where_it_is_reached(tmp_path: Path) -> None:
    kept = kept_benchmark(tmp_path)
    shutil.copyfile(tmp_path / performance.SMALL, tmp_path / performance.LARGE)
    rows = performance.goals(kept).splitlines()[2:]
    assert rows[-1].startswith(
        "| one image and one cached prompt, against the fastest FP32 baseline | ≥ 3.8 × | **3.90 ×** | –"
    )


def test_the_bound_is_the_quotient_of_the_counts(measurements: Measurements) -> None:
    """88.18 G of the plain export against 21.87 G of image encoder and decoder, or 23.01 G with a new prompt."""
    assert performance.bound("image_encoder", "mask_decoder")(measurements) == "4.03"
    assert performance.bound("fused")(measurements) == "3.83"


@pytest.fixture
def kept_precisions(tmp_path: Path) -> Measurements:
    """A kept result of every source of docs/precision.md."""

    def row(name: str, megabytes: float, mean: float) -> dict[str, object]:
        sizes = {"image_encoder": megabytes * 1e6, "prompt_encoder": 135.2e6, "mask_decoder": 0.7e6}
        seconds = {"image_encoder": 5.04, "prompt_encoder": 7.2, "mask_decoder": 0.2}
        return {
            "precision": name, "layers": {"fp16": 135}, "engine_bytes": sizes, "build_seconds": seconds,
            "peak_bytes": 2.6e9, "masks": {"mean": mean, "worst": mean - 0.1}, "features_error": 0.00083,
        }  # fmt: skip

    rows = [row(name, 100.0 + 10 * place, 0.9995 - place / 1e3) for place, name in enumerate(precision.USES)]
    for file in (precision.TINY, precision.RN101):
        (tmp_path / file).write_text(json.dumps({"rows": rows}))
    for file in precision.TUNED.values():
        shutil.copyfile(ROOT / "docs" / "measurements" / file, tmp_path / file)
    points = [
        {"method": method, "calibration_pictures": count, "mean": 0.99 + count / 1e4}
        for method in precision.METHODS
        for count in (16, 2)
    ]
    (tmp_path / precision.CURVE).write_text(json.dumps(points))
    return kept_benchmark(tmp_path)


def test_precision_tables_show_sizes_builds_and_masks(kept_precisions: Measurements) -> None:
    costs = precision.costs(precision.RN101)(kept_precisions).splitlines()
    assert costs[2] == "| fp16 | 135 fp16 | 100.0 + 135.2 | 5.0 + 7.2 | 2.6 | 0.9995 / 0.8995 | 0.00083 |"
    assert precision.curve(kept_precisions).splitlines()[::2] == [
        "| mean Dice at | 2 | 16 |",
        "| min-max | 0.9902 | 0.9916 |",
        "| percentile 99.99 (the default) | 0.9902 | 0.9916 |",
    ]
    assert "| `--bf16` | if FP16 overflows" in precision.choice(kept_precisions)


def test_precision_goals_say_what_was_missed(kept_precisions: Measurements) -> None:
    rows = [row.split(" | ") for row in precision.goals(kept_precisions).splitlines()[2:]]
    assert [(row[2], row[3]) for row in rows if "rn101" in row[0] and "Dice" not in row[0]] == [
        ("100.0 / 120.0 MB", "**no** |"),
        ("235.2 / 265.2 MB", "**no** |"),
        ("5.0 s, 2.6 GB", "**no** |"),
    ]
    assert rows[0][2:] == ["0.9995", "yes |"]
    assert rows[-1][2:] == ["9.75 ×", "yes |"]
