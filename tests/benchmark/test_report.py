"""The HTML page and the tables of a benchmark show what its JSON holds."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.benchmark.report import bench_page, bench_sections

MEASURED = Path(__file__).parents[2] / "docs/measurements/rn101_224x224.json"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(MEASURED.read_bytes())
    return loaded


def test_the_page_has_every_candidate_and_every_figure(result: dict[str, Any]) -> None:
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", bench_page(result), re.DOTALL)]
    for row in result["results"]:
        at = cells.index(row["name"])
        assert cells[at + 1 : at + 3] == [row["stage"], row["precision"]]
        assert float(cells[at + 4]) == pytest.approx(row["p50_ms"], abs=0.051)
    shown = [row["what"] for row in result["figures"] if row["compared_with"] is None or row["goal"] is not None]
    assert len(shown) > 20
    assert set(shown) <= set(cells)


def test_speed_ups_are_in_the_column_of_their_baseline(result: dict[str, Any]) -> None:
    table = next(s.table for s in bench_sections(result) if s.title.startswith("Speed-up"))
    assert table is not None
    places = {"plain": "plain export", "fastest": "fastest in FP32", "defaults": "OpenVINO defaults"}
    rows = {(row[0], row[1]): row for row in table.rows}
    checked = 0
    for figure in result["figures"]:
        if figure["compared_with"] in places:
            what = figure["what"].partition(", against ")[0] + (" *" if figure["extrapolated"] else "")
            cell = rows[what, f"{figure['backend']} {figure['precision']}"][
                table.head.index(places[figure["compared_with"]])
            ]
            assert isinstance(cell, str)
            value, low, high = (float(n) for n in re.findall(r"[\d.]+", cell))
            assert (value, low, high) == pytest.approx((figure["value"], figure["low"], figure["high"]), rel=0.006)
            checked += 1
    assert checked > 20


def test_without_peers_the_ratios_of_the_bundle_are_shown(result: dict[str, Any]) -> None:
    alone = {key: value for key, value in result.items() if key != "figures"}
    table = bench_sections(alone)[1].table
    assert table is not None
    of_bundle = {row["name"] for row in result["results"] if row["role"] == "bundle"}
    assert {row[0] for row in table.rows} == of_bundle & {row["candidate"] for row in result["ratios"]} != set()
